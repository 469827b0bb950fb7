// Recordings over time. Millivolts are drawn as cardiologists read them, on paper of 25 mm/s and 10 mm/mV;
// other units as stacked channels over a grid of seconds, with a scale bar. One unit of the drawing is one millimetre.

const SPEED = 25; // mm/s
const ACROSS = 250; // mm: ten seconds, the width of the dialog

const EVENTS = 8; // named in words

const traces = new WeakMap();

/** The channels of a medium as numbers, NaN where values are missing; each less its median. */
function tracesOf(medium) {
  if (traces.has(medium)) return traces.get(medium);
  const levels = new Int16Array(bytes(medium.levels).buffer);
  const step = new Float32Array(bytes(medium.step).buffer);
  const length = levels.length / step.length;
  const found = Array.from(step, (size, channel) => {
    const own = levels.subarray(channel * length, (channel + 1) * length);
    const known = own.filter((level) => level !== -32768).sort();
    const middle = known.length ? known[known.length >> 1] : 0;
    const spread = known.length ? (known[Math.floor(0.995 * (known.length - 1))] - known[Math.floor(0.005 * (known.length - 1))]) * size : 0;
    return { values: Float32Array.from(own, (level) => (level === -32768 ? NaN : (level - middle) * size)), spread };
  });
  traces.set(medium, found);
  return found;
}

/** The line of a trace between two seconds; lifted off the paper where values are missing. */
function line(values, hz, from, to, x, y) {
  const parts = [];
  let pen = false;
  for (let i = Math.max(0, Math.floor(from * hz)); i < Math.min(values.length, Math.ceil(to * hz) + 1); i++) {
    if (Number.isNaN(values[i])) {
      pen = false;
      continue;
    }
    parts.push(`${pen ? "L" : "M"}${x(i / hz).toFixed(2)} ${y(values[i]).toFixed(2)}`);
    pen = true;
  }
  return parts.join("");
}

/** How a medium is laid out: speed, gain, distance of channels, margins, all in millimetres. */
function layout(medium) {
  const found = tracesOf(medium);
  const ecg = medium.unit === "mV";
  const spreads = found.map((t) => t.spread).sort((a, b) => a - b);
  const largest = spreads.at(-1) || 1;
  const typical = spreads[spreads.length >> 1] || largest;
  const gain = ecg ? [10, 5, 2.5].find((g) => largest * g <= 40) ?? 2.5 : null;
  const apart = ecg ? Math.min(Math.max(0.85 * largest * gain, 9), 28) : Math.min(Math.max(170 / found.length, 3.5), 13);
  const shown = { ecg, apart, gain: gain ?? Math.min((0.9 * apart) / typical, (2.2 * apart) / largest), speed: ecg ? SPEED : ACROSS / medium.seconds };
  const longest = Math.max(...medium.channels.map((name) => name.length));
  return { ...shown, left: ecg ? 12 : 3 + 2.3 * longest, top: (medium.events.length > 1 ? 9 : medium.events.length ? 6 : 2) + (ecg ? 5 : 1), right: ecg ? 5 : 16, bottom: 8, pad: ecg ? 0 : 0.6 * apart };
}

function recording(medium, e, latent) {
  const plan = layout(medium);
  const found = tracesOf(medium);
  const across = medium.seconds * plan.speed;
  const [width, height] = [plan.left + across + plan.right, plan.top + 2 * plan.pad + found.length * plan.apart + plan.bottom];
  const where = (w) => (w[2] >= 0 ? ` in ${medium.channels[w[2]]}` : "");
  const said = [`Recording of ${excerptOf(medium)}, ${found.length} channels`, windowsInWords(medium, e, where), eventsInWords(medium)];
  const svg = makeSVG("svg", { viewBox: `0 0 ${width.toFixed(2)} ${height.toFixed(2)}`, role: "img", class: `recording ${plan.ecg ? "ecg" : "eeg"}`, "aria-label": said.filter(Boolean).join("; ") });
  const share = Math.min(1, width / (ACROSS + plan.left + plan.right));
  svg.style.width = `${100 * share}%`;
  svg.style.minWidth = `${34 * share}rem`; // narrow windows scroll rather than shrink the writing
  whenSeen(svg, () => draw(svg, medium, e, latent, plan, found));
  return svg;
}

/** Many channels of many examples are a lot to draw: each is drawn when it comes into view. */
function whenSeen(node, action) {
  const watcher = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watcher.disconnect();
    action();
  }, { rootMargin: "600px" });
  watcher.observe(node);
}

function draw(svg, medium, e, latent, plan, found) {
  const { left, top, apart, speed, gain, pad } = plan;
  const [right, bottom] = [left + medium.seconds * speed, top + 2 * pad + found.length * apart];
  const x = (s) => left + s * speed;
  const middle = (channel) => top + pad + (channel + 0.5) * apart;
  svg.append(makeSVG("rect", { x: left, y: top, width: right - left, height: bottom - top, class: "sheet" }));
  svg.append(shades(medium, e, latent, x, (channel) => (channel < 0 ? [top, bottom] : [middle(channel) - apart / 2, middle(channel) + apart / 2])));
  svg.append(...(plan.ecg ? paper(left, right, top, bottom) : clock(medium, x, top, bottom))); // squares stay visible
  found.forEach(({ values }, channel) => {
    svg.append(makeSVG("path", { d: line(values, medium.hz, 0, medium.seconds, x, (v) => middle(channel) - v * gain), class: "trace" }));
    const [at, anchor, up] = plan.ecg ? [left + 1, "start", -apart / 2 + 3.6] : [left - 1.5, "end", 1.1];
    svg.append(makeSVG("text", { x: at, y: middle(channel) + up, "text-anchor": anchor, class: "channel", style: apart < 4 ? `font-size:${0.9 * apart}px` : null }, medium.channels[channel]));
  });
  const free = [0, 0]; // where the next name has room on each of two lines
  for (const [begin, end, name] of medium.events) {
    const [from, to] = [Math.max(begin, 0), Math.min(end, medium.seconds)];
    const mark = makeSVG("g", { class: "event" });
    mark.append(makeSVG("rect", { x: x(from), width: Math.max(0.3, (to - from) * speed), y: top - 1.6, height: 1 }));
    if (begin >= 0) mark.append(makeSVG("line", { x1: x(from), x2: x(from), y1: top - 1.6, y2: bottom }));
    mark.append(makeSVG("title", {}, name));
    const place = free.findIndex((end) => x(from) >= end);
    if (place >= 0 && from < medium.seconds) {
      mark.append(makeSVG("text", { x: x(from), y: top - 2.6 - 3.8 * place }, name));
      free[place] = x(from) + 2.2 * name.length + 1.5;
    }
    svg.append(mark);
  }
  const offset = medium.start_ms / 1000;
  for (const t of niceTicks(offset, offset + medium.seconds, Math.min(10, medium.seconds * speed / 12))) {
    svg.append(makeSVG("text", { x: x(t - offset), y: bottom + 5, "text-anchor": "middle" }, `${t} s`));
  }
  svg.append(plan.ecg ? calibration(plan, middle(0)) : scaleBar(medium, plan, right, bottom));
}

/** ECG paper: a line per millimetre, a stronger one each five. */
function paper(left, right, top, bottom) {
  const rules = (every) => {
    const parts = [];
    for (let x = 0; x <= right - left + 1e-6; x += every) parts.push(`M${left + x} ${top}V${bottom}`);
    for (let y = 0; y <= bottom - top + 1e-6; y += every) parts.push(`M${left} ${top + y}H${right}`);
    return parts.join("");
  };
  return [makeSVG("path", { d: rules(1), class: "small-squares" }), makeSVG("path", { d: rules(5), class: "large-squares" })];
}

/** A grid of seconds. */
function clock(medium, x, top, bottom) {
  const offset = medium.start_ms / 1000;
  const ticks = niceTicks(offset, offset + medium.seconds, 10);
  return [makeSVG("path", { d: ticks.map((t) => `M${x(t - offset)} ${top}V${bottom}`).join(""), class: "large-squares" })];
}

/** The pulse of one millivolt for 0.2 s that precedes every ECG. */
function calibration({ gain }, y) {
  const pulse = makeSVG("path", { d: `M2 ${y}h1.5v${-gain}h${0.2 * SPEED}v${gain}h1.5`, class: "trace" });
  pulse.append(makeSVG("title", {}, "1 mV for 0.2 s"));
  return pulse;
}

/** A vertical bar of a round number of units. */
function scaleBar(medium, { gain, apart }, right, bottom) {
  const ticks = niceTicks(0, (1.6 * apart) / gain, 2);
  const units = ticks[1] ?? ticks[0];
  const group = makeSVG("g", {});
  group.append(makeSVG("path", { d: `M${right + 2} ${bottom}v${-units * gain}`, class: "bar-of" }));
  group.append(makeSVG("text", { x: right + 3.2, y: bottom - (units * gain) / 2 + 1 }, `${units} ${medium.unit}`));
  return group;
}

function shades(medium, e, latent, x, rows) {
  const group = makeSVG("g", { class: "shade" });
  const offset = medium.start_ms / 1000;
  for (const [from, to, channel, value] of e.windows ?? []) {
    const [top, bottom] = rows(channel);
    const shade = makeSVG("rect", { x: x(from), width: x(to) - x(from), y: top, height: bottom - top, "fill-opacity": (0.1 + 0.45 * shareOf(value, latent)).toFixed(3) });
    const name = channel < 0 ? "" : `${medium.channels[channel]}, `;
    shade.append(makeSVG("title", {}, `${name}${seconds(from + offset)} to ${seconds(to + offset)}: ${short(value)}`));
    group.append(shade);
  }
  return group;
}

function eventsInWords(medium) {
  const offset = medium.start_ms / 1000;
  const said = medium.events.slice(0, EVENTS).map(([begin, , name]) => `${name} at ${seconds(begin + offset)}`).join(", ");
  return medium.events.length > EVENTS ? `${said} and ${medium.events.length - EVENTS} more` : said;
}

PANES.signal = {
  tile: (medium, e, latent) => { // three seconds of the channel where it fires
    const strongest = (e.windows ?? []).reduce((best, w) => (Math.abs(w[3]) > Math.abs(best?.[3] ?? 0) ? w : best), null);
    const channel = Math.max(0, strongest?.[2] ?? 0);
    const length = Math.min(medium.seconds, 3);
    const middle = strongest ? (strongest[0] + strongest[1]) / 2 : 0;
    const from = Math.min(Math.max(0, middle - length / 2), medium.seconds - length);
    const { values, spread } = tracesOf(medium)[channel];
    const svg = makeSVG("svg", { viewBox: "0 0 100 24", preserveAspectRatio: "none", class: "strip recording", "aria-hidden": "true" });
    const x = (s) => (100 * (s - from)) / length;
    svg.append(shades(medium, { windows: (e.windows ?? []).filter((w) => w[2] < 0 || w[2] === channel) }, latent, x, () => [0, 24]));
    svg.append(makeSVG("path", { d: line(values, medium.hz, from, from + length, x, (v) => 13 - (v * 18) / (spread * 1.3 || 1)), class: "trace", "vector-effect": "non-scaling-stroke" }));
    return svg;
  },
  pane: (latent, medium, e) => {
    const plan = layout(medium);
    const scale = plan.ecg ? `${SPEED} mm/s, ${plan.gain} mm/mV` : `scale bar in ${medium.unit || "units"}`;
    const cut = medium.total - medium.seconds > 1e-3 ? excerptOf(medium) : "";
    return make(
      "figure", { class: "timed" }, caption(e, medium.text, e.note, cut, scale, `${short(medium.hz)} Hz on this page`, eventsInWords(medium)),
      make("div", { class: "wide-figure" }, recording(medium, e, latent)));
  },
  words: (medium) => [...medium.channels, ...medium.events.map((event) => event[2])].join(" "),
};

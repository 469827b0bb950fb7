// Drawing: elements, numbers, colours, histograms. Nothing here knows the page.

const SVG = "http://www.w3.org/2000/svg";

/** An element; `text` is never read as HTML. Attributes that are null are left out. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  setAll(node, attributes);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function makeSVG(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  setAll(node, attributes);
  if (text !== null) node.textContent = text;
  return node;
}

function setAll(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
}

/** Three significant digits, as in the tables. */
function short(value) {
  if (!Number.isFinite(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(1).replace("-", "−");
  const text = Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
  return text.replace("-", "−");
}

function fixed(value, digits) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

function percent(share) {
  if (!Number.isFinite(share)) return "–";
  if (share > 0 && share < 1e-4) return "<0.01 %";
  const value = 100 * share;
  return `${value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toFixed(2)} %`;
}

// Dark to light through one family of hues, like inferno: it reads in greyscale, and black means silent.
const RAMP = [[10, 6, 24], [74, 12, 92], [160, 38, 86], [226, 82, 44], [250, 156, 20], [252, 242, 150]];

function heatColour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((from, i) => from + (RAMP[low + 1][i] - from) * (place - low));
}

/** The scale of the heat maps, from silence to the largest activation of the latent. */
function heatScale(peak) {
  const stops = RAMP.map((c) => `rgb(${c.join(",")})`).join(",");
  const bar = make("span", { class: "ramp", style: `background:linear-gradient(90deg,${stops})` });
  return make("span", { class: "scale", role: "img", "aria-label": `Colour scale from 0 to ${short(peak)}` }, "0", bar, short(peak));
}

/** How each kind of medium is looked at: `square` in a montage or else `tile` on a card, `pane` in the dialog, `words`. */
const PANES = {
  other: {
    tile: (medium) => make("span", { class: "passage" }, medium.text ?? ""),
    pane: (latent, medium, e) => reading(e, make("span", {}, medium.text ?? "")),
  },
};

function paneOf(medium) {
  return PANES[medium.kind] ?? PANES.other;
}

/** One line of the dialog: the activation, then what was read. */
function reading(e, ...children) {
  return make("figure", { class: "reading" }, activation(e), ...children);
}

function activation(e) {
  return make("span", { class: "value", title: "Activation" }, short(e.activation));
}

/** Text under an example: its activation and what is said of it. */
function caption(e, ...notes) {
  const said = notes.filter(Boolean).join(" · ");
  return make("figcaption", { title: said }, activation(e), make("span", { class: "alt" }, said));
}

/** The bytes behind base64. */
function bytes(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}

function seconds(value) {
  return `${fixed(value, value < 10 ? 2 : 1).replace(/\.?0+$/, "")} s`;
}

/** Share of the latent's peak, for shading. */
function shareOf(value, latent) {
  return Math.min(1, Math.abs(value) / latent.peak);
}

/** The excerpt on the page, if it is not the whole recording. */
function excerptOf(medium) {
  if (medium.total - medium.seconds < 1e-3) return `${seconds(medium.seconds)}`;
  const from = medium.start_ms / 1000;
  return `${seconds(from)} to ${seconds(from + medium.seconds)} of ${seconds(medium.total)}`;
}

/** Active windows in words, strongest first, times as in the recording. */
function windowsInWords(medium, e, where = () => "") {
  const windows = [...(e.windows ?? [])].sort((a, b) => Math.abs(b.at(-1)) - Math.abs(a.at(-1))).slice(0, 8);
  const from = medium.start_ms / 1000;
  const said = windows.map((w) => `${fixed(from + w[0], 2)} to ${seconds(from + w[1])}${where(w)}: ${short(w.at(-1))}`);
  return said.length ? `active ${said.join(", ")}${e.windows.length > 8 ? ", and weaker ones" : ""}` : "";
}

/** Round numbers that divide [low, high] into at most `count` steps or so. */
function niceTicks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let t = Math.ceil(low / step - 1e-6) * step; t <= high + step * 1e-6; t += step) ticks.push(Number(t.toPrecision(8)));
  return ticks;
}

/** Bars with axes; the vertical one is logarithmic when a linear one would hide the tail. */
function histogram(edges, counts, label) {
  const [width, height, left, right, top, bottom] = [340, 190, 44, 10, 24, 38];
  const positive = counts.filter((c) => c > 0);
  const largest = Math.max(...positive, 1);
  const log = positive.length > 2 && largest / Math.min(...positive) > 50;
  const [low, high] = [edges[0], edges[edges.length - 1]];
  const x = (v) => left + ((v - low) / (high - low || 1)) * (width - left - right);
  const floor = 0.5; // a single row still shows on the logarithmic axis
  const share = (c) => (log ? Math.log(c / floor) / Math.log(largest / floor) : c / largest);
  const y = (c) => height - bottom - Math.max(0, share(Math.max(c, log ? floor : 0))) * (height - top - bottom);

  const svg = makeSVG("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "histogram", "aria-label": label });
  const rows = log ? [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7].filter((t) => t <= largest) : niceTicks(0, largest, 4);
  for (const t of rows) {
    svg.append(makeSVG("line", { x1: left, x2: width - right, y1: y(t), y2: y(t), class: "rule" }));
    svg.append(makeSVG("text", { x: left - 7, y: y(t) + 3.5, "text-anchor": "end" }, t >= 1000 ? `${t / 1000}k` : `${t}`));
  }
  counts.forEach((count, i) => {
    if (!count) return;
    const span = x(edges[i + 1]) - x(edges[i]);
    const bar = makeSVG("rect", { x: x(edges[i]), y: y(count), width: Math.max(0.6, span * 0.9), height: height - bottom - y(count) });
    bar.append(makeSVG("title", {}, `${short(edges[i])} to ${short(edges[i + 1])}: ${count.toLocaleString("en")} rows`));
    svg.append(bar);
  });
  svg.append(makeSVG("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "axis" }));
  for (const t of niceTicks(low, high, 5)) {
    svg.append(makeSVG("text", { x: x(t), y: height - bottom + 15, "text-anchor": "middle" }, String(t).replace("-", "−")));
  }
  svg.append(makeSVG("text", { x: 0, y: 11 }, log ? "rows (log scale)" : "rows"));
  svg.append(makeSVG("text", { x: width - right, y: height - 4, "text-anchor": "end" }, "activation"));
  return svg;
}

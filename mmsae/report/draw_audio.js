// Sound: the spectrogram with the active cells, and buttons that play all of it or the active region.

const sound = { context: null, source: null, ended: null };

/** Ends what is playing, if anything is. */
function hush() {
  const { source, ended } = sound;
  sound.source = sound.ended = null;
  if (!source) return;
  source.onended = null;
  source.stop();
  ended();
}

/** Plays an excerpt from one second to another; `tick` hears how far it is, and `ended` that it is over. */
function play(medium, from, to, tick, ended) {
  hush();
  sound.context ??= new AudioContext(); // made at a click: before one, browsers keep it silent
  sound.context.resume();
  const levels = new Int16Array(bytes(medium.pcm).buffer);
  const buffer = sound.context.createBuffer(1, levels.length, medium.rate);
  buffer.copyToChannel(Float32Array.from(levels, (level) => level / 32767), 0);
  const source = sound.context.createBufferSource();
  source.buffer = buffer;
  source.connect(sound.context.destination);
  const begun = sound.context.currentTime;
  sound.source = source;
  sound.ended = ended;
  source.onended = hush;
  source.start(0, from, to - from);
  (function follow() {
    if (sound.source !== source) return;
    tick(Math.min(to, from + sound.context.currentTime - begun));
    requestAnimationFrame(follow);
  })();
}

const mel = (hz) => 2595 * Math.log10(1 + hz / 700);

/** The spectrogram on axes of seconds and Hz, active cells in the colours of heat maps. */
function spectrum(medium, e, latent) {
  const [width, height, left, right, top, bottom] = [720, 178, 52, 8, 12, 32];
  const [across, up] = [width - left - right, height - top - bottom];
  const x = (s) => left + (s / medium.seconds) * across;
  const y = (share) => top + (1 - share) * up;
  const said = `Spectrogram of ${excerptOf(medium)}, 0 to ${hertz(medium.top_hz)} on the mel scale; ${windowsInWords(medium, e)}`;
  const svg = makeSVG("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "spectrum", "aria-label": said });
  svg.append(makeSVG("image", { href: medium.spectrogram, x: left, y: top, width: across, height: up, preserveAspectRatio: "none" }));
  svg.append(cells(medium, e, latent, x, y));
  for (const hz of [125, 500, 1000, 2000, 4000, 8000, 16000].filter((f) => f <= medium.top_hz)) {
    const share = mel(hz) / mel(medium.top_hz);
    svg.append(makeSVG("line", { x1: left - 4, x2: left, y1: y(share), y2: y(share), class: "axis" }));
    svg.append(makeSVG("text", { x: left - 7, y: y(share) + 3.5, "text-anchor": "end" }, hz >= 1000 ? `${hz / 1000}k` : `${hz}`));
  }
  const begin = medium.start_ms / 1000;
  for (const t of niceTicks(begin, begin + medium.seconds, 10)) {
    svg.append(makeSVG("line", { x1: x(t - begin), x2: x(t - begin), y1: height - bottom, y2: height - bottom + 4, class: "axis" }));
    svg.append(makeSVG("text", { x: x(t - begin), y: height - bottom + 16, "text-anchor": "middle" }, String(t)));
  }
  svg.append(makeSVG("text", { x: width - right, y: height - 3, "text-anchor": "end" }, "seconds"));
  svg.append(makeSVG("text", { x: 0, y: height - bottom + 16 }, "Hz"));
  if (e.region) {
    const bar = makeSVG("rect", { x: x(e.region[0]), width: x(e.region[1]) - x(e.region[0]), y: height - bottom, height: 4, class: "region" });
    bar.append(makeSVG("title", {}, "the active region"));
    svg.append(bar);
  }
  return svg;
}

function cells(medium, e, latent, x, y) {
  const group = makeSVG("g", { class: "shade" });
  for (const [from, to, low, high, value] of e.windows ?? []) {
    const share = shareOf(value, latent);
    const colour = `rgb(${heatColour(0.45 + 0.45 * share).map(Math.round).join(",")})`;
    const cell = makeSVG("rect", { x: x(from), width: x(to) - x(from), y: y(high), height: y(low) - y(high), fill: colour, "fill-opacity": (0.1 + 0.45 * share).toFixed(2), stroke: colour, "stroke-opacity": (0.2 + 0.8 * share).toFixed(2) });
    cell.append(makeSVG("title", {}, `${seconds(from + medium.start_ms / 1000)} to ${seconds(to + medium.start_ms / 1000)}: ${short(value)}`));
    group.append(cell);
  }
  return group;
}

function hertz(hz) {
  return hz >= 1000 ? `${Number((hz / 1000).toPrecision(3))} kHz` : `${hz} Hz`;
}

function player(medium, e, svg) {
  const head = makeSVG("line", { y1: 12, y2: 146, class: "playhead", visibility: "hidden" });
  svg.append(head);
  const spans = [["Play all", 0, medium.seconds]];
  if (e.region) {
    const [from, to] = e.region;
    spans.push([`Play active region, ${fixed(medium.start_ms / 1000 + from, 2)} to ${seconds(medium.start_ms / 1000 + to)}`, from, to]);
  }
  const buttons = spans.map(([name, from, to]) => {
    const button = make("button", { type: "button", class: "play", "aria-pressed": "false" }, name);
    button.addEventListener("click", () => {
      if (button.getAttribute("aria-pressed") === "true") return hush();
      play(medium, from, to, (now) => {
        const place = 52 + (now / medium.seconds) * 660;
        setAll(head, { x1: place, x2: place, visibility: "visible" });
      }, () => {
        button.setAttribute("aria-pressed", "false");
        head.setAttribute("visibility", "hidden");
      });
      button.setAttribute("aria-pressed", "true");
    });
    return button;
  });
  return make("div", { class: "player", role: "group", "aria-label": "Listen" }, ...buttons);
}

PANES.audio = {
  tile: (medium, e, latent) => {
    const svg = makeSVG("svg", { viewBox: "0 0 100 24", preserveAspectRatio: "none", class: "strip", "aria-hidden": "true" });
    svg.append(makeSVG("image", { href: medium.spectrogram, width: 100, height: 24, preserveAspectRatio: "none" }));
    svg.append(cells(medium, e, latent, (s) => (100 * s) / medium.seconds, (share) => 24 * (1 - share)));
    return svg;
  },
  pane: (latent, medium, e) => {
    const svg = spectrum(medium, e, latent);
    const guessed = medium.mel_hz.length === 0 && (e.windows ?? []).some((w) => w[3] - w[2] < 1) ? "bands drawn as equal parts of the mel scale" : "";
    const cut = medium.total - medium.seconds > 1e-3 ? excerptOf(medium) : "";
    const silent = make("p", { class: "alt" }, "The sound is not stored: the page is full.");
    return make(
      "figure", { class: "timed" }, caption(e, medium.text, e.note, cut, guessed),
      make("div", { class: "wide-figure" }, svg), medium.pcm ? player(medium, e, svg) : silent);
  },
};

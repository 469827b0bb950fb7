// Pictures under heat maps; beside them the masks of scientific images, or the text that a multimodal model reads.

/** A canvas with one pixel per patch; the style sheet stretches it over the picture. */
function heatMap(heat) {
  const levels = Uint8Array.from(atob(heat.levels), (c) => c.charCodeAt(0));
  const rows = levels.length / heat.columns;
  const canvas = make("canvas", { width: heat.columns, height: rows, class: "heat", "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(heat.columns, rows);
  levels.forEach((level, i) => {
    const share = level / 255;
    pixels.data.set([...heatColour(share), 255 * (0.3 + 0.4 * Math.sqrt(share))], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** A picture under its heat map. A square map lies on the middle square, as models crop; any other on the whole picture. */
function picture(medium, example, { alt, heat }) {
  const map = heat && example.heat ? heatMap(example.heat) : null;
  const frame = make("span", { class: "picture" });
  const shape = example.heat ? example.heat.columns ** 2 / bytes(example.heat.levels).length : 1;
  if (shape !== 1 || example.whole) frame.style.aspectRatio = medium.size ? medium.size[0] / medium.size[1] : shape;
  frame.classList.toggle("bare", !medium.data);
  if (medium.data) frame.append(make("img", { src: medium.data, alt, loading: "lazy", decoding: "async", draggable: "false" }));
  else if (alt) setAll(frame, { role: "img", "aria-label": alt });
  if (map) frame.append(map);
  return frame;
}

/** The picture with the values of its mask in colour, and what share of the activation lies in each. */
function maskBeside(medium, e, alt) {
  const beside = picture(medium, {}, { alt: `${alt}, its mask`, heat: false });
  beside.append(make("img", { src: medium.mask, alt: "", class: "mask", draggable: "false" }));
  const row = (name, inside, area, colour) => make(
    "li", {}, make("span", colour === null ? {} : { class: "swatch", style: colour && `background:${colour}` }), make("span", {}, name),
    make("span", { class: colour === null ? "alt" : "value" }, inside), make("span", { class: "alt" }, area));
  const rows = medium.legend.map((entry, i) => row(entry.name, percent(e.shares?.[i]), percent(entry.share), entry.colour));
  return [beside, make("ul", { class: "legend", "aria-label": "Share of the activation and of the picture inside each part of the mask" }, row("", "activation", "area", null), ...rows)];
}

PANES.image = {
  square: () => true,
  pane: (latent, medium, e) => {
    const alt = medium.text || `Sample ${e.sample}`;
    const said = caption(e, e.note, medium.text);
    if (!medium.mask) return make("figure", {}, picture(medium, e, { alt, heat: true }), said);
    const [mask, legend] = maskBeside(medium, e, alt);
    return make("figure", { class: "masked" }, picture(medium, e, { alt, heat: true }), mask, said, legend);
  },
};

PANES.image_text = {
  square: () => true,
  pane: (latent, medium, e) => make(
    "figure", { class: "beside" },
    make("div", {}, picture(medium, e, { alt: medium.text || `Picture of sample ${e.sample}`, heat: true }), caption(e, e.note, placeOf(e))),
    passage(medium.tokens, e.values, latent.peak, { roles: medium.roles })),
  words: (medium) => medium.tokens.join(""),
};

/** Whether a latent of a multimodal model fires on the picture, the words or both. */
function placeOf(e) {
  const words = (e.values ?? []).some((v) => v);
  const patches = e.heat && bytes(e.heat.levels).some((level) => level);
  return words && patches ? "in picture and text" : patches ? "in the picture" : words ? "in the text" : "";
}

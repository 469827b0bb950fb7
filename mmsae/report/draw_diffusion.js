// Diffusion: the picture under the heat map of one step, and how active a latent is at each timestep.

PANES.diffusion = {
  square: (medium, e) => Boolean(medium.data || e.heat),
  pane: (latent, medium, e) => {
    if (!PANES.diffusion.square(medium, e)) return reading(e, make("span", {}, [medium.text, e.note].filter(Boolean).join(" · ")));
    return make("figure", { class: "step" }, picture(medium, e, { alt: medium.text || `Sample ${e.sample}`, heat: true }), caption(e, e.note, medium.text));
  },
};

/** Mean activation over the timesteps, one line per condition, named at its end. */
function timesteps(lines) {
  const [width, height, left, right, top, bottom] = [340, 200, 44, 10, lines.length > 1 ? 40 : 24, 38];
  const xs = lines.flatMap((l) => l.x);
  const ys = lines.flatMap((l) => l.y);
  const [low, high] = [Math.min(...xs), Math.max(...xs)];
  const [least, most] = [Math.min(0, ...ys), Math.max(0, ...ys)];
  const x = (v) => (high > low ? left + 6 + ((v - low) / (high - low)) * (width - left - right - 12) : (left + width - right) / 2);
  const y = (v) => height - bottom - ((v - least) / (most - least || 1)) * (height - top - bottom);
  const said = lines.map((l) => `${l.label ? `${l.label}: ` : ""}${l.x.map((t, i) => `${short(l.y[i])} at ${Math.round(t)}`).join(", ")}`);
  const svg = makeSVG("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "histogram profile", "aria-label": `Mean activation over timesteps. ${said.join(". ")}` });
  for (const t of niceTicks(least, most || 1, 4)) {
    svg.append(makeSVG("line", { x1: left, x2: width - right, y1: y(t), y2: y(t), class: "rule" }));
    svg.append(makeSVG("text", { x: left - 7, y: y(t) + 3.5, "text-anchor": "end" }, String(t).replace("-", "−")));
  }
  svg.append(makeSVG("line", { x1: left, x2: width - right, y1: y(0), y2: y(0), class: "axis" }));
  let place = left;
  lines.forEach((line, i) => {
    const colour = `var(--plot-${i + 1})`;
    const path = line.x.map((t, j) => `${j ? "L" : "M"}${x(t).toFixed(1)} ${y(line.y[j]).toFixed(1)}`).join("");
    svg.append(makeSVG("path", { d: path, style: `stroke:${colour}`, class: "line-of" }));
    line.x.forEach((t, j) => {
      const dot = makeSVG("circle", { cx: x(t), cy: y(line.y[j]), r: line.x.length > 20 ? 2 : 3.2, style: `fill:${colour}` });
      dot.append(makeSVG("title", {}, `${line.label ? `${line.label}, ` : ""}timestep ${Math.round(t)}: ${short(line.y[j])}`));
      svg.append(dot);
    });
    if (line.label) {
      svg.append(makeSVG("text", { x: place, y: 28, style: `fill:${colour};font-weight:600` }, line.label));
      place += 8 * line.label.length + 14;
    }
  });
  const ticks = high > low ? niceTicks(low, high, 5).filter((t) => Number.isInteger(t)) : [low];
  for (const t of ticks) svg.append(makeSVG("text", { x: x(t), y: height - bottom + 15, "text-anchor": "middle" }, String(t)));
  svg.append(makeSVG("text", { x: 0, y: 11 }, "mean activation over all rows"));
  svg.append(makeSVG("text", { x: width - right, y: height - 4, "text-anchor": "end" }, "timestep (more noise →)"));
  return svg;
}

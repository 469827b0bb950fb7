// Texts: tokens shaded by activation in their context, with the roles of a dialogue.

/** Tokens as the tokenizer cut them, shaded by activation; only `reach` of them around the strongest if given. */
function passage(tokens, values, peak, { reach = null, roles = null } = {}) {
  const node = make("span", { class: "passage" });
  let [from, to] = [0, tokens.length];
  if (reach !== null && values) {
    const strongest = values.reduce((best, v, i) => (Math.abs(v ?? 0) > Math.abs(values[best] ?? 0) ? i : best), 0);
    from = Math.max(0, Math.min(strongest - Math.floor(reach / 2), tokens.length - reach));
    to = Math.min(tokens.length, from + reach);
  }
  if (from > 0) node.append("…");
  for (let i = from; i < to; i++) {
    const text = tokens[i].replace(/[Ġ▁]/g, " ").replace(/Ċ/g, "↵").replace(/<\/w>/g, " ");
    const value = values ? values[i] : null;
    const turn = roles?.[i] && (i === from || roles[i] !== roles[i - 1]);
    if (turn) node.append(make("span", { class: "role" }, roles[i]));
    const word = value ? text.trim() || text : "";
    const start = word ? text.indexOf(word) : text.length; // the space before a word is not shaded: lines end cleanly
    if (node.hasChildNodes() || start === text.length) node.append(i === 0 || turn ? text.slice(0, start).trimStart() : text.slice(0, start));
    if (!word) continue;
    const share = Math.round(100 * Math.min(1, Math.abs(value) / peak));
    node.append(make("mark", { style: `--share:${share}%`, title: `${word}: ${short(value)}` }, word), text.slice(start + word.length));
  }
  if (to < tokens.length) node.append("…");
  return node;
}

PANES.text = {
  tile: (medium, e, latent) => passage(medium.tokens, e.values, latent.peak, { reach: SNIPPET_TOKENS, roles: medium.roles }),
  pane: (latent, medium, e) => reading(e, passage(medium.tokens, e.values, latent.peak, { roles: medium.roles })),
  words: (medium) => `${(medium.tokens ?? []).join("")} ${[...new Set(medium.roles ?? [])].join(" ")}`,
};

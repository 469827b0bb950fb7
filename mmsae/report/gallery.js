// The gallery of latents: search, sort, filter, cards drawn as they come into view, and the dialog of one latent.
// The address decides which latent is open (#latent-12), so links and the back button work.

const BATCH = 36;
const TILES = 9;
const SNIPPETS = 4;
const SIDE_TILES = 6; // of the montage above the captions of a concept set
const SIDE_SNIPPETS = 2;
const SNIPPET_TOKENS = 14;

const SORTS = {
  auroc: ["AUROC", (l) => l.factor?.auroc],
  f1: ["F1", (l) => l.factor?.f1],
  density: ["Density", (l) => l.density],
  max: ["Max activation", (l) => l.max],
  balance: ["Balance", (l) => (l.sides ? balanceOf(l) : null)],
  id: ["Id", (l) => l.id],
};

function gallery(data) {
  const byId = (id) => document.getElementById(id);
  const [grid, search, factor, sort, order, set] = ["grid", "search", "factor", "sort", "order", "set"].map(byId);
  const { latents, media, sets } = data;
  const named = latents.some((l) => l.factor);
  const state = { shown: latents, drawn: 0, descending: true };

  for (const latent of latents) {
    latent.key = latent.set ? `latent-${latent.id}.${latent.set}` : `latent-${latent.id}`;
  }

  function haystack(latent) {
    latent.words ??= [
      `#${latent.id}`, latent.label, latent.factor ? `${factorName(latent)} ${latent.factor.name} ${latent.factor.value}` : "",
      ...(latent.captions ?? []).map((c) => c.text),
      ...latent.examples.map((e) => `${paneOf(media[e.media]).words?.(media[e.media]) ?? ""} ${media[e.media].text ?? ""}`),
    ].join("\n").toLowerCase();
    return latent.words;
  }

  function apply() {
    const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [name, value] = factor.value ? JSON.parse(factor.value) : [];
    const wanted = Number(set.value || 0);
    state.shown = latents.filter((l) =>
      l.set === wanted
      && (name === undefined || (name === null ? !l.factor : l.factor?.name === name && (value === undefined || l.factor.value === value)))
      && terms.every((t) => haystack(l).includes(t)));
    const by = SORTS[sort.value][1];
    const sign = state.descending ? -1 : 1;
    const exact = (l) => (terms.length === 1 && terms[0].replace("#", "") === String(l.id) ? 0 : 1);
    state.shown.sort((a, b) => exact(a) - exact(b) || compare(by(a), by(b), sign) || a.id - b.id);
    state.drawn = 0;
    grid.replaceChildren();
    grid.classList.toggle("texts", !latents.some((l) => l.set === wanted && l.examples.some((e) => isSquare(media[e.media], e))));
    more();
    const all = latents.filter((l) => l.set === wanted).length;
    const n = state.shown.length;
    byId("count").textContent = n === all ? `${n.toLocaleString("en")} latents` : `${n.toLocaleString("en")} of ${all.toLocaleString("en")}`;
    byId("empty").hidden = n > 0;
    order.textContent = state.descending ? "↓" : "↑";
    order.title = state.descending ? "Largest first" : "Smallest first";
    order.setAttribute("aria-label", `${order.title}; change the order`);
  }

  function more() {
    const next = state.shown.slice(state.drawn, state.drawn + BATCH);
    state.drawn += next.length;
    grid.append(...next.map((l) => make("li", {}, card(l, media, byId("heat").checked))));
  }

  // Draw on while the end of the grid is near the window; observed anew, because a filled screen fires no second event.
  const end = byId("more");
  const watcher = new IntersectionObserver((entries) => {
    if (!entries.some((e) => e.isIntersecting) || state.drawn >= state.shown.length) return;
    more();
    watcher.unobserve(end);
    watcher.observe(end);
  }, { rootMargin: "900px" });

  fillFactors(factor, latents);
  byId("factor-label").hidden = !named;
  byId("heat-label").hidden = !latents.some((l) => l.examples.some((e) => e.heat));
  for (const [key, [name]] of Object.entries(SORTS)) {
    if (["auroc", "f1"].includes(key) ? named : key !== "balance" || latents.some((l) => l.sides)) sort.append(make("option", { value: key }, name));
  }
  sort.value = named ? "auroc" : "max";
  sets.forEach((name, i) => set.append(make("option", { value: i }, name)));
  byId("set-label").hidden = sets.length < 2;

  let pending = 0;
  search.addEventListener("input", () => {
    clearTimeout(pending);
    pending = setTimeout(apply, 80);
  });
  for (const control of [factor, sort, set, byId("heat")]) control.addEventListener("change", apply);
  order.addEventListener("click", () => {
    state.descending = !state.descending;
    apply();
  });
  byId("reset").addEventListener("click", () => {
    search.value = factor.value = "";
    apply();
    search.focus();
  });
  grid.closest("section").querySelector("form").addEventListener("submit", (event) => event.preventDefault());

  apply();
  watcher.observe(end);
  dialog(latents, media, () => state.shown);
}

/** Smaller first for sign 1; what has no value goes to the end in both directions. */
function compare(a, b, sign) {
  const [none, other] = [a === null || a === undefined, b === null || b === undefined];
  return none || other ? none - other : sign * (a - b);
}

function factorName(latent) {
  return `${latent.factor.name} = ${latent.factor.value}`;
}

function fillFactors(select, latents) {
  const found = new Map();
  for (const { factor } of latents) {
    if (!factor) continue;
    if (!found.has(factor.name)) found.set(factor.name, new Map());
    const values = found.get(factor.name);
    values.set(factor.value, (values.get(factor.value) ?? 0) + 1);
  }
  select.append(make("option", { value: "" }, "All"));
  const natural = (a, b) => String(a).localeCompare(String(b), "en", { numeric: true });
  for (const name of [...found.keys()].sort(natural)) {
    const group = make("optgroup", { label: name });
    const total = [...found.get(name).values()].reduce((a, b) => a + b, 0);
    group.append(make("option", { value: JSON.stringify([name]) }, `any ${name} (${total})`));
    for (const value of [...found.get(name).keys()].sort(natural)) {
      group.append(make("option", { value: JSON.stringify([name, value]) }, `${value} (${found.get(name).get(value)})`));
    }
    select.append(group);
  }
  const without = latents.filter((l) => !l.factor).length;
  if (without) select.append(make("option", { value: "[null]" }, `no match (${without})`));
}

function headingOf(latent) {
  if (latent.factor) return latent.factor.value;
  return latent.label || latent.captions?.[0]?.text || "";
}

function card(latent, media, heat) {
  const heading = headingOf(latent);
  const score = latent.factor ? `AUROC ${fixed(latent.factor.auroc, 2)}` : null;
  const montage = latent.sides
    ? make("span", { class: "sides" }, ...latent.sides.map((side, i) => preview(latent, ofSide(latent, i), media, heat, SIDE_TILES, SIDE_SNIPPETS, `silent: ${sideName(side)}`)))
    : preview(latent, latent.examples, media, heat, TILES, SNIPPETS, "no example");
  return make(
    "a", { class: "card", href: `#${latent.key}`, "aria-label": [`Latent ${latent.id}`, heading, score].filter(Boolean).join(", ") },
    montage,
    make("span", { class: "line" }, make("strong", { title: latent.factor ? factorName(latent) : heading }, heading || "no match"), make("span", {}, `#${latent.id}`)),
    make("span", { class: "line" }, make("span", {}, score ?? "active on"), make("span", { title: "Share of rows on which it is active" }, percent(latent.density))),
  );
}

/** The strongest examples, small: pictures as a montage, anything else one below the other. */
function preview(latent, examples, media, heat, tiles, snippets, silence) {
  const pictures = examples.filter((e) => isSquare(media[e.media], e)).slice(0, tiles);
  if (pictures.length) return make("span", { class: "montage" }, ...pictures.map((e) => tile(media[e.media], e, heat)));
  const shown = examples.slice(0, snippets).map((e) => (paneOf(media[e.media]).tile ?? PANES.other.tile)(media[e.media], e, latent));
  return make("span", { class: "snippets" }, ...(shown.length ? shown : [make("span", { class: "passage alt" }, silence)]));
}

const SIDE_NAMES = { image: "pictures", audio: "sounds", text: "captions" };

function sideName(side) {
  return SIDE_NAMES[side.name] ?? side.name;
}

function ofSide(latent, number) {
  return latent.examples.filter((e) => e.side === number);
}

/** 1 where a latent fires as often in every stream, 0 where it is silent in one. */
function balanceOf(latent) {
  const rates = latent.sides.map((side) => side.density);
  return Math.min(...rates) / Math.max(...rates);
}

function isSquare(medium, e) {
  return Boolean(paneOf(medium).square?.(medium, e));
}

/** A picture of a montage, whose cells are square. */
function tile(medium, e, heat) {
  const frame = picture(medium, e, { alt: "", heat: heat || !medium.data });
  frame.style.aspectRatio = "";
  return frame;
}

function dialog(latents, media, shown) {
  const box = document.getElementById("detail");
  const body = document.getElementById("detail-body");
  const title = document.getElementById("detail-title");
  const buttons = Object.fromEntries(["previous", "next", "close"].map((id) => [id, document.getElementById(id)]));
  let heat = true;
  let current = null;

  function follow() {
    const latent = latents.find((l) => `#${l.key}` === location.hash);
    hush();
    current = latent ?? null;
    if (!latent) {
      if (box.open) box.close();
      return;
    }
    title.textContent = `Latent ${latent.id}`;
    body.replaceChildren(...detail(latent, media, heat, (on) => (heat = on)));
    body.scrollTop = 0;
    const place = shown().indexOf(latent);
    buttons.previous.disabled = place <= 0;
    buttons.next.disabled = place < 0 || place >= shown().length - 1;
    if (!box.open) {
      box.showModal();
      title.focus();
    }
  }

  function step(by) {
    const next = shown()[shown().indexOf(current) + by];
    if (next && shown().includes(current)) location.replace(`#${next.key}`);
  }

  buttons.previous.addEventListener("click", () => step(-1));
  buttons.next.addEventListener("click", () => step(1));
  buttons.close.addEventListener("click", () => box.close());
  box.addEventListener("click", (event) => event.target === box && box.close());
  box.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    step(by);
  });
  box.addEventListener("close", () => {
    hush();
    if (!current) return;
    const link = document.querySelector(`a[href="#${current.key}"]`);
    current = null;
    history.replaceState(null, "", "#latents");
    link?.focus();
  });
  window.addEventListener("hashchange", follow);
  follow();
}

function detail(latent, media, heat, remember) {
  if (latent.sides) return [conceptSet(latent, media), make("aside", {}, facts(latent), match(latent), activations(latent))];
  const withHeat = latent.examples.some((e) => e.heat);
  const timed = latent.examples.some((e) => e.windows?.length);
  const panes = latent.examples.map((e) => paneOf(media[e.media]).pane(latent, media[e.media], e));
  const examples = make("div", { class: `examples${heat ? " heated" : ""}` }, ...panes);
  const tools = make("div", { class: "above" }, make("h3", {}, "Strongest examples"));
  if (withHeat || timed) {
    const toggle = make("input", { type: "checkbox", id: "overlay" });
    toggle.checked = heat;
    toggle.addEventListener("change", () => {
      examples.classList.toggle("heated", toggle.checked);
      remember(toggle.checked);
    });
    const title = withHeat ? "Point at a picture to see it alone" : null;
    tools.append(make("label", { class: "check", title }, toggle, withHeat ? " Heat map" : " Active windows"));
    tools.append(withHeat ? heatScale(latent.peak) : make("span", {}, `full shade at ${short(latent.peak)}`));
  }
  const side = make("aside", {}, facts(latent), match(latent), captions(latent), profile(latent), activations(latent));
  return [make("div", { class: "main" }, tools, examples), side];
}

/** The strongest examples of every stream side by side. */
function conceptSet(latent, media) {
  const column = (side, i) => {
    const heading = make("h3", {}, `Strongest ${sideName(side)}`);
    const note = make("span", { title: `Share of the ${sideName(side)} that activate it` }, `fires on ${percent(side.density)}`);
    const panes = ofSide(latent, i).map((e) => paneOf(media[e.media]).pane(latent, media[e.media], e));
    const shown = panes.length ? panes : [make("p", { class: "alt" }, "It is silent here.")];
    return make("section", {}, make("div", { class: "above" }, heading, note), make("div", { class: "examples" }, ...shown));
  };
  return make("div", { class: "main set" }, ...latent.sides.map(column));
}

function facts(latent) {
  const balance = latent.sides ? ["Balance", fixed(balanceOf(latent), 2), "Smallest share of a stream that activates it over the largest"] : null;
  const rows = [balance ?? ["Density", percent(latent.density), "of rows activate it"], ["Mean", short(latent.mean), "where active"], ["Maximum", short(latent.max), ""]];
  const list = make("dl", { class: "figures" }, ...rows.map(([name, value, note]) => make("div", { title: note }, make("dt", {}, name), make("dd", {}, value))));
  return make("section", {}, latent.label ? make("p", { class: "label" }, latent.label) : null, list);
}

function match(latent) {
  if (!latent.factor) return null;
  const meter = (name, value, from) => make(
    "div", { class: "meter", title: `The bar starts at ${from}` }, make("span", {}, name),
    make("span", { class: "track", "aria-hidden": "true" }, make("span", { style: `width:${Math.max(0, (100 * (value - from)) / (1 - from))}%` })),
    make("span", { class: "value" }, fixed(value, 3)));
  return make("section", {}, make("h3", {}, "Best-matching factor"), make("p", { class: "label" }, factorName(latent)),
    meter("AUROC", latent.factor.auroc, 0.5), meter("F1", latent.factor.f1, 0));
}

function captions(latent) {
  if (!latent.captions?.length) return null;
  const rows = latent.captions.map((c) => make("li", {}, make("span", {}, c.text), make("span", { class: "value" }, short(c.score))));
  return make("section", {}, make("h3", {}, "Nearest captions"), make("ol", { class: "captions" }, ...rows));
}

function activations(latent) {
  const h = latent.histogram;
  if (!h?.counts?.length) return null;
  return make("section", {}, make("h3", {}, "Activations"), histogram(h.edges, h.counts, `Histogram of the activations of latent ${latent.id}`));
}

function profile(latent) {
  if (!latent.profile?.some((line) => line.x.length)) return null;
  return make("section", {}, make("h3", {}, "Over the timesteps"), timesteps(latent.profile));
}

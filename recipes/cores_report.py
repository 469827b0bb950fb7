"""What `compare_cores.py` writes and shows: tables, a plot, and which claims of the papers hold."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from mmsae.cores import SAECore
from mmsae.files import write_atomic
from mmsae.report.plots import tick
from mmsae.subclasses import subclasses

FRONT = ("ReLU", "PAnneal", "Gated", "JumpReLU", "TopK", "BatchTopK", "MatchingPursuit")
"""Cores of the sparsity-fidelity front."""
FRONT_WORLD, FRONT_SCALES = "zipf", (0.67, 2.0)
"""Where it is drawn, and its budgets beside the true one, in units of that."""


class Job(NamedTuple):
    """One dictionary to train; `scale` multiplies the number of active latents."""

    world: str
    core: str
    seed: int
    scale: float = 1.0

    @property
    def key(self) -> str:
        """Name of the result."""
        return f"{self.world}/{self.core}/{self.seed}" + ("" if self.scale == 1 else f"/{self.scale:g}")


# ---- what the methods claim


class Results:
    """Numbers by job, and their means over the seeds."""

    def __init__(self, numbers: dict[Job, dict[str, float]]) -> None:
        self.numbers = numbers

    def seeds(self, world: str, core: str, metric: str, scale: float = 1.0) -> list[float]:
        """One value per seed."""
        return [n[metric] for job, n in self.numbers.items()
                if (job.world, job.core, job.scale) == (world, core, scale) and metric in n]  # fmt: skip

    def mean(self, world: str, core: str, metric: str, scale: float = 1.0) -> float | None:
        """Their mean; None where nothing ran."""
        values = self.seeds(world, core, metric, scale)
        return sum(values) / len(values) if values else None


class Claim(NamedTuple):
    """That a number of `core` is at most (or at least) `factor` times that of `than`, plus `margin`.

    Without `than` the number itself is compared with `margin`.
    """

    says: str
    world: str
    metric: str
    core: str
    than: str
    sign: str
    factor: float = 1.0
    margin: float = 0.0

    def holds(self, results: Results) -> tuple[bool, float, float] | None:
        """Whether it does for the mean over the seeds, and the two means; None where one of them did not run."""
        mine = results.mean(self.world, self.core, self.metric)
        other = results.mean(self.world, self.than, self.metric) if self.than else 0.0
        if mine is None or other is None:
            return None
        bound = self.factor * other + self.margin
        return (mine <= bound if self.sign == "<=" else mine >= bound), mine, other


CLAIMS = (
    *(Claim(f"{core} shrinks less than L1 at the same L0", "zipf", "fvu", core, "ReLU", "<=", 0.85)
      for core in ("Gated", "JumpReLU", "PAnneal", "TopK", "BatchTopK")),
    Claim("A budget shared by the batch beats one per row", "zipf", "fvu", "BatchTopK", "TopK", "<="),
    Claim("Shares by a Zipf law suit Zipf frequencies", "zipf", "fvu", "FeatureChoice", "TopK", "<="),
    Claim("A concept and its opposite share a signed latent", "bipolar", "fvu", "AbsTopK", "TopK", "<=", 0.5),
    Claim("A signed latent fires for both signs of its feature", "bipolar", "f1", "AbsTopK", "TopK", ">=", 1, 0.2),
    Claim("Pursuit finds children beside their parents",
          "tree", "matched", "MatchingPursuit", "BatchTopK", ">=", 1, 0.1),
    Claim("Pursuit keeps parents on beside their children",
          "absorb", "absorbed", "MatchingPursuit", "BatchTopK", "<=", 0.5),
    Claim("Nested prefixes keep children from absorbing parents",
          "absorb", "absorbed", "Matryoshka", "BatchTopK", "<=", 0.5),
    Claim("A polynomial decoder needs no latents for bound pairs", "bind", "fvu", "PolySAE", "TopK", "<=", 0.8),
    Claim("A price per stream keeps private features private", "modalities", "leak", "Crosscoder", "ReLU", "<=", 0.5),
    Claim("Shares tell private from shared features", "modalities", "told_apart", "Crosscoder", "", ">=", 1, 0.9),
    Claim("More features than dimensions are too many for ICA", "zipf", "found", "TopK", "ICA", ">=", 1, 0.2),
)  # fmt: skip
"""What the papers say, written down before any number was seen."""
NEGATIVES = {("absorb", "MatchingPursuit"), ("bind", "PolySAE")}
"""World and core of those that do not show at these settings (docs/compare_cores.md): they stay in the list, but only
another failure than these is news."""


def claims() -> list[Claim]:
    """Those above, and that every core trained by gradients finds more than components and random directions."""
    trained = [name for name, cls in subclasses(SAECore).items() if not cls.gradient_free]
    return [
        *CLAIMS,
        *(Claim(f"{core} finds more than {than}", "zipf", "found", core, than, ">=", 1, 0.2)
          for core in trained for than in ("PCA", "RandomDictionary")),
    ]  # fmt: skip


# ---- what is written


METRICS = ("fvu", "l0", "dead", "matched", "found", "f1", "split", "composed")
SPECIAL = {"tree": ("absorbed", "silent"), "absorb": ("absorbed", "silent"), "modalities": ("leak", "told_apart")}


def short(value: float | None, digits: int = 2) -> str:
    """A number of the tables, without a leading zero."""
    if value is None or math.isnan(value):
        return "–"
    if value in (0, 1):
        return str(int(value))
    return f"{value:.{digits if value < 9.95 else 0}f}".removeprefix("0")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(
    out: Path, results: Results, names: list[str], budgets: dict[str, int], judged: list[Verdict], said: str
) -> None:
    """`table.json`, `table.md` and `compare_cores.png`; `budgets` is the L0 wanted in each world."""
    worlds = list(budgets)
    cells = {metric: {name: {world: results.mean(world, name, metric) for world in worlds} for name in names}
             for metric in (*METRICS, "absorbed", "silent", "leak", "told_apart")}  # fmt: skip
    write_atomic(out / "table.json", json.dumps(cells, indent=1).encode())

    def cell(name: str, world: str, metrics: tuple[str, ...]) -> str:
        l0 = cells["l0"][name][world]
        if l0 is None:
            return "–"
        over = "\\*" if metrics[0] == "fvu" and l0 > 1.2 * budgets[world] else ""
        return " · ".join(short(cells[metric][name][world]) for metric in metrics) + over

    def table(*metrics: str) -> str:
        body = [[name, *(cell(name, world, metrics) for world in worlds)] for name in names]
        return markdown(["core", *worlds], [row for row in body if set(row[1:]) != {"–"}])

    text = [
        f"# Cores on data with known features\n\n{said}\n",
        "FVU ↓ · features found (best cosine above .9) ↑ · F1 of the best latent ↑; \\* where L0 is more than a fifth "
        "above the budget, so that the FVU compares with nothing\n",
        table("fvu", "found", "f1"),
        f"L0 (budget: {', '.join(f'{world} {k}' for world, k in budgets.items())}) · share of dead latents ↓\n",
        table("l0", "dead"),
        "Matched cosine (Hungarian) ↑ · latents per feature (1 is right) · share of composed latents ↓\n",
        table("matched", "split", "composed"),
    ]
    special = [(world, metric) for world in worlds for metric in SPECIAL.get(world, ())]
    if special:
        body = [[name, *(short(cells[metric][name][world], 3) for world, metric in special)] for name in names]
        headings = [f"{world}: {metric.replace('_', ' ')}" for world, metric in special]
        rows = [row for row in body if set(row[1:]) != {"–"}]
        text += ["Hierarchies and modalities\n", markdown(["core", *headings], rows)]
    if judged:
        rows = [[v.mark, v.claim.says, f"{v.claim.world}, {v.claim.metric}", f"{v.claim.core} {short(v.mine)}",
                 f"{v.claim.sign} {v.bound}", v.by_seed] for v in judged]  # fmt: skip
        text += ["Claims\n", markdown(["", "claim", "world, figure", "seen", "wanted", "by seed"], rows)]
    write_atomic(out / "table.md", "\n".join(text).encode())
    plot(out / "compare_cores.png", results, names, worlds)


class Verdict(NamedTuple):
    """A claim and what was seen."""

    claim: Claim
    holds: bool
    mine: float
    other: float
    by_seed: str

    @property
    def bound(self) -> str:
        """What was wanted, in words."""
        claim = self.claim
        if not claim.than:
            return short(claim.margin)
        factor = "" if claim.factor == 1 else f"{short(claim.factor)} × "
        margin = f" + {short(claim.margin)}" if claim.margin else ""
        return f"{factor}{claim.than} {short(self.other)}{margin}"

    @property
    def known(self) -> bool:
        """Whether it is known not to show."""
        return (self.claim.world, self.claim.core) in NEGATIVES

    @property
    def mark(self) -> str:
        """In words."""
        return "shows" if self.holds else "does not show, as documented" if self.known else "does not show"


def judge(results: Results) -> list[Verdict]:
    """The claims whose cores all ran."""
    judged = []
    for claim in claims():
        found = claim.holds(results)
        if found is not None:
            sides = [results.seeds(claim.world, name, claim.metric) for name in (claim.core, claim.than) if name]
            judged.append(Verdict(claim, *found, " against ".join(" ".join(map(short, side)) for side in sides)))
    return judged


TEXT, GRID = "#3f444c", "#d9dbdf"
SERIES = ("#c2410d", "#1f3a5f", "#52749b", "#7a6f5e", "#8f3f6f", "#2f6f62", "#a07d10")


def plot(path: Path, results: Results, names: list[str], worlds: list[str]) -> None:
    """The sparsity-fidelity front on one world, and what share of the features each core finds on each."""
    found = {name: [results.mean(world, name, "found") for world in worlds] for name in names}
    found = {name: row for name, row in found.items() if any(value is not None for value in row)}
    style = {"font.size": 9, "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT}
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, max(4.2, 0.21 * len(found) + 1.5)), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        front(left, results)
        heat(right, found, worlds)
        figure.savefig(path, dpi=150)


def front(axes: Any, results: Results) -> None:
    """FVU over L0, one line per core, named at its right end."""
    axes.set_yscale("log")
    ends = []
    for colour, name in zip(SERIES, FRONT, strict=True):
        points = []
        for scale in sorted((1.0, *FRONT_SCALES)):
            l0, fvu = (results.mean(FRONT_WORLD, name, metric, scale) for metric in ("l0", "fvu"))
            if l0 is not None and fvu is not None:
                points.append((l0, fvu))
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, "-o", color=colour, markersize=4, linewidth=1.6)
            ends.append([math.log(ys[-1]), xs[-1], ys[-1], name, colour])
    axes.set_title(f"Sparsity and fidelity on {FRONT_WORLD}: further down is better", loc="left", fontsize=10)
    axes.set_xlabel("L0 (active latents per row)")
    axes.set_ylabel("FVU (fraction of variance unexplained)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not ends:
        return
    low, high = (math.log(v) for v in axes.get_ylim())
    gap = 0.035 * (high - low)
    ends.sort(key=lambda end: end[0])
    for below, above in pairwise(ends):  # labels do not touch
        above[0] = max(above[0], below[0] + gap)
    edge = max(end[1] for end in ends)
    for y, x, value, name, colour in ends:
        axes.annotate(name, (x, value), (edge * 1.06, math.exp(y)), color=colour, va="center", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5})  # fmt: skip
    axes.set_xlim(right=edge * 1.4)


def heat(axes: Any, found: dict[str, list[float | None]], worlds: list[str]) -> None:
    """Share of features found: cores by worlds, the number in each cell; best on average first."""

    def average(name: str) -> float:
        values = [value for value in found[name] if value is not None]
        return sum(values) / len(values)

    names = sorted(found, key=lambda name: (sum(v is None for v in found[name]), -average(name)))
    axes.imshow([[math.nan if v is None else v for v in found[name]] for name in names], cmap="Blues", vmin=0, vmax=1,
                aspect="auto")  # fmt: skip
    for y, name in enumerate(names):
        for x, value in enumerate(found[name]):
            colour = "white" if value is not None and value > 0.6 else TEXT
            axes.text(x, y, short(value), ha="center", va="center", color=colour, fontsize=7.5)
    axes.set_xticks(range(len(worlds)), worlds)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Share of features found (best cosine above .9), best cores first", loc="left", fontsize=10, pad=10)


def show(results: Results, names: list[str], worlds: list[str], judged: list[Verdict]) -> None:
    """The table and the claims, in the terminal."""
    console = Console()
    console.width = max(console.width, 26 + 12 * len(worlds))  # rather wrapped than cut off
    table = Table(
        title="FVU ↓ and features found ↑, at equal L0", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("core", no_wrap=True)
    for world in worlds:
        table.add_column(world, justify="right", no_wrap=True)
    for name in names:
        cells = [(results.mean(world, name, "fvu"), results.mean(world, name, "found")) for world in worlds]
        if any(fvu is not None for fvu, _ in cells):
            table.add_row(name, *(f"{short(fvu)} {short(found)}" if fvu is not None else "–" for fvu, found in cells))
    console.print(table)
    for v in judged:
        seen = f"{v.claim.world}, {v.claim.metric}: {v.claim.core} {short(v.mine)}, wanted {v.claim.sign} {v.bound}"
        line = f"{v.mark}: {v.claim.says} ({seen})"
        console.print(line, style="" if v.holds or v.known else "bold red", highlight=False)

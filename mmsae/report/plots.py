"""Draws a `Plot` as inline SVG: transparent, labelled at the lines, in colours that follow the page's theme."""

from __future__ import annotations

import html
import io
import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from mmsae.results import Plot

# Each colour is what a viewer without the page's style sheet sees; on the page `var(--plot-*)` replaces it.
TEXT, GRID = "#70757d", "#d9dbdf"
SERIES = ("#c2410d", "#1f3a5f", "#52749b", "#7a6f5e", "#8f3f6f", "#2f6f62")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5)), (0, (9, 2)), (0, (3, 3)))
VARIABLES = {TEXT: "--plot-text", GRID: "--plot-grid"} | {c: f"--plot-{i}" for i, c in enumerate(SERIES, 1)}
SIZE = (5.4, 3.3)  # inches of 72 units
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib, wider than most: what fits in it fits in the page's font
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "text.parse_math": False,  # a $ in a label is a dollar
    "axes.xmargin": 0.01,
}


def draw(plot: Plot, key: str = "plot") -> str:
    """Return the plot as an `<svg>` element, or "" where it has nothing finite to show.

    Args:
        plot: The data.
        key: Different for every plot of a page: it keeps their element ids apart.
    """
    lines = [line for line in (_finite(line, plot) for line in plot.lines) if line]
    if not lines:
        return ""
    with mpl.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        (_heat if plot.kind == "heat" else _chart)(figure.add_subplot(), plot, lines)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), plot)


def _chart(axes: Axes, plot: Plot, lines: list[dict[str, Any]]) -> None:
    """Lines, bars or points."""
    _scales(axes, plot)
    for i, line in enumerate(lines):
        if plot.kind == "bars":
            _bars(axes, line, i, alone=len(lines) == 1)
        elif plot.kind == "points":
            _points(axes, line, i)
        else:
            _line(axes, line, i)
    heights = [v for line in lines for v in line["y"]]
    nothing = all(v == 0 for v in heights)  # a line of zeros would float in the middle of an axis from -0.05
    if (plot.kind == "bars" or nothing) and "y" not in plot.log:
        axes.set_ylim(bottom=0, top=1 if nothing else None)
    _furnish(axes, plot)
    ends = [(line, SERIES[i % len(SERIES)]) for i, line in enumerate(lines)]
    if plot.kind == "points":
        ends = [(line, TEXT) for line in lines if line["rule"]]
    figure = axes.figure
    if len(lines) > 1 and ends and isinstance(figure, Figure):
        figure.draw_without_rendering()  # settles the limits that the labels are placed by
        _label(axes, ends, plot.kind)


def _finite(line: dict[str, Any], plot: Plot) -> dict[str, Any] | None:
    """The line without points that cannot be drawn: missing, infinite, or not positive on a logarithmic axis."""

    def drawable(value: Any, axis: str) -> bool:
        number = isinstance(value, (int, float)) and math.isfinite(value)
        return number and (value > 0 or not axis or axis not in plot.log)

    label, xs, ys = str(line.get("label", "")), list(line.get("x", [])), list(line.get("y", []))
    if plot.kind == "heat":
        kept = [(x, y) for x, y in zip(xs, ys, strict=False) if drawable(y, "")]
        return {"label": label, "x": [str(x) for x, _ in kept], "y": [y for _, y in kept]} if kept else None
    if plot.kind == "bars":
        if "x" in plot.log and len(xs) > 2 and drawable(xs[1], "x") and not drawable(xs[0], "x"):
            xs[0] = xs[1] * xs[1] / xs[2]  # a first edge of zero: as wide as its neighbour
        if len(xs) != len(ys) + 1 or not ys or not all(drawable(x, "x") for x in xs):
            return None
        return {"label": label, "x": xs, "y": [y if drawable(y, "") else 0 for y in ys]}
    points = [(x, y) for x, y in zip(xs, ys, strict=False) if drawable(x, "x") and drawable(y, "y")]
    if not points:
        return None
    rule = bool(line.get("rule"))
    return {"label": label, "x": [x for x, _ in points], "y": [y for _, y in points], "rule": rule}


def _line(axes: Axes, line: dict[str, Any], index: int) -> None:
    colour, dash = SERIES[index % len(SERIES)], DASHES[index % len(DASHES)]
    marker = "o" if len(line["x"]) <= 12 else ""
    axes.plot(line["x"], line["y"], color=colour, linestyle=dash, linewidth=1.8, marker=marker, markersize=3.5)


def _bars(axes: Axes, line: dict[str, Any], index: int, alone: bool) -> None:
    colour = SERIES[index % len(SERIES)]
    if alone:  # a hair of space between the bars
        left, width = line["x"][:-1], [b - a for a, b in pairwise(line["x"])]
        axes.bar(left, line["y"], [0.92 * w for w in width], align="edge", color=colour, linewidth=0)
    else:
        axes.stairs(line["y"], line["x"], color=colour, linewidth=1.8, linestyle=DASHES[index % len(DASHES)])


def _points(axes: Axes, line: dict[str, Any], index: int) -> None:
    if line["rule"]:
        axes.plot(line["x"], line["y"], color=TEXT, linewidth=0.9)
    else:
        axes.plot(line["x"], line["y"], "o", color=SERIES[index % len(SERIES)], markersize=2.6, alpha=0.5, mew=0)


def _heat(axes: Axes, plot: Plot, lines: list[dict[str, Any]]) -> None:
    """Cells, stronger where the value is larger; one colour over the paper, so that they follow the theme."""
    columns = list(dict.fromkeys(x for line in lines for x in line["x"]))
    values = [v for line in lines for v in line["y"]]
    low, span = min(values), (max(values) - min(values)) or 1.0
    for i, line in enumerate(lines):
        for x, y in zip(line["x"], line["y"], strict=True):
            j = columns.index(x)
            shade = 0.04 + 0.56 * (y - low) / span
            axes.add_patch(Rectangle((j - 0.49, i - 0.48), 0.98, 0.96, color=SERIES[0], alpha=shade, linewidth=0))
            if len(columns) <= 8 and len(lines) <= 12:
                axes.text(j, i, f"{y:.2f}".replace("-", "−"), ha="center", va="center", fontsize=9)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(lines)), [line["label"] for line in lines])
    _furnish(axes, plot)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", which="major", length=0)


def _scales(axes: Axes, plot: Plot) -> None:
    """Linear or logarithmic axes; a logarithmic one over at most a decade or two also names 2 and 5."""
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name in plot.log:
            (axes.set_xscale if name == "x" else axes.set_yscale)("log")
            values = [v for line in plot.lines for v in line.get(name, []) if isinstance(v, (int, float)) and v > 0]
            narrow = bool(values) and max(values) < 30 * min(values)
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=7))
            axis.set_minor_formatter(NullFormatter())
        else:
            axis.set_major_locator(MaxNLocator(6 if name == "x" else 5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(tick))


def tick(value: float, _: int | None = None) -> str:
    """A short number for an axis: 20k, 0.05, 10⁻⁴."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        mantissa = f"{value / 10.0**exponent:.3g}"
        power = f"10{str(exponent).translate(SUPERSCRIPT)}"
        return power if mantissa == "1" else f"{mantissa}·{power}".replace("-", "−")
    short = f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:.4g}"
    return short.replace("-", "−")


def _furnish(axes: Axes, plot: Plot) -> None:
    """Thin rules, and the labels where eyes land: the vertical one above its axis, the horizontal one at its end."""
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_linewidth(0.8)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=TEXT, length=0, pad=5)
    axes.tick_params(axis="x", which="major", length=4, width=0.8, pad=4)
    axes.set_title(plot.y, loc="left", fontsize=10, color=TEXT, pad=9)
    axes.set_xlabel(plot.x, loc="right", fontsize=10, color=TEXT, labelpad=5)


def _label(axes: Axes, named: list[tuple[dict[str, Any], str]], kind: str) -> None:
    """Name every line, in its colour, at its right end, moved apart where the ends are close."""
    gap = 14 / (axes.bbox.height * 72 / axes.figure.dpi)  # of the axes' height
    ends: list[list[Any]] = []  # [height, index], to be moved
    for i, (line, _) in enumerate(named):
        y = max(line["y"]) if kind == "bars" else line["y"][-1]
        ends.append([axes.transAxes.inverted().transform(axes.transData.transform((line["x"][-1], y)))[1], i])
    ends.sort(key=lambda end: (end[0], end[1]))
    for below, above in pairwise(ends):
        above[0] = max(above[0], below[0] + gap)
    over = max(0.0, ends[-1][0] - 1)
    for end in ends:
        end[0] -= over
    for above, below in pairwise(reversed(ends)):
        below[0] = min(below[0], above[0] - gap)
    for y, i in ends:
        line, colour = named[i]
        axes.annotate(
            line["label"], (1, y), (8, 0), "axes fraction", "offset points",
            color=colour, va="center", annotation_clip=False,
        )  # fmt: skip


def _for_page(svg: str, plot: Plot) -> str:
    """Make it part of a page: no prologue, colours and font of the page, named for those who cannot see it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)  # it would restyle the whole page
    svg = re.sub(r'<(g|svg|rect) id="[^"]*"', r"<\1", svg)  # figure_1, axes_1: the same in every plot
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"font(-family)?: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font\1: \2inherit", svg)
    svg = re.sub("|".join(VARIABLES), lambda m: f"var({VARIABLES[m[0]]}, {m[0]})", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", _hundredths, tag[0]), svg)  # not in what is read
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    size = re.search(r'viewBox="([^"]*)"', svg)
    assert size is not None
    name = html.escape(f"{plot.title} ({plot.y} over {plot.x})", quote=True)
    head = f'<svg viewBox="{size[1]}" role="img" aria-label="{name}">'
    svg = head + svg[svg.index(">") + 1 :]
    return re.sub(r">\s+<", "><", svg).strip()


def _hundredths(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}"

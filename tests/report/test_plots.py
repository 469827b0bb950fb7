import re
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from mmsae.report.plots import draw, tick
from mmsae.report.tables import grid, number
from mmsae.results import Plot, Table


def line(y, label="", x=None):
    return {"label": label, "x": list(range(len(y))) if x is None else x, "y": y}


def texts(svg):
    return [t.text for t in ElementTree.fromstring(svg.replace("xlink:", "")).iter() if t.tag.endswith("text")]


def test_plot_names_axes_and_lines():
    svg = draw(Plot("Falls", "step", "FVU (share)", [line([3, 2, 1], "train"), line([3, 2.5, 1.01], "validation")]))
    assert {"step", "FVU (share)", "train", "validation"} <= set(texts(svg))
    assert 'aria-label="Falls (FVU (share) over step)"' in svg
    assert "var(--plot-1" in svg
    assert "#c2410d;" not in svg  # every colour follows the theme


def test_labels_of_lines_that_end_together_stay_apart():
    svg = draw(Plot("", "x", "y", [line([1, 2, 3 + i / 1e6], f"line {i}") for i in range(4)]))
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>line \d', svg))
    assert len(heights) == 4
    assert min(b - a for a, b in pairwise(heights)) > 10


@pytest.mark.parametrize("log", ["", "x", "y", "xy"])
@pytest.mark.parametrize("y", [[float("nan"), 1, 2], [0, -1, 5], [None, float("inf"), 3]])
def test_what_cannot_be_drawn_is_left_out(y, log):
    assert "nan" not in draw(Plot("", "x", "y", [line(y, x=[1, 2, 3])], log=log))


@pytest.mark.parametrize("lines", [[], [line([])], [line([float("nan")])]])
def test_nothing_to_draw(lines):
    assert draw(Plot("", "x", "y", lines)) == ""


def test_bars_from_zero_on_a_logarithmic_axis():
    bars = Plot("", "density", "latents", [line([3, 5, 1], x=[0, 1e-3, 1e-2, 1e-1])], kind="bars", log="x")
    assert {"density", "latents", "0.01"} <= set(texts(draw(bars)))


def test_plots_share_no_ids_and_leave_settings_alone():
    before = dict(mpl.rcParams)
    plots = [draw(Plot("", "x", "y", [line([1, 2])]), key=key) for key in ("a", "b")]
    first, second = (set(re.findall(r'id="([^"]*)"', svg)) for svg in plots)
    assert first
    assert not first & second
    assert dict(mpl.rcParams) == before


def test_ticks_are_short():
    assert [tick(v) for v in (0, 0.05, 20000, 1e-4, 2.5e-5, -3)] == ["0", "0.05", "20k", "10⁻⁴", "2.5·10⁻⁵", "−3"]


def test_numbers_keep_three_digits():
    assert [number(v) for v in (0.03125, 12000, 12.34, 1.5e-6, None, float("nan"), "text")] == [
        "0.0312", "12,000", "12.3", "1.50e−06", "–", "–", "text",
    ]  # fmt: skip


def test_best_of_a_column_is_marked_where_its_heading_says_what_good_is():
    rows = [["a", 0.5, 0.2, 3], ["b", 0.75, None, 4], ["c", 0.1, 0.12, 5]]
    table = grid(Table("t", ["method", "F1 ↑", "FVU ↓", "rows"], rows))
    assert [[c.best for c in row] for row in table.rows] == [
        [False, False, False, False], [False, True, False, False], [False, False, True, False],
    ]  # fmt: skip
    assert [row[1].text for row in table.rows] == ["0.500", "0.750", "0.100"]
    assert [c.numeric for c in table.columns] == [False, True, True, True]


def test_short_and_long_rows_fit_their_table():
    table = grid(Table("", ["a", "b"], [[1], [1, 2, 3]]))
    assert [[c.text for c in row] for row in table.rows] == [["1", "–"], ["1", "2"]]


def test_dollar_in_a_label_is_a_dollar():
    assert "cost in $ per $" in texts(draw(Plot("", "cost in $ per $", "y", [line([1, 2])])))


def test_a_line_of_zeros_lies_on_the_axis_and_shows_no_negative_ticks():
    svg = draw(Plot("none died", "step", "share", [{"label": "dead", "x": [1, 2, 3], "y": [0, 0, 0]}]))
    assert "−0" not in svg
    assert "-0.0" not in re.sub(r"<path[^>]*>", "", svg)


def test_a_cell_of_zero_is_drawn_as_every_other():
    rows = [{"label": name, "x": ["a", "b"], "y": values} for name, values in (("a", [1.0, 0.0]), ("b", [0.0, 1.0]))]
    assert sum(text == "0.00" for text in texts(draw(Plot("confusion", "x", "y", rows, kind="heat")))) == 2

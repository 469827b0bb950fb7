"""Turns the plain data of results into what the template prints: numbers, tables, headline items."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mmsae.results import Result, Table

# Shown on top where no result brings headline items of its own.
KNOWN = {"fvu": "FVU", "explained_variance": "Explained variance", "l0": "L0", "dead_fraction": "Dead latents"}
BETTER = {"↑": max, "↓": min}
MISSING = "–"


class Cell(NamedTuple):
    """One entry of a table.

    Attributes:
        text: What is read.
        order: What the column is sorted by.
        best: Whether it is the best of its column.
    """

    text: str
    order: float | str | None
    best: bool


class Column(NamedTuple):
    """A heading.

    Attributes:
        name: The heading as the analysis wrote it.
        numeric: Whether all entries are numbers, which are set to the right.
    """

    name: str
    numeric: bool


class Grid(NamedTuple):
    """A table, ready to print."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]


class Headline(NamedTuple):
    """A number to lead with, and its baseline in words."""

    label: str
    value: str
    note: str


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number; a flag is not one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """Three significant digits, thousands apart: 12,000 and 0.0312."""
    if not is_number(value):
        return MISSING if value is None or isinstance(value, float) else plain(value)
    if isinstance(value, int) or (abs(value) >= 1000 and value == int(value)):
        return f"{int(value):,}".replace("-", "−")
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}".replace("-", "−")
    decimals = 2 if not value else min(6, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def plain(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, str):
        return value
    if is_number(value):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, (list, tuple)) and not any(isinstance(v, (dict, list, tuple)) for v in value):
        return ", ".join(plain(v) for v in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def grid(table: Table) -> Grid:
    """Format a table column by column: one number of decimals each, the best entry marked.

    A heading that ends in ↑ or ↓ says which entries are good; the best of such a column is marked.
    """
    width = len(table.columns)
    rows = [[*row[:width], *[None] * (width - len(row))] for row in table.rows]
    columns, cells = [], []
    for name, entries in zip(table.columns, zip(*rows, strict=True) if rows else [()] * width, strict=True):
        present = [e for e in entries if e is not None]
        numeric = bool(present) and all(isinstance(e, (int, float)) for e in present)
        columns.append(Column(str(name), numeric))
        cells.append(_column(str(name), entries, numeric))
    return Grid(table.title, columns, [list(row) for row in zip(*cells, strict=True)])


def _column(name: str, entries: Sequence[Any], numeric: bool) -> list[Cell]:
    if not numeric:
        return [Cell(MISSING, None, False) if e is None else Cell(plain(e), plain(e), False) for e in entries]
    values = [e for e in entries if is_number(e)]
    better = BETTER.get(name.strip()[-1:])
    best = better(values) if better and len(values) > 1 else None
    texts = _aligned(values)
    return [Cell(texts[e], e, e == best) if is_number(e) else Cell(MISSING, None, False) for e in entries]


def _aligned(values: list[float]) -> dict[float, str]:
    """The values with the same number of decimals, so that their points stand below each other."""
    large = max((abs(v) for v in values), default=0)
    small = min((abs(v) for v in values if v), default=1)
    if all(float(v).is_integer() for v in values):
        return {v: number(int(v)) for v in values}
    if small < 1e-4 * large or small < 1e-4:
        return {v: number(v) for v in values}
    decimals = min(5, max(1, 2 - math.floor(math.log10(large))))
    return {v: f"{v:,.{decimals}f}".replace("-", "−") for v in values}


def headlines(results: Iterable[Result]) -> list[Headline]:
    """The items under `settings["headline"]` of all results, or else the well-known numbers."""
    results = list(results)
    items = [item for r in results for item in r.settings.get("headline") or []]
    found = [
        Headline(
            str(i.get("label", "")),
            i["value"] if isinstance(i.get("value"), str) else number(i.get("value")),
            str(i.get("note") or ""),
        )
        for i in items
    ]
    if found:
        return found
    numbers = [(k, v) for r in results for k, v in r.numbers.items()]
    return [Headline(KNOWN[k], number(v), "") for k, v in numbers if k in KNOWN]


def fine_print(result: Result) -> list[tuple[str, str]]:
    """All numbers and settings of a result, for whoever opens the small print."""
    numbers = [(name, number(value)) for name, value in result.numbers.items()]
    settings = [(name, plain(value)) for name, value in result.settings.items() if name != "headline"]
    return numbers + settings

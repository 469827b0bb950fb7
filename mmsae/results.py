"""What analyses give back: plain data, drawn by the terminal and the page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmsae.errors import MmsaeError
from mmsae.files import write_atomic


@dataclass
class Table:
    """Rows to print and to draw: `columns` holds the headings, a row one entry (text, number or None) per heading."""

    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]


@dataclass
class Plot:
    """Lines, bars, points or cells over common axes; a line is `{"label": str, "x": [...], "y": [...]}`.

    Attributes:
        title: The finding, in words.
        x: Label and unit of the horizontal axis.
        y: Label and unit of the vertical axis.
        lines: The data.
        kind: "line"; "bars" (`x` then holds the left edges and one more at the end); "points" (a line with `"rule":
            True` is drawn as a thin line for comparison); or "heat" (a line is a row of cells, `x` names the columns).
        log: Axes drawn on a logarithmic scale: "", "x", "y" or "xy".
    """

    title: str
    x: str
    y: str
    lines: list[dict[str, Any]]
    kind: str = "line"
    log: str = ""


@dataclass
class Picture:
    """A picture on the page.

    Attributes:
        title: What it shows, above it.
        source: The picture as the address of itself (`data:image/…`).
        text: What it shows, for who cannot see it.
    """

    title: str
    source: str
    text: str = ""


@dataclass
class Result:
    """Numbers, tables and plots of one analysis; plain data, so that a report can be drawn again from files.

    Attributes:
        name: The analysis.
        title: What it found, for a heading.
        numbers: Flat name to value.
        tables: For the terminal and the page.
        plots: For the page.
        latents: One entry per latent shown on the page (see `TopExamples`).
        media: Pictures and texts that `latents` point to.
        settings: Arguments of the analysis and the size of what it saw.
        pictures: For the page, in front of plots and tables.
    """

    name: str
    title: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    latents: list[dict[str, Any]] = field(default_factory=list)
    media: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)

    def save(self, folder: Path) -> Path:
        """Write `<folder>/<name>.json`, whole or not at all."""
        path = folder / f"{self.name}.json"
        write_atomic(path, json.dumps(asdict(self)).encode())
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` wrote."""
        try:
            raw = json.loads(path.read_text())
            raw["tables"] = [Table(**t) for t in raw["tables"]]
            raw["plots"] = [Plot(**p) for p in raw["plots"]]
            raw["pictures"] = [Picture(**p) for p in raw.get("pictures", [])]
            return cls(**raw)
        except (OSError, ValueError, TypeError, KeyError) as error:
            said = f"{path} is not a result of mmsae evaluate ({error}); run mmsae evaluate again."
            raise MmsaeError(said) from error

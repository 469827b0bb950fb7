"""Writes the report: one HTML file with everything in it, drawn from results alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mmsae.errors import MmsaeError
from mmsae.files import write_atomic
from mmsae.report.gallery import embed, pack
from mmsae.report.plots import draw
from mmsae.report.tables import fine_print, grid, headlines

if TYPE_CHECKING:
    from mmsae.results import Result

HERE = Path(__file__).parent
KINDS = ("image", "text", "audio", "signal", "diffusion")
SCRIPTS = ("draw.js", *(f"draw_{kind}.js" for kind in KINDS), "gallery.js", "page.js")  # one scope, in this order


def write_report(results: Sequence[Result], path: Path, title: str, facts: dict[str, str]) -> Path:
    """Write a page that opens anywhere: no server, no network, no fonts to fetch.

    Args:
        results: What the analyses found, in the order of the page; their latents come last, in one gallery.
        path: The file to write, whole or not at all.
        title: The page's heading.
        facts: What the reader needs to know first, such as model, hook point and date.
    """
    if not results:
        raise MmsaeError(f"There is no result to draw in {path}; run mmsae evaluate first.")
    write_atomic(path, render(results, title, facts).encode())
    return path


def render(results: Sequence[Result], title: str, facts: dict[str, str]) -> str:
    """Return the page as text; the same results give the same text."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["bound"] = lambda text: text.replace(" %", "\u00a0%")  # no line starts with a unit
    gallery = pack(results)
    return environment.get_template("template.html").render(
        title=title,
        facts={name: str(value) for name, value in facts.items()},
        headlines=headlines(results),
        sections=[section for i, r in enumerate(results) if (section := _section(r, i))],
        gallery=gallery,
        data=Markup(embed(gallery)),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup("\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)),
    )


def _section(result: Result, index: int) -> dict[str, Any] | None:
    """What the template shows of one result; None for one that only brings latents."""
    drawn = [(p.title, Markup(draw(p, f"{index}-{j}-{p.title}"))) for j, p in enumerate(result.plots)]
    tables = [grid(table) for table in result.tables]
    pictures = [p for p in result.pictures if p.source.startswith("data:image/")]  # nothing that has to be fetched
    if result.latents and not drawn and not tables and not pictures:
        return None
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", result.name)
    name = name if name.isupper() else name.capitalize()
    return {
        "id": f"section-{index}",
        "name": name,
        "title": result.title or name,
        "plots": [(caption, svg) for caption, svg in drawn if svg],
        "tables": tables,
        "pictures": pictures,
        "fine_print": fine_print(result),
    }

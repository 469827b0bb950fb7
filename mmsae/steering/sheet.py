"""Pictures side by side with headings: what a person judges a steering by."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmsae.errors import MmsaeError
from mmsae.results import Picture
from mmsae.steering.picture_judge import to_pil

INK, PAPER, SOFT = (28, 30, 33), (255, 255, 255), (95, 101, 110)


def sheet(
    pictures: Sequence[Sequence[Tensor]],
    columns: Sequence[str],
    rows: Sequence[str],
    title: str = "",
    side: int = 96,
) -> Image.Image:
    """A table of pictures.

    Args:
        pictures: By row and column, each `[3, H, W]` in 0..1.
        columns: Headings of the columns.
        rows: Headings of the rows.
        title: Above all.
        side: Pixels of a cell: smaller pictures are enlarged without smoothing, larger ones are reduced.
    """
    if len(pictures) != len(rows) or any(len(row) != len(columns) for row in pictures):
        raise MmsaeError(f"a sheet of {len(rows)} rows and {len(columns)} columns needs as many pictures.")
    font, large = ImageFont.load_default(13), ImageFont.load_default(16)
    left = 12 + max((int(font.getlength(text)) for text in rows), default=0)
    headings = [wrapped(text, side, font) for text in columns]
    lines = max((text.count("\n") + 1 for text in headings), default=1)
    top, gap = (34 if title else 8) + 6 + 16 * lines, 4
    width = max(left + len(columns) * (side + gap), int(large.getlength(title)) + 16 if title else 0) + 4
    page = Image.new("RGB", (width, top + len(rows) * (side + gap) + 4), PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((8, 8), title, INK, large)
    for j, text in enumerate(headings):
        at = (left + j * (side + gap) + side / 2, top - 4)
        pen.multiline_text(at, text, SOFT, font, anchor="md", align="center")
    for i, row in enumerate(pictures):
        y = top + i * (side + gap)
        pen.text((8, y + side / 2), rows[i], SOFT, font, anchor="lm")
        for j, picture in enumerate(row):
            image = to_pil(picture[None])[0]
            way = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            page.paste(
                image.resize((side, round(side * image.height / image.width)), way), (left + j * (side + gap), y)
            )
    return page


def wrapped(text: str, width: float, font: Any) -> str:
    """The text in lines that are not wider than a cell, where its words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def inline(image: Image.Image, title: str, text: str = "", quality: int = 90) -> Picture:
    """A picture for the page, inside of it."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality)
    return Picture(title, "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(), text)

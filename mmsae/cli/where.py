"""Positions by name, for the command line."""

from __future__ import annotations

import re
from collections.abc import Callable

from mmsae.errors import MmsaeError
from mmsae.steering.where import Between, Box, Generated, ImageTokens, Where

NAMED: dict[str, Callable[[], Where]] = {
    "generated": Generated, "prompt": lambda: ~Generated(), "image": ImageTokens, "words": lambda: ~ImageTokens(),
}  # fmt: skip


def where_of(text: str) -> Where | None:
    """Read `generated`, `prompt & ~image`, `positions:2-5`, `box:0,0,0.5,1` …; None for `all`."""
    found: Where | None = None
    for part in text.split("&"):
        one = _one(part.strip(), text)
        if one is not None:
            found = one if found is None else found & one
    return found


def _one(part: str, text: str) -> Where | None:
    if part == "all":
        return None
    if part.startswith("~"):
        inner = _one(part[1:].strip(), text)
        if inner is None:
            raise MmsaeError(f"--where={text}: ~all is nowhere.")
        return ~inner
    if part in NAMED:
        return NAMED[part]()
    if places := re.fullmatch(r"positions:(\d+)(?:-(\d+)?)?", part):
        first = int(places[1])
        last = None if part.endswith("-") else int(places[2] or first)
        return Between(first, last)
    if part.startswith("box:"):
        try:
            edges = [float(v) for v in part.removeprefix("box:").split(",")]
        except ValueError:
            edges = []
        if len(edges) == 4:
            return Box(edges[0], edges[1], edges[2], edges[3])
    raise MmsaeError(
        f"--where={text}: {part!r} is none of all, {', '.join(NAMED)}, positions:FIRST-LAST, box:TOP,LEFT,BOTTOM,RIGHT."
    )

"""The one kind of error that is meant for the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

Number = TypeVar("Number", int, float)


class MmsaeError(Exception):
    """A sentence for the user: the thing, its value and the way out. The command line prints it without a traceback."""


def checked(name: str, value: Number, low: float, high: float = float("inf")) -> Number:
    """Return `value` if `low <= value <= high`, else raise a sentence naming the argument and the allowed range."""
    if not low <= value <= high:
        allowed = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise MmsaeError(f"{name}={value:g} is out of range: it must be {allowed}.")
    return value


def nearest(name: str, known: Iterable[str], n: int = 5) -> str:
    """The known names closest to `name`, for a sentence such as "no module 'bloks.0'; nearest: blocks.0"."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=n, cutoff=0.5)
    if not close:
        close = names if len(names) <= 3 * n else [*names[: 3 * n], f"and {len(names) - 3 * n} more"]
    return ", ".join(close)

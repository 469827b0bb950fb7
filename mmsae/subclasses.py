"""Finding a class by its name: the imported subclasses of a base are the registry."""

from __future__ import annotations

import inspect
from typing import TypeVar

from mmsae.errors import MmsaeError, nearest

T = TypeVar("T")


def subclasses(base: type[T]) -> dict[str, type[T]]:
    """Concrete imported subclasses by name; ours come first where a name is taken twice."""
    found: dict[str, type[T]] = {}
    queue = [base]
    while queue:
        for cls in queue.pop().__subclasses__():
            queue.append(cls)
            public = not cls.__name__.startswith("_") and not inspect.isabstract(cls)
            if public and (cls.__name__ not in found or cls.__module__.startswith("mmsae.")):
                found[cls.__name__] = cls
    return dict(sorted(found.items()))


def find_subclass(base: type[T], name: str) -> type[T]:
    """The subclass of that name, or a sentence with the nearest ones."""
    known = subclasses(base)
    if name not in known:
        raise MmsaeError(
            f"{name!r} is no imported {base.__name__}; nearest: {nearest(name, known)}. "
            "Import the module that defines it first."
        )
    return known[name]

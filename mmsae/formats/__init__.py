"""Foreign checkpoint formats: one file each, with `recognises` and `load`, some also `export`, `ask` and `about`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mmsae.cores import SAECore
from mmsae.errors import MmsaeError, nearest
from mmsae.formats import (
    dictionary_learning,
    gemma_scope,
    llamascopium,
    openai,
    prisma,
    released,
    saelens,
    saev,
    sparsify,
    vl_sae,
)
from mmsae.formats.tensors import read_pickle

READ: dict[str, ModuleType] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope,
    "llamascopium": llamascopium,
    "prisma": prisma,
    "openai": openai,
    "saev": saev,
    "released": released,
    "vl_sae": vl_sae,
}
"""Formats that can be read; where files fit two of them, the first is taken."""

WRITTEN = {name: module for name, module in READ.items() if hasattr(module, "export")}

__all__ = ["READ", "WRITTEN", "detect", "export", "load"]


def detect(path: str | Path) -> str:
    """Name of the format that a folder, or file, is in.

    Raises:
        MmsaeError: It does not exist, or is in none of the known formats.
    """
    path = Path(path)
    if not path.exists():
        raise MmsaeError(f"{path} does not exist: give the folder of a dictionary, or its file.")
    for name, module in READ.items():
        if module.recognises(path):
            return name
    inside = [child.name for child in sorted(path.iterdir()) if _recognised(child)] if path.is_dir() else []
    if inside:
        raise MmsaeError(f"{path} holds several dictionaries, so give one of its folders: {nearest('', inside)}.")
    if path.suffix in (".pt", ".pth"):
        read_pickle(path)  # may say that it is refused
    raise MmsaeError(f"{path} is in no format that is known here; known: {', '.join(READ)}.")


def _recognised(path: Path) -> bool:
    return any(module.recognises(path) for module in READ.values())


def load(path: str | Path, name: str | None = None) -> SAECore:
    """A dictionary of another library, in `eval` mode and float32.

    Args:
        path: Its folder, or its file.
        name: Format; None finds it by the files.

    Raises:
        MmsaeError: It cannot be read, or has no core here.
    """
    name = name or detect(path)
    try:
        return _known(name, READ).load(Path(path))
    except (AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        # whatever else a config may hold where something different belongs
        raise MmsaeError(f"{path} is no dictionary that {name} writes ({type(error).__name__}: {error}).") from error


def export(core: SAECore, path: str | Path, name: str, metadata: dict[str, Any] | None = None) -> Path:
    """Write a dictionary for another library.

    Args:
        core: A folded core: it takes raw activations.
        path: Folder to write.
        name: Format.
        metadata: `model_name` and `hook_name`, as far as they are known.

    Returns:
        The folder.
    """
    write: Callable[..., Path] = _known(name, WRITTEN).export
    return write(core, Path(path), metadata)


def _known(name: str, modules: dict[str, ModuleType]) -> ModuleType:
    if name not in modules:
        raise MmsaeError(f"there is no format {name!r}; known: {', '.join(modules)}.")
    return modules[name]

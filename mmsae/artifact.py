"""A trained dictionary on disk: `config.json` beside `sae.safetensors`, no pickle, enough to load it anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

import mmsae
from mmsae import cores  # noqa: F401  (its imports are the registry)
from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError
from mmsae.subclasses import find_subclass

FORMAT = 2
CONFIG = "config.json"
WEIGHTS = "sae.safetensors"


def _encoder_rows(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Format 2 holds `W_enc` latent by latent, as `W_dec`."""
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].t().contiguous()


MIGRATIONS: dict[int, Callable[[dict[str, Any], dict[str, Tensor]], None]] = {1: _encoder_rows}
"""Format number to the function that lifts a description and its tensors (if they are wanted) to the next, in place."""


def save(core: SAECore, folder: str | Path, **description: Any) -> Path:
    """Write a trained dictionary, whole or not at all.

    Args:
        core: A folded core: it takes raw activations (`SAEModule.export` gives one).
        folder: Where to; an older artifact there is replaced.
        description: JSON to keep beside it, by convention `activations` (model, revision, hook point, data, what was
            folded), `training` (rows, seed) and `metrics`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    weights = save_tensors({name: t.detach().cpu().contiguous() for name, t in core.state_dict().items()})
    config = {
        "format": FORMAT,
        "mmsae": mmsae.__version__,
        "core": type(core).__name__,
        "config": core.config,
        **description,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    return write_folder(folder, {WEIGHTS: weights, CONFIG: json.dumps(config, indent=1).encode()}, mark=CONFIG)


def write_folder(folder: Path, files: Mapping[str, bytes], mark: str) -> Path:
    """Write a folder of files whole or not at all.

    Args:
        folder: Where to; an older one is replaced, and stays where it is if anything fails.
        files: Their names and contents.
        mark: A folder without a file of this name is somebody else's and is not replaced.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / mark).is_file() or not any(folder.iterdir()))):
        raise MmsaeError(f"{folder} exists and holds something else than a dictionary: choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = part.with_name(part.name + "-old")
    try:
        for name, data in files.items():
            (part / name).write_bytes(data)
        os.chmod(part, 0o755)  # mkdtemp is private; an artifact is to be shared
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(part, folder)
        except BaseException:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def find(path: str | Path) -> Path:
    """The artifact's folder from itself, from a run folder, or from a hub id `owner/name[/subfolder]`."""
    folder = Path(path)
    for candidate in (folder, folder / "sae"):
        if (candidate / CONFIG).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    if folder.exists():
        raise MmsaeError(
            f"{folder} holds no trained dictionary ({CONFIG} and {WEIGHTS}): give a run or its sae folder."
        )
    parts = str(path).split("/")
    if len(parts) < 2 or str(path).startswith((".", "/", "~")):
        raise MmsaeError(f"{folder} does not exist: give a run folder, its sae folder, or a hub id owner/name.")
    return _download("/".join(parts[:2]), "/".join(parts[2:]))


def _download(repository: str, subfolder: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MmsaeError(
            f"{repository} is no local folder; to load it from the hub: pip install huggingface_hub"
        ) from error
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        root = snapshot_download(repository, allow_patterns=[f"{prefix}{CONFIG}", f"{prefix}{WEIGHTS}"])
    except Exception as error:
        raise MmsaeError(
            f"{repository} is neither a local folder nor a repository that can be downloaded from here "
            f"({type(error).__name__}): check the name and the connection, or give a local path."
        ) from error
    return find(Path(root) / subfolder)


def describe(path: str | Path) -> dict[str, Any]:
    """The checked and migrated `config.json`."""
    return _migrated(path, {})


def _migrated(path: str | Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    file = find(path) / CONFIG
    try:
        raw = json.loads(file.read_text())
        number = raw["format"]
        if number > FORMAT:
            raise MmsaeError(f"{file} has format {number}, newer than the {FORMAT} known here: update mmsae.")
        while number < FORMAT:
            MIGRATIONS[number](raw, tensors)
            number += 1
        _ = raw["core"], raw["config"], raw["sha256"]
        return raw
    except (ValueError, KeyError, TypeError) as error:
        raise MmsaeError(f"{file} is not a dictionary of mmsae ({type(error).__name__}: {error}).") from error


def identity(path: str | Path) -> dict[str, Any]:
    """Class, arguments and checksum of the weights: what tells one dictionary from another."""
    config = describe(path)
    return {key: config[key] for key in ("core", "config", "sha256")}


def load(path: str | Path) -> SAECore:
    """A trained dictionary in `eval` mode; it takes raw activations.

    Args:
        path: A run folder, its `sae` folder, or a hub id `owner/name[/subfolder]`.
    """
    config = describe(path)
    file = find(path) / WEIGHTS
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != config["sha256"]:
        raise MmsaeError(f"{file} is damaged: its checksum differs from the one in {CONFIG}.")
    tensors = load_tensors(data)
    config = _migrated(path, tensors)
    cls = find_subclass(SAECore, config["core"])  # type: ignore[type-abstract]
    try:
        core = cls(**config["config"])
        core.load_state_dict(tensors)
    except (TypeError, RuntimeError) as error:
        raise MmsaeError(f"{file} does not fit {config['core']} of this version of mmsae: {error}") from error
    return core.eval().requires_grad_(False)

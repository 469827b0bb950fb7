"""What a checkpoint carries so that resuming is exact, and cannot resume the wrong thing."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mmsae.cores import SAECore
from mmsae.errors import MmsaeError


def describe(cores: Mapping[str, SAECore]) -> dict[str, dict[str, Any]]:
    """Class and arguments of every core, as JSON."""
    return {name: {"class": type(c).__name__, "config": json.loads(json.dumps(c.config))} for name, c in cores.items()}


def check_description(checkpoint: dict[str, Any], now: dict[str, dict[str, Any]], normalise: str) -> None:
    """Raise unless the checkpoint holds exactly these dictionaries."""
    saved = checkpoint.get("mmsae")
    if saved is None:
        raise MmsaeError("this checkpoint was not written by SAEModule: it says nothing about its dictionary.")
    before = saved["cores"]
    if saved["normalise"] != normalise:
        raise MmsaeError(f"the checkpoint was trained with normalise={saved['normalise']}, not {normalise}.")
    if set(before) != set(now):
        raise MmsaeError(f"the checkpoint holds the dictionaries {sorted(before)}, not {sorted(now)}.")
    for name, entry in now.items():
        if before[name]["class"] != entry["class"]:
            raise MmsaeError(f"the checkpoint holds a {before[name]['class']}, not a {entry['class']}.")
        for key, value in entry["config"].items():
            old = before[name]["config"].get(key)
            if old != value:
                raise MmsaeError(f"the checkpoint was trained with {key}={old}, not {value}: resume with the same.")


def rng_state() -> dict[str, Any]:
    """Of Python, NumPy, torch and CUDA, in types that `weights_only` loading accepts."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Undo `rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))

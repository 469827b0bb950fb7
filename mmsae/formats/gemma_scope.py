"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`): JumpReLU dictionaries of Google DeepMind, read only."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsae.cores import JumpReLU, JumpReLUSkipTranscoder, SAECore
from mmsae.errors import MmsaeError
from mmsae.formats.tensors import check_tensors, fill, read_json, read_safetensors, two_dimensional
from mmsae.spec import TARGET, ActivationSpec

FIRST = "params.npz"
SECOND = "params.safetensors"
CONFIG = "config.json"


def recognises(path: Path) -> bool:
    """Whether a folder is one of Gemma Scope's."""
    return (path / FIRST).is_file() or (path / SECOND).is_file()


def load(folder: str | Path) -> SAECore:
    """A JumpReLU, or JumpReLUSkipTranscoder, from a folder of Gemma Scope, in `eval` mode and float32.

    The files of the first do not say what they are, so names do: dictionaries of the embedding lie in a folder
    `embedding` and are rescaled as their authors say; a repository or folder called transcoder holds those, which get
    a stream `target`. The second has hook points in its `config.json`.

    Args:
        folder: Such as `layer_20/width_16k/average_l0_71`.

    Raises:
        MmsaeError: A file is missing or damaged, or holds several layers.
    """
    folder = Path(folder)
    file = folder / (FIRST if (folder / FIRST).is_file() else SECOND)
    state: dict[str, Any] = _read_npz(file) if file.name == FIRST else read_safetensors(file)
    skips = "affine_skip_connection" in state
    state = {f"W_{name[2:]}" if name.startswith("w_") else name: tensor for name, tensor in state.items()}
    d_in, d_latent = two_dimensional(state, "W_enc", file)
    if isinstance(state.get("W_dec"), Tensor) and state["W_dec"].ndim == 3:
        raise MmsaeError(f"{folder} is a cross-layer transcoder, which writes to several layers: no core here does.")
    d_out = two_dimensional(state, "W_dec", file)[1]
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_latent), "b_enc": (d_latent,), "threshold": (d_latent,), "W_dec": (d_latent, d_out),
        "b_dec": (d_out,),
    }  # fmt: skip
    shapes |= {"affine_skip_connection": (d_in, d_out)} if skips else {}
    tensors = check_tensors(state, shapes, file, "Gemma Scope")
    names = folder.resolve().parts
    if file.name == FIRST and "embedding" in names:  # trained on embeddings times sqrt(d_in)
        tensors["W_enc"] = tensors["W_enc"] / d_in**0.5
        tensors["W_dec"] = tensors["W_dec"] * d_in**0.5
    transcodes = skips or d_in != d_out or _transcodes(folder, names)
    spec = ActivationSpec({"x": d_in, TARGET: d_out} if transcodes else {"x": d_in})
    if skips:
        tensors["W_skip"] = tensors["affine_skip_connection"].t()
    core = (JumpReLUSkipTranscoder if skips else JumpReLU)(spec, d_latent, target_l0=min(32, d_latent))
    return fill(core, tensors, centred=False)


def about(folder: Path) -> dict[str, Any]:
    """`model_name` and `hook_name`, as far as the files tell."""
    if not (folder / CONFIG).is_file():
        return {}
    config = read_json(folder / CONFIG, "Gemma Scope")
    found = {"model_name": config.get("model_name"), "hook_name": config.get("hf_hook_point_in")}
    return {key: value for key, value in found.items() if value}


def _transcodes(folder: Path, names: tuple[str, ...]) -> bool:
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG, "Gemma Scope")
        architecture = config.get("architecture")
        if architecture not in (None, "jump_relu"):
            raise MmsaeError(f"{folder} has the architecture {architecture!r}; known here: jump_relu.")
        if "hf_hook_point_in" in config and "hf_hook_point_out" in config:
            return config["hf_hook_point_in"] != config["hf_hook_point_out"]
    return any("transcoder" in name for name in names if "gemma-scope" in name or name.startswith("transcoder"))


def _read_npz(file: Path) -> dict[str, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as data:
            return {name: torch.from_numpy(data[name]) for name in data}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise MmsaeError(f"{file} is damaged, or holds other than plain arrays ({error}).") from error

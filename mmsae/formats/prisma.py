"""ViT-Prisma: `config.json` beside `weights.pt`, or one file `.pt` with both; read only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmsae.cores import Gated, JumpReLUSkipTranscoder, LinearCore, ReLU, SAECore, SkipTranscoder, TopK
from mmsae.errors import MmsaeError
from mmsae.formats import tensors as shared
from mmsae.spec import TARGET, ActivationSpec

CONFIG = "config.json"
WEIGHTS = "weights.pt"
ACTIVATIONS = {"standard": ("relu", "topk"), "gated": ("relu",)}


def recognises(path: Path) -> bool:
    """Whether a folder, or file, is one of ViT-Prisma's."""
    if path.is_file():
        beside = path.name == WEIGHTS and (path.parent / CONFIG).is_file()
        return beside or (path.suffix == ".pt" and {"cfg", "state_dict"} <= shared.pickle_names(path))
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def load(path: str | Path) -> SAECore:
    """A dictionary of ViT-Prisma, in `eval` mode and float32.

    "standard" becomes ReLU or TopK, "gated" Gated; a transcoder gets a stream `target`, and with a skip connection
    becomes SkipTranscoder ("topk") or JumpReLUSkipTranscoder ("relu", with thresholds of 0).

    Args:
        path: Folder with `config.json` and `weights.pt`, or a file. Files in which the config is an object of theirs
            are refused, as any pickle of other things than tensors.

    Raises:
        MmsaeError: A file is missing, damaged or unsafe, normalises each row (ViT-Prisma's default), or has no core.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    state = shared.read_pickle(file)
    config = state.get("cfg")
    if not isinstance(config, dict):
        config = shared.read_json(file.parent / CONFIG, "ViT-Prisma")
    state = dict(state["state_dict"]) if isinstance(state.get("state_dict"), dict) else state
    normalisation = config.get("normalize_activations", "layer_norm")
    if normalisation in ("layer_norm", "constant_norm_rescale"):
        raise MmsaeError(
            f"{path} expects normalize_activations={normalisation!r}, which {shared.per_row(normalisation)}, "
            f"and set it to 'none' in {CONFIG} to read the dictionary of such rows."
        )
    architecture, activation = config.get("architecture", "standard"), config.get("activation_fn_str", "relu")
    if activation not in ACTIVATIONS.get(architecture, ()):
        known = "; ".join(f"{name} with {', '.join(fits)}" for name, fits in ACTIVATIONS.items())
        raise MmsaeError(f"{path} is {architecture!r} with the activation {activation!r}; known here: {known}.")

    transcodes = bool(config.get("is_transcoder"))
    skips = transcodes and bool(config.get("transcoder_with_skip_connection", True))
    d_in, d_latent = shared.two_dimensional(state, "W_enc", file)
    d_in = shared.whole(config, "d_in", file) if "d_in" in config else d_in
    d_out = shared.whole(config, "d_out", file) if transcodes and "d_out" in config else d_in
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_latent), "b_enc": (d_latent,), "W_dec": (d_latent, d_out), "b_dec": (d_in,)
    }  # fmt: skip
    shapes |= {"b_dec_out": (d_out,)} if transcodes else {}
    shapes |= {"W_skip": (d_in, d_in)} if skips else {}
    shapes |= dict.fromkeys(("b_gate", "r_mag", "b_mag"), (d_latent,)) if architecture == "gated" else {}
    tensors = shared.check_tensors(state, shapes, file, f"the architecture {architecture!r}")
    if architecture == "gated":
        tensors["b_enc"] = tensors["b_gate"]  # it has both, and does not use the former
    if transcodes:  # the biases of input and output are two
        tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
        tensors["b_dec"] = tensors["b_dec_out"]
    spec = ActivationSpec({"x": d_in, TARGET: d_out} if transcodes else {"x": d_in})
    core: LinearCore
    if activation == "topk":
        k = shared.whole(config.get("activation_fn_kwargs") or {}, "k", file)
        core = SkipTranscoder(spec, d_latent, k) if skips else TopK(spec, d_latent, k)
    elif skips:
        core = JumpReLUSkipTranscoder(spec, d_latent, target_l0=min(32, d_latent))
        tensors["threshold"] = torch.zeros(d_latent)
    else:
        core = Gated(spec, d_latent) if architecture == "gated" else ReLU(spec, d_latent)
    return shared.fill(core, tensors, centred=not transcodes)


def about(path: Path) -> dict[str, Any]:
    """`model_name` and `hook_name`, as far as the config tells."""
    file = (path if path.is_dir() else path.parent) / CONFIG
    config = shared.read_json(file, "ViT-Prisma") if file.is_file() else {}
    found = {"model_name": config.get("model_name")}
    if "hook_point_layer" in config and "layer_subtype" in config:
        found["hook_name"] = f"blocks.{config['hook_point_layer']}.{config['layer_subtype']}"
    return {key: value for key, value in found.items() if value}

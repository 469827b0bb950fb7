"""Llamascopium (once Language-Model-SAEs) and its older files, those of Llama Scope among them; read only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsae.cores import BatchTopK, Crosscoder, JumpReLU, LinearCore, ReLU, SAECore, TopK
from mmsae.errors import MmsaeError
from mmsae.formats import tensors as shared
from mmsae.spec import TARGET, ActivationSpec

CONFIG = "config.json"
OLD_CONFIG = "hyperparams.json"
PLACES = ("sae_weights", "checkpoints/pruned", "checkpoints/final")
KNOWN = {"sae": ("relu", "jumprelu", "topk", "batchtopk"), "crosscoder": ("relu",)}  # others select per stream
NORM = "dataset_average_activation_norm"
THRESHOLD = "activation_function.log_jumprelu_threshold"
OLD_NAMES = {
    "encoder.weight": "W_E", "encoder.bias": "b_E", "decoder.weight": "W_D", "decoder.bias": "b_D",
    "log_jumprelu_threshold": THRESHOLD,
}  # fmt: skip
"""Names of older files; those called `*.weight` were transposed."""


def recognises(path: Path) -> bool:
    """Whether a folder is one of Llamascopium's."""
    return (path / OLD_CONFIG).is_file() or ((path / CONFIG).is_file() and _weights(path) is not None)


def load(folder: str | Path) -> SAECore:
    """A dictionary from a folder of Llamascopium, in `eval` mode and float32.

    "relu", "jumprelu", "topk" and "batchtopk" become ReLU, JumpReLU, TopK and BatchTopK, with a stream `target` where
    the hook points of input and output differ; a crosscoder with "relu" becomes Crosscoder. The average norm of the
    data is folded, and codes keep the normalised unit; those of the TopKs are multiplied by the norm of their decoder
    row where that decides what fires. BatchTopK has no threshold: call `train()`, and it selects over the batch, as
    Llamascopium always does.

    Args:
        folder: Holds `config.json` (or `hyperparams.json`) and `sae_weights.safetensors` (or `.pt`, or a checkpoint).

    Raises:
        MmsaeError: A file is missing or damaged, or describes something that has no core here.
    """
    folder = Path(folder)
    file = folder / (OLD_CONFIG if (folder / OLD_CONFIG).is_file() else CONFIG)
    config = shared.read_json(file, "Llamascopium")
    kind, activation = config.get("sae_type", "sae"), config.get("act_fn", "relu")
    if config.get("jump_relu_threshold"):  # of a TopK, released as a JumpReLU
        activation = "jumprelu"
    if config.get("use_glu_encoder"):
        activation = f"{activation} after a gated linear unit"
    if activation not in KNOWN.get(kind, ()):
        known = "; ".join(f"{kind} with {', '.join(names)}" for kind, names in KNOWN.items())
        raise MmsaeError(f"{folder} holds a {kind!r} with the activation {activation!r}; known here: {known}.")
    weights = _weights(folder)
    if weights is None or weights.suffix == ".dcp":
        raise MmsaeError(f"{folder} has no weights as safetensors or .pt: let Llamascopium save it on one device.")
    state = _read(weights)
    norms = dict(config.get(NORM) or {})
    norms |= {name.removeprefix(f"{NORM}."): state.pop(name) for name in list(state) if name.startswith(NORM)}

    d_in = shared.whole(config, "d_model", file)
    table = state["W_E"][0] if kind == "crosscoder" else state.get("W_E")
    d_latent = shared.two_dimensional({"W_E": table}, "W_E", weights)[1]
    source = config.get("hook_point_in")
    hooks: list[Any] = [source, config.get("hook_point_out") or source]
    hooks = config["hook_points"] if kind == "crosscoder" else hooks
    heads = (len(hooks),) if kind == "crosscoder" else ()
    shapes: dict[str, tuple[int, ...]] = {
        "W_E": (*heads, d_in, d_latent), "b_E": (*heads, d_latent), "W_D": (*heads, d_latent, d_in)
    }  # fmt: skip
    if config.get("use_decoder_bias", True):
        shapes["b_D"] = (*heads, d_in)
    if activation == "jumprelu" and not config.get("jump_relu_threshold"):
        shapes[THRESHOLD] = (d_latent,)
    found = shared.check_tensors(state, shapes, weights, f"a {kind} with {activation} and d_model {d_in}")
    found.setdefault("b_D", torch.zeros(*heads, d_in, dtype=torch.float64))
    roles = ["in", "out"] if kind == "sae" else hooks
    scales = [_scale(config, norms, names, file) for names in zip(hooks, roles, strict=True)]
    if kind == "crosscoder":
        return _crosscoder(found, torch.tensor(scales, dtype=torch.float64), hooks)

    b_enc, w_dec = found["b_E"], found["W_D"]
    tensors = {"W_enc": found["W_E"], "b_enc": b_enc, "W_dec": w_dec, "b_dec": found["b_D"] / scales[1]}
    spec = ActivationSpec({"x": d_in, TARGET: d_in} if len(set(hooks)) == 2 else {"x": d_in})
    gated_by_norm = config.get("sparsity_include_decoder_norm", True)
    core: LinearCore
    if activation == "relu":
        core = ReLU(spec, d_latent)
    elif activation == "jumprelu":
        core = JumpReLU(spec, d_latent, target_l0=min(32, d_latent))
        scalar = torch.full((d_latent,), scales[0] * float(config.get("jump_relu_threshold") or 0)).double()
        threshold = found[THRESHOLD].exp() if THRESHOLD in found else scalar  # the old one is in raw units
        tensors["threshold"] = threshold / w_dec.norm(dim=-1).clamp_min(1e-12) if gated_by_norm else threshold
    else:
        k = shared.whole(config, "top_k", file)
        core = BatchTopK(spec, d_latent, k) if activation == "batchtopk" else TopK(spec, d_latent, k)
        if gated_by_norm:
            shared.unit_rows(tensors)
        tensors["threshold"] = torch.tensor(-1.0)
    tensors["W_enc"], tensors["W_dec"] = tensors["W_enc"] * scales[0], tensors["W_dec"] / scales[1]
    return shared.fill(core, tensors, centred=False)


def about(folder: Path) -> dict[str, Any]:
    """`model_name` and `hook_name`, as far as the configs tell."""
    file = folder / (OLD_CONFIG if (folder / OLD_CONFIG).is_file() else CONFIG)
    found = {"hook_name": shared.read_json(file, "Llamascopium").get("hook_point_in")}
    if (folder / "lm_config.json").is_file():
        found["model_name"] = shared.read_json(folder / "lm_config.json", "Llamascopium").get("model_name")
    return {key: value for key, value in found.items() if value}


def _weights(folder: Path) -> Path | None:
    """What Llamascopium itself would read."""
    files = [folder / f"{place}.{suffix}" for place in PLACES for suffix in ("safetensors", "pt", "dcp")]
    return next((file for file in files if file.exists()), None)


def _read(file: Path) -> dict[str, Any]:
    """The tensors under their names of today."""
    read = shared.read_safetensors if file.suffix == ".safetensors" else shared.read_pickle
    state: dict[str, Any] = dict(read(file))
    state = state["sae"] if isinstance(state.get("sae"), dict) else state
    flipped = {name: t.t() if name.endswith(".weight") and t.ndim == 2 else t for name, t in state.items()}
    return {OLD_NAMES.get(name, name): value for name, value in flipped.items()}


def _scale(config: dict[str, Any], norms: dict[str, Any], names: tuple[str, ...], file: Path) -> float:
    """What activations of a hook point are multiplied by before the encoder."""
    mode = config.get("norm_activation", "dataset-wise")
    if mode == "inference":
        return 1.0
    if mode != "dataset-wise":
        raise MmsaeError(f"{file} has norm_activation={mode!r}, which {shared.per_row(mode)}.")
    norm = next((float(norms[name]) for name in names if name in norms), 0.0)
    if not 0 < norm < float("inf"):
        raise MmsaeError(f"{file} and the weights do not say the average norm of {names[0]}, which encoding needs.")
    return float(config["d_model"]) ** 0.5 / norm


@torch.no_grad()
def _crosscoder(found: dict[str, Tensor], scales: Tensor, hooks: list[str]) -> Crosscoder:
    """The streams side by side, their encoder biases summed."""
    d_in, d_latent = found["W_E"].shape[1:]
    core = Crosscoder(ActivationSpec(dict.fromkeys(hooks, d_in)), d_latent)
    core.W_enc.copy_((found["W_E"] * scales[:, None, None]).permute(2, 0, 1).reshape(d_latent, -1))
    core.b_enc.copy_(found["b_E"].sum(0))
    core.W_dec.copy_((found["W_D"] / scales[:, None, None]).permute(1, 0, 2).reshape(d_latent, -1))
    core.b_dec.copy_((found["b_D"] / scales[:, None]).flatten())
    norms = found["W_D"].norm(dim=-1).t()
    core.shares.copy_(norms / norms.sum(-1, keepdim=True).clamp_min(1e-8))
    return core.eval().requires_grad_(False)

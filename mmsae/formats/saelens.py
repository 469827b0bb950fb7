"""SAELens folders: `cfg.json` beside `sae_weights.safetensors`, as sae-lens 6 writes them; older ones are read too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsae.cores import (
    AbsTopK,
    BatchTopK,
    Gated,
    JumpReLU,
    JumpReLUSkipTranscoder,
    LinearCore,
    MatchingPursuit,
    Matryoshka,
    ReLU,
    SAECore,
    TopK,
)
from mmsae.errors import MmsaeError
from mmsae.formats.saelens_writing import CONFIG, TOPKS, TRAINING, TRANSCODERS, WEIGHTS, export
from mmsae.formats.tensors import (
    Answer,
    check_tensors,
    fill,
    per_row,
    read_json,
    read_safetensors,
    unit_rows,
    whole,
)
from mmsae.spec import TARGET, ActivationSpec

__all__ = ["PACKAGE", "about", "ask", "export", "load", "read_config", "recognises"]

PACKAGE = "sae-lens"
KNOWN = ("standard", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit", *TRANSCODERS, *TRAINING)


NOT_FOLDED = {
    "expected_average_only_in": "its factor is not in the file; in SAELens call fold_activation_norm_scaling_factor",
    "covariance_whitening": "its matrix is not in the file; in SAELens call fold_activation_whitening",
}


def recognises(path: Path) -> bool:
    """Whether a folder is one of SAELens's."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config of a SAELens folder in today's layout; `metadata` says which model and hook point it belongs to."""
    file = Path(folder) / CONFIG
    config = read_json(file, "SAELens")
    try:
        version = config.get("sae_lens_version") or config.get("metadata", {}).get("sae_lens_version") or "0"
        return config if int(str(version).split(".")[0]) >= 6 else _from_before_6(config)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise MmsaeError(f"{file} is no config of SAELens ({type(error).__name__}: {error}).") from error


def about(folder: Path) -> dict[str, Any]:
    """`model_name` and `hook_name`, as far as the config tells."""
    metadata = read_config(folder).get("metadata") or {}
    return {key: metadata[key] for key in ("model_name", "hook_name") if metadata.get(key)}


def _from_before_6(old: dict[str, Any]) -> dict[str, Any]:
    """The flat config of sae-lens 5 and older, with the defaults that it had."""
    renamed = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
    config = {renamed.get(key, key): value for key, value in old.items()}
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    config.setdefault("architecture", "standard")
    if activation == "topk":
        config["architecture"], config["k"] = "topk", config["activation_fn_kwargs"]["k"]
    elif activation != "relu":
        raise MmsaeError(f"activation_fn={activation!r} of this SAELens config is not known here; known: relu, topk.")
    if config.get("normalize_activations") is True:
        config["normalize_activations"] = "expected_average_only_in"
    described = ("model_name", "hook_name", "hook_layer", "hook_head_index", "dataset_path", "context_size",
                 "prepend_bos", "neuronpedia_id")  # fmt: skip
    config["metadata"] = {key: config[key] for key in described if key in config}
    return config


def load(folder: str | Path) -> SAECore:
    """A dictionary from a SAELens folder, in `eval` mode and float32.

    "standard" becomes ReLU, "topk" TopK, "abstopk" AbsTopK, "jumprelu" JumpReLU, "gated" Gated, and the training
    checkpoints "batchtopk" and "matryoshka_batchtopk" BatchTopK and Matryoshka. Transcoders become a core with a stream
    `target`; those with a skip JumpReLUSkipTranscoder, with thresholds of 0 where there are none.
    "matching_pursuit" becomes MatchingPursuit, whose tolerance also holds before the first step.

    Args:
        folder: Holds `cfg.json` and `sae_weights.safetensors`.

    Raises:
        MmsaeError: A file is missing or damaged, or describes something that has no core here.
    """
    folder = Path(folder)
    config = read_config(folder)
    architecture = config.get("architecture")
    if architecture not in KNOWN:
        raise MmsaeError(f"{folder} has the architecture {architecture!r}; known here: {', '.join(KNOWN)}.")
    normalisation = config.get("normalize_activations") or "none"
    if normalisation != "none":
        why = NOT_FOLDED.get(normalisation, f"it {per_row(normalisation)}")
        raise MmsaeError(f"{folder} expects normalize_activations={normalisation!r}: {why} and save it with 'none'.")
    try:
        d_in, d_latent = int(config["d_in"]), int(config["d_sae"])
        d_out = int(config["d_out"]) if architecture in TRANSCODERS else d_in
    except (KeyError, TypeError, ValueError) as error:
        raise MmsaeError(f"{folder / CONFIG} does not say how wide the dictionary is ({error}).") from error
    tensors = _read_tensors(folder / WEIGHTS, architecture, d_in, d_latent, d_out)
    spec = ActivationSpec({"x": d_in, TARGET: d_out}) if architecture in TRANSCODERS else ActivationSpec({"x": d_in})
    if architecture == "matching_pursuit":
        return _pursuit(folder / CONFIG, config, tensors)
    if architecture == "skip_transcoder":
        tensors["threshold"] = torch.zeros(d_latent)
    core = _build(folder, config, spec, d_latent)

    # SAELens's default is False for inference and True for training
    rescale = config.get("rescale_acts_by_decoder_norm", architecture in TRAINING)
    if "topk_threshold" in tensors:  # SAELens starts at 0: never measured
        scalar = tensors.pop("topk_threshold")
        tensors["threshold"] = torch.where(scalar > 0, scalar, -1.0)
    if rescale and architecture in TOPKS:
        threshold = tensors.pop("threshold", None)  # of what was rescaled already
        unit_rows(tensors)
        tensors |= {"threshold": threshold} if threshold is not None else {}
    centred = bool(config.get("apply_b_dec_to_input", True)) and architecture not in TRANSCODERS
    return fill(core, tensors, centred)


def _build(folder: Path, config: dict[str, Any], spec: ActivationSpec, d_latent: int) -> LinearCore:
    architecture = TRANSCODERS.get(config["architecture"], config["architecture"])
    if architecture == "standard":
        return ReLU(spec, d_latent)
    if architecture == "gated":
        return Gated(spec, d_latent)
    if architecture.endswith("_skip"):
        return JumpReLUSkipTranscoder(spec, d_latent, target_l0=min(32, d_latent))
    if architecture == "jumprelu":
        return JumpReLU(spec, d_latent, target_l0=min(32, d_latent))
    k = config.get("k")
    if not isinstance(k, int | float) or k != int(k):
        raise MmsaeError(
            f"{folder / CONFIG} has k={k}, which is no whole number: "
            "let SAELens write its inference model (save_inference_model), a jumprelu that can be read."
        )
    if architecture in ("topk", "abstopk"):
        return (TopK if architecture == "topk" else AbsTopK)(spec, d_latent, int(k))
    widths = config.get("matryoshka_widths") or [d_latent]
    if architecture == "batchtopk":
        return BatchTopK(spec, d_latent, int(k))
    return Matryoshka(spec, d_latent, int(k), prefixes=[width / d_latent for width in widths])


@torch.no_grad()
def _pursuit(file: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> MatchingPursuit:
    """Both pursue alike."""
    d_latent, d_in = tensors["W_dec"].shape
    steps = whole(config, "max_iterations", file) if config.get("max_iterations") is not None else d_in
    tolerance = max(float(config.get("residual_threshold", 1e-2)), 0)
    repeats = not config.get("stop_on_duplicate_support", True)
    core = MatchingPursuit(d_in, d_latent, steps, tolerance, repeats=repeats)
    core.W_dec.copy_(tensors["W_dec"])
    if config.get("apply_b_dec_to_input", True):  # else theirs is neither subtracted nor added
        core.b_dec.copy_(tensors["b_dec"])
    return core.eval().requires_grad_(False)


def _read_tensors(file: Path, architecture: str, d_in: int, d_latent: int, d_out: int) -> dict[str, Tensor]:
    """The tensors in float64, every name and shape checked."""
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_latent), "b_enc": (d_latent,), "W_dec": (d_latent, d_out), "b_dec": (d_out,)
    }  # fmt: skip
    if architecture.startswith("jumprelu"):
        shapes["threshold"] = (d_latent,)
    if architecture.endswith("skip_transcoder"):
        shapes["W_skip"] = (d_out, d_in)
    if architecture == "gated":
        shapes |= dict.fromkeys(("b_gate", "r_mag", "b_mag"), shapes.pop("b_enc"))
    if architecture == "matching_pursuit":
        del shapes["W_enc"], shapes["b_enc"]
    if architecture in TRAINING:
        shapes["topk_threshold"] = ()
    tensors = read_safetensors(file)
    if "log_threshold" in tensors and "threshold" in shapes:  # training checkpoints of sae-lens before 6.40
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if not (tensors.pop("scaling_factor", torch.ones(())) == 1).all():
        raise MmsaeError(f"{file} has a scaling_factor other than 1, of a finetuning that sae-lens 6 no longer reads.")
    tensors = check_tensors(tensors, shapes, file, f"the architecture {architecture!r}")
    return {"b_enc" if name == "b_gate" else name: tensor for name, tensor in tensors.items()}


def ask(folder: Path) -> Answer:
    """What SAELens itself makes of a folder.

    Raises:
        ImportError: It is not installed.
    """
    from sae_lens import SAE

    theirs = SAE.load_from_disk(folder)

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        return theirs.encode(x), theirs(x)  # of a skip connection only the call knows

    return answer

"""What SAELens calls our cores, and how they are written for it; `saelens` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

import mmsae
from mmsae.artifact import write_folder
from mmsae.cores import (
    AbsTopK,
    BatchTopK,
    Gated,
    JumpReLU,
    JumpReLUSkipTranscoder,
    LinearCore,
    MatchingPursuit,
    Matryoshka,
    MultiTopK,
    PAnneal,
    ReLU,
    SAECore,
    TopK,
)
from mmsae.errors import MmsaeError
from mmsae.formats.tensors import as_float32, has_threshold, tensors_of, unit_rows
from mmsae.spec import TARGET

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
VERSION = "6.54.12"
"""The sae-lens that exports are checked against; from 6.0.0 on its loader leaves the config as it is."""

TRANSCODERS = {
    "transcoder": "standard", "jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu_skip",
    "skip_transcoder": "standard_skip",
}  # fmt: skip
TRAINING = ("batchtopk", "matryoshka_batchtopk")
TOPKS = ("topk", "abstopk", *TRAINING)
WRITTEN: dict[type[SAECore], str] = {
    ReLU: "standard",
    PAnneal: "standard",
    TopK: "topk",
    MultiTopK: "topk",
    AbsTopK: "abstopk",
    JumpReLU: "jumprelu",
    BatchTopK: "jumprelu",
    Matryoshka: "jumprelu",
    Gated: "gated",
    MatchingPursuit: "matching_pursuit",
    JumpReLUSkipTranscoder: "jumprelu_skip",
}


def export(core: SAECore, folder: str | Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write a dictionary so that `sae_lens.SAE.load_from_disk` reads it; encode and decode then agree.

    BatchTopK and Matryoshka become "jumprelu" with decoder rows of norm 1, as SAELens does it itself: the codes of a
    latent change unit by the norm of its row, reconstructions stay. A MatchingPursuit with a tolerance takes its first
    step in SAELens also in rows that are within it from the start.

    Args:
        core: A folded core: it takes raw activations.
        folder: Where to; an older export there is replaced.
        metadata: What SAELens keeps under `metadata`, such as `model_name` and `hook_name`.

    Raises:
        MmsaeError: SAELens has no such dictionary, or it has no threshold yet.
    """
    architecture, extra = _architecture(core)
    if isinstance(core, MatchingPursuit):
        tensors, subtracts = {"W_dec": core.W_dec.detach().cpu(), "b_dec": core.b_dec.cpu()}, True
    else:
        assert isinstance(core, LinearCore)
        subtracts = core.subtracts_b_dec
        tensors = tensors_of(core, subtracts)
    if isinstance(core, Gated):
        tensors["b_gate"] = tensors.pop("b_enc")
    if isinstance(core, BatchTopK):
        tensors["threshold"] = tensors["threshold"].expand(core.d_latent)
        unit_rows(tensors)
    weights = save_tensors(as_float32(tensors))
    config = {
        "architecture": architecture,
        "d_in": core.spec.d_in,
        "d_sae": core.d_latent,
        **extra,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": subtracts,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            **(metadata or {}),
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "exported_by": f"mmsae {mmsae.__version__} ({type(core).__name__})",
        },
    }
    return write_folder(Path(folder), {WEIGHTS: weights, CONFIG: json.dumps(config, indent=1).encode()}, mark=CONFIG)


def _architecture(core: SAECore) -> tuple[str, dict[str, Any]]:
    """SAELens's name for a core, and what stands in the config beside it."""
    transcodes = TARGET in core.spec.streams
    name = WRITTEN.get(type(core))  # the exact class: a subclass may select in another way
    if transcodes:
        name = next((full for full, plain in TRANSCODERS.items() if plain == name), None)
    if name is None:
        what = f"{type(core).__name__}{' transcoder' if transcodes else ''}"
        raise MmsaeError(
            f"SAELens has no architecture for a {what}; it takes {', '.join(cls.__name__ for cls in WRITTEN)}, and as "
            "transcoders those of ReLU, JumpReLU and BatchTopK: keep this one in the format of mmsae."
        )
    if isinstance(core, MatchingPursuit):
        if not torch.equal(core.metric, torch.eye(core.spec.d_in).to(core.metric)):
            raise MmsaeError(
                "this MatchingPursuit measures residuals in whitened units, for which SAELens has no place: train it "
                "without whitening, or keep it in the format of mmsae."
            )
        stop = {"residual_threshold": float(core.stop), "stop_on_duplicate_support": not core.repeats}
        return name, {**stop, "max_iterations": core.k}
    assert isinstance(core, LinearCore)
    has_threshold(core)
    if transcodes:
        return name, {"d_out": core.spec.d_out}
    return name, {"k": core.k, "rescale_acts_by_decoder_norm": False} if isinstance(
        core, TopK
    ) and name in TOPKS else {}

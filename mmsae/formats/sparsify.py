"""EleutherAI's sparsify: `cfg.json` beside `sae.safetensors`, one folder per hook point, as version 1.3 writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor

from mmsae.artifact import write_folder
from mmsae.cores import GroupMax, LinearCore, MultiTopK, SAECore, SkipTranscoder, TopK
from mmsae.errors import MmsaeError
from mmsae.formats.tensors import Answer, as_float32, check_tensors, fill, read_json, read_safetensors, tensors_of
from mmsae.spec import TARGET, ActivationSpec

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
PACKAGE = "eai-sparsify"
ACTIVATIONS = ("topk", "groupmax")
WRITTEN = (TopK, MultiTopK, GroupMax, SkipTranscoder)


def recognises(path: Path) -> bool:
    """Whether a folder is one of sparsify's."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def export(core: SAECore, folder: str | Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write a dictionary so that `sparsify.SparseCoder.load_from_disk` reads it; encode and decode then agree.

    Args:
        core: A folded TopK, MultiTopK, GroupMax or SkipTranscoder: it takes raw activations.
        folder: Where to; an older export there is replaced.
        metadata: Kept in `cfg.json`, where sparsify passes over it.

    Raises:
        MmsaeError: sparsify has no such dictionary.
    """
    spec = core.spec
    transcodes = TARGET in spec.streams
    if not isinstance(core, TopK) or type(core) not in WRITTEN:  # a subclass may select in another way
        raise MmsaeError(
            f"sparsify has no activation for a {type(core).__name__}; it takes "
            f"{', '.join(cls.__name__ for cls in WRITTEN)}: choose another format."
        )
    if spec.d_in != spec.d_out:
        raise MmsaeError(f"sparsify takes inputs and targets of one width, not {spec.d_in} and {spec.d_out}.")
    tensors = tensors_of(core, centred=not transcodes)
    tensors["encoder.weight"], tensors["encoder.bias"] = tensors.pop("W_enc").t(), tensors.pop("b_enc")
    config = {
        "activation": "groupmax" if isinstance(core, GroupMax) else "topk",
        "expansion_factor": max(core.d_latent // spec.d_in, 1),  # num_latents goes first
        "normalize_decoder": core.decoder_norm == "unit",
        "num_latents": core.d_latent,
        "k": core.k,
        "multi_topk": isinstance(core, MultiTopK),
        "skip_connection": isinstance(core, SkipTranscoder),
        "transcode": transcodes,
        "d_in": spec.d_in,
        **({"metadata": metadata} if metadata else {}),
    }
    files = {WEIGHTS: save_tensors(as_float32(tensors)), CONFIG: json.dumps(config, indent=1).encode()}
    return write_folder(Path(folder), files, mark=CONFIG)


def load(folder: str | Path) -> SAECore:
    """A dictionary from a folder of sparsify, in `eval` mode and float32.

    "topk" becomes TopK (with `multi_topk` MultiTopK, with `skip_connection` SkipTranscoder), "groupmax" GroupMax;
    transcoders have a stream `target`.

    Args:
        folder: Holds `cfg.json` and `sae.safetensors`.

    Raises:
        MmsaeError: A file is missing or damaged, or describes something that has no core here.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "sparsify")
    activation = config.get("activation", "topk")  # older files do not say
    if activation not in ACTIVATIONS or config.get("signed"):
        activation = "signed topk" if config.get("signed") else activation
        raise MmsaeError(f"{folder} has the activation {activation!r}; known here: {', '.join(ACTIVATIONS)}.")
    try:
        d_in, k = int(config["d_in"]), int(config["k"])
        d_latent = int(config.get("num_latents") or d_in * config["expansion_factor"])
    except (KeyError, TypeError, ValueError) as error:
        raise MmsaeError(f"{folder / CONFIG} does not say how wide the dictionary is ({error}).") from error
    skips, transcodes = bool(config.get("skip_connection")), bool(config.get("transcode"))
    core = _build(activation, skips, transcodes, bool(config.get("multi_topk")), d_in, d_latent, k)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_latent, d_in), "encoder.bias": (d_latent,), "W_dec": (d_latent, d_in), "b_dec": (d_in,)
    }  # fmt: skip
    if skips:
        shapes["W_skip"] = (d_in, d_in)
    file = folder / WEIGHTS
    tensors: dict[str, Tensor] = check_tensors(read_safetensors(file), shapes, file, f"the activation {activation!r}")
    tensors["W_enc"], tensors["b_enc"] = tensors["encoder.weight"].t(), tensors["encoder.bias"]
    return fill(core, tensors, centred=not transcodes)


def _build(activation: str, skips: bool, transcodes: bool, multi: bool, d_in: int, d_latent: int, k: int) -> LinearCore:
    spec = ActivationSpec({"x": d_in, TARGET: d_in} if transcodes or skips else {"x": d_in})
    if skips:
        if activation != "topk":
            raise MmsaeError(f"a skip connection beside the activation {activation!r} has no core here, only topk.")
        return SkipTranscoder(spec, d_latent, k)
    if activation == "groupmax":
        return GroupMax(spec, d_latent, k)
    return MultiTopK(spec, d_latent, k) if multi and 4 * k <= d_latent else TopK(spec, d_latent, k)


def ask(folder: Path) -> Answer:
    """What sparsify itself makes of a folder.

    Raises:
        ImportError: It is not installed.
    """
    from sparsify import SparseCoder
    from sparsify.utils import eager_decode  # of its two decoders the one that needs no GPU

    theirs = SparseCoder.load_from_disk(folder)

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices, _ = theirs.encode(x)
        reconstruction = eager_decode(indices, values, theirs.W_dec.mT) + theirs.b_dec
        if theirs.W_skip is not None:  # only its forward adds it, which uses the other decoder
            reconstruction = reconstruction + x @ theirs.W_skip.mT
        return x.new_zeros(len(x), theirs.num_latents).scatter(1, indices, values), reconstruction

    return answer

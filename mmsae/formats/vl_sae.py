"""VL-SAE's files `.pth` of mere tensors: dictionaries, their baselines, and alignment autoencoders; read only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsae.cores import VLSAE, AlignmentAutoencoder, SAECore
from mmsae.errors import MmsaeError
from mmsae.formats.tensors import check_tensors, pickle_names, read_pickle, two_dimensional
from mmsae.spec import ActivationSpec

STREAMS = ("image", "text")
PAPER_K = 256
"""Of all files that the authors give away, and in their names."""

# Their name of each of our parameters; `.0` is the image's, `.1` the text's.
VL = {
    "encoders.0": "encoder",
    "decoders.0": "vision_decoder.weight", "decoders.1": "text_decoder.weight",
    "b_dec.0": "vision_decoder.bias", "b_dec.1": "text_decoder.bias",
}  # fmt: skip
SAE_D = {
    "encoders.0": "v_encoder.weight", "encoders.1": "t_encoder.weight",
    "b_enc.0": "v_encoder.bias", "b_enc.1": "t_encoder.bias",
    "decoders.0": "vision_decoder.0.weight", "decoders.1": "text_decoder.0.weight",
    "b_dec.0": "vision_decoder.0.bias", "b_dec.1": "text_decoder.0.bias",
}  # fmt: skip
SAE_S = {
    "encoders.0": "encoder.weight", "b_enc.0": "encoder.bias",
    "decoders.0": "decoder.0.weight", "b_dec.0": "decoder.0.bias",
}  # fmt: skip
ALIGNMENT = {
    "encoders.0": "vision_projection.weight", "encoders.1": "text_projection.weight",
    "b_enc.0": "vision_projection.bias", "b_enc.1": "text_projection.bias",
    "decoders.0": "vision_decoder.weight", "decoders.1": "text_decoder.weight",
    "b_dec.0": "vision_decoder.bias", "b_dec.1": "text_decoder.bias",
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "VL_SAE": (VL, {}),
    "SAE_D": (SAE_D, {"encoder": "linear", "shared_encoder": False}),
    "SAE_V": (SAE_S, {"encoder": "linear", "shared_decoder": True}),
    "AuxiliaryAE": (ALIGNMENT, {}),
}
"""Their class to its tensors, and to the arguments of ours. SAE_V of their code is SAE-S of their paper."""


def recognises(path: Path) -> bool:
    """Whether a file has the tensors of one of their classes."""
    return path.is_file() and path.suffix in (".pt", ".pth") and _kind(pickle_names(path)) is not None


def _kind(names: set[str]) -> str | None:
    found = [kind for kind, (theirs, _) in KINDS.items() if names == set(theirs.values())]
    return found[0] if found else None


def load(file: str | Path) -> SAECore:
    """A VLSAE or an AlignmentAutoencoder of the streams `image` and `text`, in `eval` mode and float32.

    The files do not say how many latents fire; their names do, such as 256 in `openclip_ViT-B-32_VL_SAE_256_8_best.pth`
    and `llava_256_8_best.pth`.

    Args:
        file: What the authors' training wrote (github.com/ssfgunner/VL-SAE).

    Raises:
        MmsaeError: It is missing, damaged or no mere state dict, or its name does not say how many latents fire.
    """
    file = Path(file)
    state = read_pickle(file)
    kind = _kind({str(name) for name in state})
    if kind is None:
        raise MmsaeError(f"{file} is no dictionary of VL-SAE: it has {', '.join(map(str, state))}.")
    theirs, arguments = KINDS[kind]
    d_latent, first = two_dimensional(state, theirs["encoders.0"], file)
    _, second = two_dimensional(state, theirs.get("encoders.1", theirs["encoders.0"]), file)
    spec = ActivationSpec(dict(zip(STREAMS, (first, second), strict=True)))
    core: SAECore
    if kind == "AuxiliaryAE":
        core = AlignmentAutoencoder(spec, d_latent, normalize_contrastive=False)  # as their code trains it
    else:
        core = VLSAE(spec, d_latent, _k(file, d_latent), **arguments)
    ours = dict(core.named_parameters())
    shapes = {name: _theirs(name, ours[own]).shape for own, name in theirs.items()}
    found = check_tensors(state, {name: tuple(shape) for name, shape in shapes.items()}, file, kind)
    with torch.no_grad():
        for own, name in theirs.items():
            ours[own].copy_(_theirs(name, found[name]))
    return core.eval().requires_grad_(False)


def _theirs(name: str, tensor: Tensor) -> Tensor:
    """Between our layout and theirs: their decoders hold one column per latent."""
    return tensor.t() if "decoder" in name and name.endswith("weight") else tensor


def _k(file: Path, d_latent: int) -> int:
    """From a name that ends in k and the ratio of widths, and perhaps in more."""
    found = re.search(r"_(\d+)_\d+(?:_[\d.]*_?(?:best|final))?$", file.stem)
    if not found:
        raise MmsaeError(
            f"{file} does not say how many latents fire: name it as its authors do, ..._{PAPER_K}_8_best.pth, where "
            f"{PAPER_K} fire."
        )
    k = int(found[1])
    if not 1 <= k <= d_latent:
        raise MmsaeError(f"{file} says by its name that {k} of its {d_latent} latents fire: correct the name.")
    return k

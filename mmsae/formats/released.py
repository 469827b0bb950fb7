"""Released dictionaries in a file `.pt` of mere tensors: Goodfire's and Qwen Scope's; read only."""

from __future__ import annotations

import re
from pathlib import Path

from mmsae.cores import LinearCore, ReLU, SAECore, TopK
from mmsae.errors import MmsaeError
from mmsae.formats.tensors import check_tensors, fill, pickle_names, read_pickle, two_dimensional

NAMES = {
    "Goodfire": {
        "W_enc": "encoder_linear.weight", "b_enc": "encoder_linear.bias", "W_dec": "decoder_linear.weight",
        "b_dec": "decoder_linear.bias",
    },
    "Qwen Scope": {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
}  # fmt: skip
"""Their names of our tensors; both matrices are transposed."""


def recognises(path: Path) -> bool:
    """Whether a file is one of theirs; Qwen Scope's are known by their name as well, as others use these tensors."""
    return path.is_file() and path.suffix in (".pt", ".pth") and _whose(path, pickle_names(path)) is not None


def _whose(file: Path, names: set[str]) -> str | None:
    for library, theirs in NAMES.items():
        if names == set(theirs.values()) and (library == "Goodfire" or re.fullmatch(r"layer\d+\.sae\.pt", file.name)):
            return library
    return None


def load(file: str | Path) -> SAECore:
    """A ReLU from a file of Goodfire's, a TopK from one of Qwen Scope's, in `eval` mode and float32.

    Args:
        file: Such as `Llama-3.1-8B-Instruct-SAE-l19.pth`, or `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt`: a
            folder above it tells how many latents fire.

    Raises:
        MmsaeError: It is missing, damaged or no mere state dict, or does not say how many latents fire.
    """
    file = Path(file)
    state = read_pickle(file)
    library = _whose(file, set(state))
    if library is None:
        raise MmsaeError(f"{file} is neither of Goodfire's nor of Qwen Scope's: it has {', '.join(map(str, state))}.")
    theirs = NAMES[library]
    d_latent, d_in = two_dimensional(state, theirs["W_enc"], file)
    shapes = {"W_enc": (d_latent, d_in), "b_enc": (d_latent,), "W_dec": (d_in, d_latent), "b_dec": (d_in,)}
    found = check_tensors(state, {theirs[name]: shape for name, shape in shapes.items()}, file, library)
    tensors = {name: found[theirs[name]].t() if name.startswith("W") else found[theirs[name]] for name in theirs}
    core: LinearCore = ReLU(d_in, d_latent)
    if library == "Qwen Scope":
        fires = re.findall(r"-L0_(\d+)", str(file.resolve().parent))
        if not fires:
            raise MmsaeError(f"{file} does not lie in a folder named as by Qwen, whose -L0_50 says how many fire.")
        core = TopK(d_in, d_latent, int(fires[-1]))
    return fill(core, tensors, centred=False)

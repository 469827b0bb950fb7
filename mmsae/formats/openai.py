"""OpenAI's sparse_autoencoder for GPT-2: one file `.pt`, a state dict beside the name of its activation, read only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmsae.cores import ReLU, SAECore
from mmsae.errors import MmsaeError
from mmsae.formats.tensors import check_tensors, fill, read_pickle, two_dimensional

STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognises(path: Path) -> bool:
    """Whether a file is one of theirs; it has to be opened, safely, since nothing else tells."""
    if not path.is_file() or path.suffix not in (".pt", ".pth"):
        return False
    try:
        return "pre_bias" in read_pickle(path)
    except MmsaeError:
        return False


def load(file: str | Path) -> SAECore:
    """A ReLU from a file of OpenAI's, in `eval` mode and float32.

    Args:
        file: What `torch.save(autoencoder.state_dict(), ...)` wrote.

    Raises:
        MmsaeError: It is missing, damaged or no mere state dict, or a TopK: those rescale each row by itself.
    """
    file = Path(file)
    state: dict[str, Any] = dict(read_pickle(file))
    activation = state.pop("activation", "ReLU")
    state.pop("activation_state_dict", None)
    if activation == "TopK":
        raise MmsaeError(
            f"{file} is a TopK of OpenAI's, which rescales each row by itself, what no weights can absorb; "
            "known here: ReLU."
        )
    if activation != "ReLU":
        raise MmsaeError(f"{file} has the activation {activation!r}; known here: ReLU.")
    for name in STATISTICS:
        state.pop(name, None)
    d_latent, d_in = two_dimensional(state, "encoder.weight", file)
    shapes = {
        "encoder.weight": (d_latent, d_in), "latent_bias": (d_latent,), "decoder.weight": (d_in, d_latent),
        "pre_bias": (d_in,),
    }  # fmt: skip
    if "decoder.weight" not in state:  # tied
        state.pop("decoder.linear.weight", None)
        state["decoder.weight"] = state["encoder.weight"].t()
    found = check_tensors(state, shapes, file, "OpenAI's autoencoder")
    tensors = {
        "W_enc": found["encoder.weight"].t(), "b_enc": found["latent_bias"], "W_dec": found["decoder.weight"].t(),
        "b_dec": found["pre_bias"],
    }  # fmt: skip
    return fill(ReLU(d_in, d_latent), tensors, centred=True)

"""OpenAI's sparse_autoencoder for GPT-2: one file `.pt`, a state dict beside the name of its activation, read only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmsae.cores import LinearCore, ReLU, SAECore, TopK
from mmsae.errors import MmsaeError
from mmsae.formats.tensors import check_tensors, fill, per_row, pickle_names, read_pickle, two_dimensional, whole

STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognises(path: Path) -> bool:
    """Whether a file is one of theirs; it has to be opened, safely, since nothing else tells."""
    return path.is_file() and path.suffix in (".pt", ".pth") and "pre_bias" in pickle_names(path)


def load(file: str | Path) -> SAECore:
    """A ReLU or TopK from a file of OpenAI's, in `eval` mode and float32.

    Their own loader has every TopK normalise rows; the files do not say it. One that does not, or is to be read as the
    dictionary of normalised rows, says so by an entry `normalize` that is False.

    Args:
        file: What `torch.save(autoencoder.state_dict(), ...)` wrote.

    Raises:
        MmsaeError: It is missing, damaged or no mere state dict, normalises rows, or has another activation.
    """
    file = Path(file)
    state: dict[str, Any] = dict(read_pickle(file))
    activation, settings = state.pop("activation", "ReLU"), state.pop("activation_state_dict", None) or {}
    if state.pop("normalize", activation == "TopK"):
        raise MmsaeError(
            f"{file} is a {activation} of OpenAI's, which {per_row('layer_norm')}, and save it with "
            "normalize=False among its entries to read the dictionary of such rows."
        )
    if activation not in ("ReLU", "TopK") or settings.get("postact_fn", "ReLU") != "ReLU":
        activation = " and ".join([activation, *filter(None, [settings.get("postact_fn")])])
        raise MmsaeError(f"{file} has the activation {activation!r}; known here: ReLU, TopK and ReLU.")
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
    core: LinearCore = ReLU(d_in, d_latent)
    if activation == "TopK":
        core = TopK(d_in, d_latent, whole(settings, "k", file))
    return fill(core, tensors, centred=True)

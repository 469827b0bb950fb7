"""saev (Ohio State University): one file `.pt`, a line of JSON before a state dict, schemas 1 to 5, read only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmsae.cores import BatchTopK, LinearCore, ReLU, SAECore, TopK
from mmsae.errors import MmsaeError
from mmsae.formats.tensors import check_tensors, fill, read_pickle, two_dimensional

ACTIVATIONS = ("Relu", "TopK", "BatchTopK")


def recognises(path: Path) -> bool:
    """Whether a file begins as theirs do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return False
        try:
            header = json.loads(b"{" + file.readline(1 << 20))
        except ValueError:
            return False
    return "schema" in header and "cfg" in header


def load(file: str | Path) -> SAECore:
    """A dictionary from a file of saev's, in `eval` mode and float32.

    "Relu" becomes ReLU, "TopK" TopK, "BatchTopK" BatchTopK; older files of the last have no threshold, since it chose
    k of each row, and become TopK. A chosen pre-activation below 0 stays in saev's TopK and is cut off here.

    Args:
        file: Such as `sae.pt`.

    Raises:
        MmsaeError: It is missing, damaged or holds more than tensors, or has an activation without a core here.
    """
    file = Path(file)
    if not file.is_file():
        raise MmsaeError(f"{file} is no file of saev.")
    line, _, data = file.read_bytes().partition(b"\n")
    try:
        header = json.loads(line)
        config, schema = header["cfg"], int(header["schema"])
        activation = config.get("activation") or {"cls": header.get("cls", "Relu"), "params": config}
        name, params = activation["cls"], activation.get("params") or {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MmsaeError(f"{file} does not begin with the JSON of saev ({type(error).__name__}: {error}).") from error
    if name not in ACTIVATIONS:
        raise MmsaeError(f"{file} has the activation {name!r}; known here: {', '.join(ACTIVATIONS)}.")
    state: dict[str, Any] = dict(read_pickle(file, data))
    d_in, d_latent = two_dimensional(state, "W_enc", file)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_latent), "b_enc": (d_latent,), "W_dec": (d_latent, d_in), "b_dec": (d_in,)
    }  # fmt: skip
    by_threshold = name == "BatchTopK" and "activation.threshold" in state
    if by_threshold:
        shapes["activation.threshold"] = ()
    tensors = check_tensors(state, shapes, file, f"the activation {name!r} of schema {schema}")
    core: LinearCore
    if name == "Relu":
        core = ReLU(d_in, d_latent)
    else:
        k = min(int(params.get("top_k", 32)), d_latent)
        core = BatchTopK(d_in, d_latent, k) if by_threshold else TopK(d_in, d_latent, k)
    if by_threshold:  # 0 was never measured, and is a ReLU there
        tensors["threshold"] = tensors["activation.threshold"].clamp_min(0)
    return fill(core, tensors, centred=False)

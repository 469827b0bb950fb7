"""Encoders of ours in folders: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.encoders.ecg_jepa import ECGJEPA
from mmsae.encoders.signal_transformer import SignalTransformer
from mmsae.errors import MmsaeError, nearest

ENCODERS: dict[str, type[SignalTransformer]] = {"ECGJEPA": ECGJEPA, "SignalTransformer": SignalTransformer}
"""By the name that `config.json` gives under `model`."""


def built(name: str, arguments: dict[str, Any]) -> SignalTransformer:
    """An encoder with random weights; MmsaeError for arguments that it does not take."""
    if name not in ENCODERS:
        raise MmsaeError(f"there is no encoder {name!r}; nearest: {nearest(name, ENCODERS)}.")
    try:
        return ENCODERS[name](**arguments)
    except TypeError as error:
        raise MmsaeError(f"{name} cannot be built with config {arguments} ({error}).") from error


def described(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's `config.json`: `model`, `config` (its arguments), `preprocess`, and what was measured.

    `preprocess` says what the encoder was trained on: `rate` (Hz), `channels` (names, in order), `unit`, `mean` and
    `std` (one for each channel), `clip` (in standard deviations).
    """
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text())
        if not isinstance(content["config"], dict) or not isinstance(content["model"], str):
            raise TypeError("model is no name or config no table")
    except FileNotFoundError as error:
        raise MmsaeError(f"there is no encoder in {str(folder)!r}: it has no config.json.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MmsaeError(f"{path} is not the config.json of an encoder ({error}).") from error
    return content


def read_encoder(folder: str | Path, file: str | Path = "model.safetensors") -> tuple[SignalTransformer, dict]:
    """The encoder of a folder in eval mode and float32, and the content of its `config.json`.

    Args:
        folder: As `write_encoder` makes it.
        file: Which weights: a file of the folder, or another path.
    """
    from safetensors.torch import load_file

    content = described(folder)
    encoder = built(content["model"], content["config"])
    path = Path(folder) / file
    try:
        weights = {name: tensor.float() for name, tensor in load_file(path).items()}
        encoder.load_state_dict(weights)
    except FileNotFoundError as error:
        raise MmsaeError(f"there is no weight file {str(path)!r}.") from error
    except Exception as error:  # any: not safetensors, truncated, weights of another size
        raise MmsaeError(f"the weights {str(path)!r} do not fit: {str(error).splitlines()[0]}.") from error
    return encoder.eval(), content


def write_encoder(
    folder: str | Path, encoder: nn.Module, content: dict[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """Write `config.json` and `model.safetensors`.

    Args:
        folder: Made if it is missing.
        encoder: What is saved.
        content: See `described`.
        dtype: Of the weights on disk.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {name: t.to(dtype).contiguous() for name, t in encoder.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it readable for its owner only
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")

"""What the readers of foreign formats share: opening files safely, checking tensors, filling a core."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from mmsae.cores import BatchTopK, Gated, JumpReLU, JumpReLUSkipTranscoder, LinearCore, SkipTranscoder
from mmsae.errors import MmsaeError, checked

Shapes = Mapping[str, tuple[int, ...]]
Answer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From activations `[n, d_in]` to dense codes `[n, d_latent]` and reconstructions `[n, d_out]`."""


def per_row(normalisation: str) -> str:
    """Why a normalisation of rows, under any library's name, is refused, and what to do instead."""
    normalised = {
        "layer_norm": "(x - its mean) / (its standard deviation + 1e-5)",
        "constant_norm_rescale": "x times the root of d_in over its norm",
        "token-wise": "x times the root of d_in over its norm",
    }.get(normalisation, "normalised rows")
    return f"rescales each row, or batch, by itself, which no weights can absorb: take {normalised} yourself"


def read_json(file: Path, library: str) -> dict[str, Any]:
    """A config file.

    Raises:
        MmsaeError: It is missing, or holds no JSON object.
    """
    if not file.is_file():
        raise MmsaeError(f"{file.parent} holds no {library} dictionary: there is no {file.name} in it.")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise MmsaeError(f"{file} is no config of {library} ({type(error).__name__}: {error}).") from error
    if not isinstance(config, dict):
        raise MmsaeError(f"{file} is no config of {library}: it holds a {type(config).__name__}, not an object.")
    return config


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return load_safetensors(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise MmsaeError(f"{file} is missing or damaged ({error}).") from error


def read_pickle(file: Path, data: bytes | None = None) -> dict[str, Any]:
    """What `torch.save` wrote, as long as it is tensors and plain values: a pickle may else run code when opened.

    Args:
        file: What to read, and the name in errors.
        data: Its bytes, where they do not begin at the start of the file.

    Raises:
        MmsaeError: It is missing, damaged, holds other objects than torch's safe loader accepts, or no dict.
    """
    try:
        content = torch.load(io.BytesIO(file.read_bytes() if data is None else data), "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MmsaeError(
            f"{file} is a pickle with other objects than tensors, which could run code when opened, so it is refused: "
            "where it comes from, save its state dict alone (torch.save(sae.state_dict(), ...)) and try that."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise MmsaeError(f"{file} is missing or damaged ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict):
        raise MmsaeError(f"{file} holds a {type(content).__name__}, not the tensors of a dictionary.")
    return content


def pickle_names(file: Path) -> set[str]:
    """Names of what `torch.save` wrote, hardly reading its tensors; none where the safe loader does not open it."""
    try:
        content = torch.load(file, "cpu", weights_only=True, mmap=True)
    except Exception:  # whatever a file that nobody vouches for provokes; who reads it says what is wrong
        return set()
    return {str(name) for name in content} if isinstance(content, dict) else set()


def whole(config: Mapping[str, Any], name: str, file: Path) -> int:
    """A positive whole number of a config.

    Raises:
        MmsaeError: It is missing, or no such number.
    """
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise MmsaeError(f"{file} has {name}={value}, where a whole number is needed.")
    return checked(name, int(value), 1)


def check_tensors(tensors: Mapping[str, Any], shapes: Shapes, file: Path, what: str) -> dict[str, Tensor]:
    """The tensors in float64, every name, shape and value checked.

    Args:
        tensors: As they were read.
        shapes: Every tensor that must be there; no other may.
        file: Where they are from.
        what: What needs them, such as "the architecture 'topk'".

    Raises:
        MmsaeError: One is missing, too many, of another shape, or not finite.
    """
    found = {name: value.double() for name, value in tensors.items() if isinstance(value, Tensor)}
    for name in sorted({*shapes, *tensors}):
        if name not in found:
            raise MmsaeError(f"{file} has no tensor {name!r}, which {what} needs.")
        if name not in shapes:
            raise MmsaeError(f"{file} has a tensor {name!r}, which {what} does not know.")
        if tuple(found[name].shape) != shapes[name]:
            shape = list(found[name].shape)
            raise MmsaeError(f"tensor {name!r} in {file} has the shape {shape} instead of {list(shapes[name])}.")
        if not torch.isfinite(found[name]).all():
            raise MmsaeError(f"tensor {name!r} in {file} has values that are not finite.")
    return found


def two_dimensional(tensors: Mapping[str, Any], name: str, file: Path) -> tuple[int, int]:
    """The shape of a matrix that tells how wide a dictionary is."""
    matrix = tensors.get(name)
    if not isinstance(matrix, Tensor) or matrix.ndim != 2:
        raise MmsaeError(f"{file} has no matrix {name!r}, so it does not say how wide the dictionary is.")
    return matrix.shape[0], matrix.shape[1]


def unit_rows(tensors: dict[str, Tensor]) -> None:
    """Decoder rows to norm 1, without changing what is selected or reconstructed; a zero row stays.

    Args:
        tensors: `W_enc` `[d_in, d_latent]` or absent, `W_dec` `[d_latent, d_out]`, `b_enc` and `threshold`; changed in
            place.
    """
    norms = tensors["W_dec"].norm(dim=-1)
    norms = torch.where(norms > 0, norms, 1.0)
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    for name in ("W_enc", "b_enc", "threshold"):
        if name in tensors:
            tensors[name] = tensors[name] * norms


@torch.no_grad()
def fill(core: LinearCore, tensors: Mapping[str, Tensor], centred: bool) -> LinearCore:
    """Put a foreign dictionary into a core of ours.

    Args:
        core: A fresh core of the right kind and size.
        tensors: float64: `W_enc` `[d_in, d_latent]`, as most libraries hold it, `b_enc`, `W_dec` `[d_latent, d_out]`,
            `b_dec`; `threshold` `[d_latent]` for JumpReLU and `[]` for BatchTopK, where negative is "never measured";
            `r_mag` and `b_mag` for Gated, whose gate has `b_enc`; `W_skip` `[d_out, d_in]` for skip transcoders.
        centred: Whether that library's encoder sees `x - b_dec`; the difference to ours goes into the bias.

    Returns:
        The core in `eval` mode, without gradients.
    """
    b_enc = tensors["b_enc"]
    if centred != core.subtracts_b_dec:
        shift = tensors["b_dec"] @ tensors["W_enc"]
        if isinstance(core, Gated):
            core.b_mag.copy_(tensors["b_mag"] + tensors["r_mag"].exp() * (-shift if centred else shift))
        b_enc = b_enc - shift if centred else b_enc + shift
    elif isinstance(core, Gated):
        core.b_mag.copy_(tensors["b_mag"])
    core.W_enc.copy_(tensors["W_enc"].t())
    core.b_enc.copy_(b_enc)
    core.W_dec.copy_(tensors["W_dec"])
    core.b_dec.copy_(tensors["b_dec"])
    if isinstance(core, Gated):
        core.r_mag.copy_(tensors["r_mag"])
    if isinstance(core, SkipTranscoder | JumpReLUSkipTranscoder):
        core.W_skip.copy_(tensors["W_skip"])
    if isinstance(core, JumpReLU):
        core.theta.copy_(tensors["threshold"].clamp_min(0))  # all libraries multiply by a ReLU as well
        core.unit.fill_(1)
    if isinstance(core, BatchTopK) and tensors["threshold"] >= 0:
        core.threshold.copy_(tensors["threshold"])
    return core.eval().requires_grad_(False)


def tensors_of(core: LinearCore, centred: bool) -> dict[str, Tensor]:
    """The inverse of `fill`: `W_enc` `[d_in, d_latent]`, `b_enc`, `W_dec`, `b_dec` in float64, and the core's own.

    Args:
        core: A folded core.
        centred: Whether the encoder that will read them sees `x - b_dec`.
    """
    tensors = {name: getattr(core, name).detach().cpu().double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    tensors["W_enc"] = tensors["W_enc"].t()
    own: dict[str, Any] = {"theta": JumpReLU, "threshold": BatchTopK, "r_mag": Gated, "b_mag": Gated}
    own["W_skip"] = SkipTranscoder | JumpReLUSkipTranscoder
    for name, cls in own.items():
        if isinstance(core, cls):
            tensors[name] = getattr(core, name).detach().cpu().double()
    if "theta" in tensors:
        tensors["threshold"] = tensors.pop("theta")
    if centred != core.subtracts_b_dec:
        shift = tensors["b_dec"] @ tensors["W_enc"]
        shift = shift if centred else -shift
        tensors["b_enc"] = tensors["b_enc"] + shift
        if "b_mag" in tensors:
            tensors["b_mag"] = tensors["b_mag"] + tensors["r_mag"].exp() * shift
    return tensors


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is written: contiguous and in float32."""
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def has_threshold(core: LinearCore) -> None:
    """Raise unless a core that needs an inference threshold has measured one."""
    if isinstance(core, BatchTopK) and core.threshold < 0:
        raise MmsaeError(f"this {type(core).__name__} has no inference threshold yet: train it before the export.")

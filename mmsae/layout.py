"""Activations as positions: one row per token, patch or pixel of a feature map, whatever layout the model uses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmsae.errors import MmsaeError


def to_positions(tensor: Tensor, channels_last: bool = False) -> tuple[Tensor, tuple[int, int] | None]:
    """Bring an activation into the form `[B, T, D]`.

    Args:
        tensor: `[B, T, D]` (tokens), `[B, D]` (one vector per example, T = 1) or `[B, C, H, W]` (maps, T = H * W).
        channels_last: Maps are `[B, H, W, C]`, as in Swin transformers.

    Returns:
        `[B, T, D]`, a view where possible, and `(H, W)` for maps, else None.

    Raises:
        MmsaeError: The tensor has another number of axes.
    """
    if tensor.dim() == 2:
        return tensor[:, None], None
    if tensor.dim() == 3:
        return tensor, None
    if tensor.dim() == 4:
        maps = tensor if channels_last else tensor.permute(0, 2, 3, 1)
        return maps.flatten(1, 2), (maps.shape[1], maps.shape[2])
    raise MmsaeError(
        f"an activation of shape {tuple(tensor.shape)} has no positions; hook a module whose output is "
        "[batch, width], [batch, tokens, width] or [batch, channels, height, width]."
    )


def from_positions(positions: Tensor, shape: Sequence[int], channels_last: bool = False) -> Tensor:
    """The inverse of `to_positions`.

    Args:
        positions: `[B, T, D]`.
        shape: Shape of the tensor that `to_positions` was given.
        channels_last: As given to `to_positions`.

    Returns:
        A tensor of that shape.
    """
    if len(shape) == 4 and not channels_last:
        batch, channels, height, width = shape
        return positions.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    return positions.reshape(tuple(shape))

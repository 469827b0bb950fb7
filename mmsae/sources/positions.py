"""Which positions of an activation become rows, and what is known of each."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from mmsae.errors import MmsaeError

Positions = Literal["all", "first", "patches", "last", "mean"]
"""`all` · the `first` or `last` position · ordinary `patches` of an image · the `mean` of the ordinary positions."""

ORDINARY, PREFIX, DELIMITER, REGISTER, PADDING = range(5)
"""Kinds of positions: a patch or word; CLS or BOS; end and separator; register; filled up, never read."""


def checked_positions(positions: str, drop_outliers: float | None, modality: str) -> None:
    """Refuse a choice of positions that cannot give rows."""
    if positions not in get_args(Positions):
        raise MmsaeError(f"positions={positions!r} is unknown; choose {', '.join(get_args(Positions))}.")
    if positions == "patches" and modality != "image":
        raise MmsaeError(f"positions='patches' needs images, but the source reads {modality}; choose 'all' or 'mean'.")
    if drop_outliers is not None and not drop_outliers > 1:
        raise MmsaeError(f"drop_outliers={drop_outliers:g} is a multiple of the median norm and must be above 1.")


def patch_grid(T: int, prefix: int, height: int, width: int) -> tuple[int, int, int]:
    """Where the patches of an image stand in a sequence of tokens.

    Args:
        T: Number of positions.
        prefix: Class and register tokens in front of the patches.
        height: Of the image, pixels.
        width: Of the image, pixels.

    Returns:
        Number of prefix tokens in this sequence (0 before they are put in front, as in `patch_embed`), and rows and
        columns of the patch grid; 0 rows when the patches do not tile the image.
    """
    if T == 1:  # a pooled vector stands nowhere
        return 0, 0, 0
    for first in (prefix, 0):
        rows = math.isqrt(max(T - first, 0) * height // width)
        if rows and (T - first) % rows == 0 and rows * width == (T - first) // rows * height:
            return first, rows, (T - first) // rows
    return (prefix if prefix < T else 0), 0, 0


def patch_kinds(B: int, T: int, first: int, registers: int) -> Tensor:
    """Kinds `[B, T]` of class tokens, registers and patches, in this order.

    Args:
        B: Number of examples.
        T: Number of positions.
        first: Class and register tokens in front of the patches.
        registers: How many of them are registers.
    """
    kinds = torch.full((T,), ORDINARY)
    kinds[:first] = PREFIX
    kinds[max(first - registers, 0) : first] = REGISTER
    return kinds.expand(B, T)


def grid_places(B: int, T: int, first: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every position, each `[B, T]`; -1 in front of `first`, and everywhere without a grid."""
    row = torch.full((T,), -1)
    column = torch.full((T,), -1)
    if rows:
        index = torch.arange(T - first)
        row[first:], column[first:] = index // columns, index % columns
    return row.expand(B, T), column.expand(B, T)


def choose(kinds: Tensor, positions: Positions, drop_special: bool) -> Tensor:
    """Boolean `[B, T]`: the positions that are wanted by their kind alone; padding is never among them.

    Args:
        kinds: `[B, T]`.
        positions: See `Positions`; first and last are those of the positions that `drop_special` leaves.
        drop_special: Leave out class tokens, delimiters and registers.
    """
    ordinary = kinds == ORDINARY
    if positions in ("patches", "mean"):
        return ordinary
    wanted = ordinary if drop_special else kinds != PADDING
    if positions == "all":
        return wanted
    index = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)
    if positions == "first":
        chosen = index.masked_fill(~wanted, kinds.shape[1]).amin(1, keepdim=True)
    else:
        chosen = index.masked_fill(~wanted, -1).amax(1, keepdim=True)
    return wanted & (index == chosen)


def ordinary_norms(acts: Tensor, wanted: Tensor, multiple: float) -> Tensor:
    """Boolean `[B, T]`: norms up to `multiple` times the median norm of the wanted positions of the batch.

    A few positions of large models carry norms a hundred times those of the others; a dictionary would spend itself
    on them.
    """
    norms = acts.float().norm(dim=-1)  # [B, T]
    limit = multiple * norms[wanted].nanmedian() if wanted.any() else norms.new_tensor(0.0)
    return ~(norms > limit) | ~norms.isfinite()  # what is not finite stays, to be reported instead of dropped


def pooled(acts: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen positions of every example that has some: `[B, T, D]` to `[rows, D]`."""
    has = chosen.any(1)
    total = acts.float().masked_fill(~chosen[..., None], 0).sum(1)  # filled, not multiplied: padding may hold NaN
    return (total[has] / chosen.sum(1, keepdim=True)[has]).to(acts.dtype)

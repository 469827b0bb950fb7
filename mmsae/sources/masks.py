"""Segmentation masks as labels of patches: a mask follows its picture through whatever the model does to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmsae.errors import MmsaeError


def mask_of(item: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The mask of an item, int64 [height, width], from `item["mask"]`: a picture, a path or an array.

    With names of its values (`item["mask_names"]`) every value has one, or is 255 and becomes -1: unknown.

    Args:
        item: With whole numbers, one per pixel, as gray levels or palette indices.
        size: Width and height of its picture.
    """
    mask, name = item["mask"], f"item {item.get('sample_id')}"
    if isinstance(mask, str | Path):
        name = repr(str(mask))
        try:
            with Image.open(mask) as opened:
                mask = np.array(opened)
        except FileNotFoundError as error:
            raise MmsaeError(f"there is no mask {name} (item {item.get('sample_id')}).") from error
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise MmsaeError(f"the mask {name} cannot be read ({error}); replace it or leave it out.") from error
    values = np.asarray(mask)
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise MmsaeError(f"the mask of {name} has shape {values.shape} ({values.dtype}); give a whole number a pixel.")
    if values.shape != size[::-1]:
        raise MmsaeError(
            f"the mask of {name} has {values.shape[1]}x{values.shape[0]} pixels but its picture {size[0]}x{size[1]}."
        )
    values = values.astype(np.int64)
    names = item.get("mask_names") or ()
    if not names:
        return values
    values = np.where((values == 255) & (len(names) < 256), -1, values)
    if values.max() >= len(names):
        raise MmsaeError(f"the mask of {name} has the value {values.max()}, but mask_names has {len(names)} names.")
    return values


def origins(transform: Callable[[Any], Tensor], size: tuple[int, int]) -> Tensor:
    """Which pixel of a picture each pixel of its transform comes from, int64 `[H, W]` of the flattened picture, or -1.

    Found by transforming ramps, so it holds for any scaling, cropping, flipping and padding.

    Args:
        transform: From an RGB picture to `[C, H, W]`; must not be random.
        size: Width and height of the picture.
    """
    width, height = size
    along_x = np.broadcast_to(np.linspace(0, 255, width).round(), (height, width))
    along_y = np.broadcast_to(np.linspace(0, 255, height).round()[:, None], (height, width))

    def transformed(gray: np.ndarray) -> Tensor:
        return transform(Image.fromarray(np.repeat(gray[..., None], 3, -1).astype(np.uint8)))[0].double()

    black, white = (transformed(np.full((height, width), level)) for level in (0, 255))
    span = white - black
    filled = span.abs() > 1e-6  # what is the same for every picture was filled in
    x, y = ((transformed(ramp) - black) / torch.where(filled, span, 1.0) for ramp in (along_x, along_y))
    column = (x * (width - 1)).round().long().clamp(0, width - 1)
    row = (y * (height - 1)).round().long().clamp(0, height - 1)
    return torch.where(filled, row * width + column, -1)


def majority(mask: Tensor, rows: int, columns: int) -> Tensor:
    """The most frequent value in each cell of a grid, int64 `[B, rows * columns]`; -1 where nothing is known.

    Args:
        mask: Values from 0 on, or -1, int64 `[B, H, W]`.
        rows: Of the grid.
        columns: Of the grid.
    """
    B, H, W = mask.shape
    cell = (torch.arange(H) * rows // H)[:, None] * columns + torch.arange(W) * columns // W  # [H, W]
    cell = (torch.arange(B)[:, None, None] * rows * columns + cell).flatten()
    n_values = int(mask.max()) + 2
    counts = torch.bincount(cell * n_values + mask.flatten() + 1, minlength=B * rows * columns * n_values)
    counts = counts.view(B, rows * columns, n_values)
    known = counts[..., 1:].sum(-1) > 0
    return torch.where(known, counts[..., 1:].argmax(-1) if n_values > 1 else -1, -1)

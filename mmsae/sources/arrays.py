"""Pictures as arrays: any number of channels, any precision, as microscopes, scanners and satellites make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmsae.errors import MmsaeError


def array_of(item: dict[str, Any]) -> np.ndarray:
    """The picture under `item["array"]`, float32 `[C, H, W]`; MmsaeError naming an item that has none, or a bad one."""
    values = np.asarray(item.get("array"))
    if values.ndim != 3 or values.dtype.kind not in "biuf" or 0 in values.shape:
        raise MmsaeError(
            f"the array of item {item.get('sample_id')} has shape {values.shape} ({values.dtype}); give numbers "
            "[channels, height, width]."
        )
    return values.astype(np.float32, copy=False)


class ArrayInput:
    """From an array to what a model reads: resized to its size (bilinear, smoothed), then `(x - mean) / std`.

    Args:
        size: Height and width that the model reads.
        mean: One number per channel.
        std: One number per channel.
    """

    def __init__(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std):
            raise MmsaeError(f"mean has {len(mean)} numbers and std {len(std)}; give one per channel.")
        self.size = size
        self.mean, self.std = (torch.tensor([float(x) for x in of])[:, None, None] for of in (mean, std))

    @property
    def n_channels(self) -> int:
        """How many channels the model reads."""
        return len(self.mean)

    def __call__(self, item: dict[str, Any]) -> Tensor:
        """`[C, H, W]`, float32."""
        values = array_of(item)
        if len(values) != self.n_channels:
            raise MmsaeError(
                f"item {item.get('sample_id')} has {len(values)} channels but the model reads {self.n_channels}; "
                "choose them, e.g. --data.channels='[0, 0, 0]' for a gray picture."
            )
        x = torch.tensor(values)[None]  # a copy: the array may be that of a file
        return (interpolate(x, self.size, mode="bilinear", antialias=True)[0] - self.mean) / self.std

    def origins(self, size: tuple[int, int]) -> Tensor:
        """Which pixel of an array of this width and height each pixel of the input is of, int64 `[H, W]`, flattened."""
        width, height = size
        row, column = (
            ((torch.arange(n) + 0.5) * of / n).long() for n, of in zip(self.size, (height, width), strict=True)
        )
        return row[:, None] * width + column


def as_picture(values: np.ndarray) -> Any:
    """One or three channels as an RGB picture of 8 bits; values outside 0..1 are stretched from smallest to largest."""
    from PIL import Image

    values = np.nan_to_num(values.astype(np.float32))
    if values.min() < 0 or values.max() > 1:
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    gray = (values * 255).round().astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(gray, (*gray.shape[:2], 3))))


def example_arrays(n_channels: int, size: tuple[int, int], n: int = 2) -> list[dict[str, Any]]:
    """Plain arrays of a number of channels."""
    return [{"array": np.full((n_channels, *size), 0.3 * (i + 1), np.float32), "sample_id": i} for i in range(n)]

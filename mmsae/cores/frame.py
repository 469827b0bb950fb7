"""The affine maps between a stream and a dictionary that stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmsae.cores.base import Affine


class Frame(nn.Module):
    """`read(x) = (x - centre) @ scale + shift` before a dictionary, `write(u) = u @ unscale + offset` behind it.

    At first both do nothing. `fold` puts a normalisation outside of them, and `VLSAE.align` an autoencoder in between.
    Nothing here learns.

    Args:
        width: Of the stream.
    """

    centre: Tensor
    scale: Tensor
    shift: Tensor
    unscale: Tensor
    offset: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))  # or a matrix [width, inner]
        self.register_buffer("shift", torch.zeros(()))  # or [inner]
        self.register_buffer("unscale", torch.ones(()))  # or a matrix [inner, width]
        self.register_buffer("offset", torch.zeros(width))

    def read(self, x: Tensor) -> Tensor:
        """From a stream `[..., width]`, in any precision, to what the dictionary codes, `[..., inner]`."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.centre.dtype) - self.centre
            return times(x, self.scale) + self.shift

    def write(self, u: Tensor) -> Tensor:
        """From what the dictionary reconstructs `[..., inner]` to the stream `[..., width]`."""
        with torch.autocast(u.device.type, enabled=False):
            return self.rows(u.to(self.offset.dtype)) + self.offset

    def rows(self, u: Tensor) -> Tensor:
        """As `write`, for differences."""
        return times(u, self.unscale)

    @torch.no_grad()
    def fold(self, affine: Affine) -> None:
        """So far the stream came normalised; from now on it comes raw."""
        scale, inverse, mean = affine.scale.double(), affine.inverse_scale().double(), affine.mean.double()
        old = {name: buffer.double() for name, buffer in self.named_buffers()}
        self.put(
            centre=mean + times(old["centre"], inverse),
            scale=both(scale, old["scale"]),
            shift=old["shift"],
            unscale=both(old["unscale"], inverse),
            offset=times(old["offset"], inverse) + mean,
        )

    @torch.no_grad()
    def put(self, **buffers: Tensor) -> None:
        """Other values, of other shapes if need be, in the precision and on the device that are there."""
        for name, value in buffers.items():
            setattr(self, name, value.to(getattr(self, name)).clone(memory_format=torch.contiguous_format))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes over numbers that have become matrices."""
        for name, buffer in list(self.named_buffers()):
            found = state_dict.get(prefix + name)
            if found is not None and found.shape != buffer.shape and name in ("scale", "shift", "unscale"):
                setattr(self, name, buffer.new_zeros(found.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def times(x: Tensor, scale: Tensor) -> Tensor:
    """`x` times a number, or a matrix."""
    return x * scale if scale.ndim == 0 else x @ scale


def both(first: Tensor, then: Tensor) -> Tensor:
    """Two scales, each a number or a matrix, one after the other."""
    return first @ then if first.ndim and then.ndim else first * then

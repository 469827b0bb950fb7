"""Centring, scaling and whitening of activations: estimated once, stored in buffers, folded away at the export."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmsae.cores import Affine
from mmsae.errors import MmsaeError
from mmsae.store import Statistics, shards

Mode = Literal["none", "center", "scale", "center_scale", "whiten"]

SHRINKAGE = 1e-3
"""Added to the eigenvalues before whitening, as a share of their mean: directions without variance stay small."""

EQUAL = 1e-12
"""Variance, as a share of the mean squared norm, up to which activations count as equal: float64 sums leave a rest."""


class Normaliser(nn.Module):
    """`(x - mean) @ scale` for one stream.

    Args:
        width: Of the stream.
        mode: "none"; "center" subtracts the mean; "scale" divides so that the mean squared norm is the width;
            "center_scale" does both; "whiten" makes the covariance the identity (ZCA).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, mode: Mode) -> None:
        super().__init__()
        self.width, self.mode = width, mode
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.eye(width) if mode == "whiten" else torch.ones(()))

    def fit(self, statistics: Statistics) -> None:
        """Set mean and scale from the moments of the data."""
        mean = statistics.mean.double().cpu()
        centred_square = statistics.mean_square - float(mean.pow(2).sum())
        if self.mode in ("center", "center_scale", "whiten"):
            self.mean.copy_(mean)
        if self.mode in ("scale", "center_scale", "whiten"):
            square = statistics.mean_square if self.mode == "scale" else centred_square
            if square <= EQUAL * statistics.mean_square:
                raise MmsaeError("all activations are equal: there is no scale to normalise by, and nothing to learn.")
        if self.mode in ("scale", "center_scale"):
            self.scale.fill_((self.width / square) ** 0.5)
        if self.mode == "whiten":
            if statistics.covariance is None:
                raise MmsaeError("normalise=whiten needs the covariance: extract with --model.covariance=true.")
            eigenvalues, vectors = torch.linalg.eigh(statistics.covariance.double().cpu())
            eigenvalues = eigenvalues.clamp_min(0) + SHRINKAGE * eigenvalues.clamp_min(0).mean()
            self.scale.copy_((vectors * eigenvalues.rsqrt()) @ vectors.T)

    @property
    def affine(self) -> Affine:
        """The map, for `SAECore.fold`."""
        return Affine(self.mean, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """From raw `[rows, width]` in any precision to normalised float32."""
        x = x.float()
        return x if self.mode == "none" else self.affine.apply(x)

    def slope(self, g: Tensor) -> Tensor:
        """From gradients by raw activations `[rows, width]` to those by normalised ones."""
        inverse = self.affine.inverse_scale().to(self.scale)
        return g.float() * inverse if inverse.ndim == 0 else g.float() @ inverse.t()

    def invert(self, x: Tensor) -> Tensor:
        """From normalised to raw."""
        return x if self.mode == "none" else self.affine.invert(x)


def moments(x: Tensor, covariance: bool) -> Statistics:
    """Moments of a sample of rows `[rows, width]`, in float64, as a store has them of all its rows."""
    return Statistics.of(shards.moments(x, covariance), len(x))

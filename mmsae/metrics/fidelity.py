"""Does the reconstruction keep the activation, and how sparse is the code?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mmsae.codes import Codes


class Fidelity(Metric):
    """Fidelity and sparsity over a whole split, accumulated in float64 and over all devices.

    `fvu = sum ||x - x_hat||^2 / sum ||x - mean x||^2` with the mean over everything seen (not batch by batch, which
    gives another number), `explained_variance = 1 - fvu`, `l0` (of each code),
    `dead_fraction` (latents that never fired on what was
    seen), `cosine` (mean over rows), `shrinkage` (`E<x_hat, x> / E||x||^2` about the mean) and
    `relative_bias` (`E||x_hat||^2 / E<x, x_hat>`; 1 is unbiased).

    Args:
        d_in: Width of the activations.
        d_latent: Number of latents.
    """

    full_state_update = False

    n: Tensor
    coded: Tensor
    total: Tensor
    square: Tensor
    error: Tensor
    reconstructed: Tensor
    product: Tensor
    cosines: Tensor
    active: Tensor
    firings: Tensor
    reconstruction_total: Tensor

    def __init__(self, d_in: int, d_latent: int) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        for name in ("square", "error", "reconstructed", "product", "cosines", "active"):
            self.add_state(name, zero.clone(), dist_reduce_fx="sum")
        self.add_state("coded", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("reconstruction_total", torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("firings", torch.zeros(d_latent, dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Fidelity:
        """To another device, but never to another precision: sums stay in float64."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep, *args, **kwargs)
        return self

    def update(self, x: Tensor, reconstruction: Tensor, codes: Codes) -> None:
        """Add rows.

        Args:
            x: Raw activations `[rows, d_in]`.
            reconstruction: Of them, in the same units.
            codes: Of them.
        """
        x, out = x.double(), reconstruction.double()
        self.n += len(x)
        self.total += x.sum(0)
        self.reconstruction_total += out.sum(0)
        self.square += x.pow(2).sum()
        self.error += (x - out).pow(2).sum()
        self.reconstructed += out.pow(2).sum()
        self.product += (x * out).sum()
        self.cosines += torch.nn.functional.cosine_similarity(x, out, dim=-1).sum()
        self.coded += codes.values.shape[:-1].numel()  # several codes for a row of several streams
        self.active += codes.l0().sum()
        self.firings += codes.firings()

    def compute(self) -> dict[str, Tensor]:
        """The numbers by name; NaN where nothing was seen."""
        n = self.n.double()
        mean = self.total / n
        spread = self.square - n * mean.pow(2).sum()
        fvu = self.error / spread
        centred_product = self.product - (mean * self.reconstruction_total).sum()
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "l0": self.active / self.coded,
            "dead_fraction": (self.firings == 0).double().mean(),
            "cosine": self.cosines / n,
            "shrinkage": centred_product / spread,
            "relative_bias": self.reconstructed / self.product,
            "mse": self.error / n,
        }

    def numbers(self) -> dict[str, float]:
        """The same as plain numbers."""
        return {name: float(value) for name, value in self.compute().items()}

    def density(self) -> Tensor:
        """Share of codes in which each latent fires, `[d_latent]`; call after a compute over all devices."""
        return self.firings.double() / self.coded.clamp_min(1)

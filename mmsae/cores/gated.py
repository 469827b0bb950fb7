"""Gated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import Affine, Losses, squared_error
from mmsae.cores.linear import LinearCore
from mmsae.errors import checked
from mmsae.kernels import dense_linear, linear_above, sparse_decode
from mmsae.spec import ActivationSpec, Batch


class Gated(LinearCore):
    """A gate decides whether a latent is on, a magnitude how much: an L1 price without shrinkage (arXiv 2404.16014).

    With `c = x - b_dec`, the gate is `c @ W_enc.T + b_enc` and the magnitude `relu(exp(r_mag) (c @ W_enc.T) + b_mag)`.
    The step of the gate has no gradient; the gate learns from its own price and from a reconstruction by its positive
    part through a frozen decoder. Presumes activations scaled to a mean squared norm of `d_in`
    (`--model.normalise=center_scale`). The paper's optimizer is Adam with betas (0, 0.999).

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        l1_coefficient: Price of a unit of the gate's positive part (dictionary_learning's default; the paper sweeps).
        decoder_norm: "unit" as in the paper; "free" puts the decoder norm into the price.
    """

    selects_per_latent: ClassVar[bool] = True

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        l1_coefficient: float = 0.1,
        decoder_norm: Literal["unit", "free"] = "unit",
    ) -> None:
        super().__init__(spec, d_latent, decoder_norm, init_norm=0.1 if decoder_norm == "free" else 1.0)
        self.l1_coefficient = checked("l1_coefficient", l1_coefficient, 0)
        self.r_mag = nn.Parameter(torch.zeros(d_latent))
        self.b_mag = nn.Parameter(torch.zeros(d_latent))

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """Magnitudes where the gate is open: a pair list when few are, else dense, since nobody bounds how many."""
        return self._open(x)[0]

    def _open(self, x: Tensor | dict[str, Tensor]) -> tuple[Codes, Codes]:
        """Codes, and the positive part of the gate in the same layout."""
        x, table, bias, centre = self.encoder(x)
        # without its bias the product serves both paths
        found = linear_above(x, table, None, -bias.detach(), centre, padding=-torch.inf)
        opening: tuple[Tensor, ...] = bias, self.r_mag, self.b_mag
        if found is None:
            product, indices = dense_linear(x if centre is None else x - centre, table), None
        else:
            product, indices = found
            opening = tuple(t.index_select(0, indices.flatten()).view_as(product) for t in opening)
        bias, r_mag, b_mag = opening
        on = product + bias > 0
        product = torch.where(on, product, 0.0)  # not a factor: padding is minus infinity
        gate = torch.where(on, product + bias, 0.0)
        magnitude = torch.where(on, (product * r_mag.exp() + b_mag).relu(), 0.0)
        return Codes(magnitude, indices, self.d_latent), Codes(gate, indices, self.d_latent)

    def losses(self, batch: Batch) -> Losses:
        """Squared error, price of the gate, squared error of the gate's own reconstruction."""
        target = self.target(batch)
        codes, gate = self._open(self.inputs(batch))
        reconstruction = self.decode(codes)
        by_gate = self._frozen_decode(gate)
        price = gate.values
        if self.decoder_norm == "free":
            norms = self.W_dec.norm(dim=-1)
            if gate.indices is not None:
                norms = norms.index_select(0, gate.indices.flatten()).view_as(price)
            price = price * norms
        terms = {
            "reconstruction": squared_error(target, reconstruction),
            "sparsity": self.l1_coefficient * price.sum(-1).mean(),
            "gate": squared_error(target, by_gate),
        }
        return Losses(terms, codes, reconstruction)

    def _frozen_decode(self, gate: Codes) -> Tensor:
        """Reconstruction from the gate that does not train the decoder."""
        if gate.indices is None:
            return dense_linear(gate.values, self.W_dec.detach().t()) + self.b_dec.detach()
        return sparse_decode(gate.values, gate.indices, self.W_dec.detach()) + self.b_dec.detach()

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """As for any linear encoder; the magnitude's bias takes up the mean as the gate's does."""
        super().fold(affine)
        if not self.subtracts_b_dec:
            mean = affine[self.spec.input].mean.to(self.W_enc.dtype)
            self.b_mag.sub_(self.r_mag.exp() * (self.W_enc @ mean))

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Codes times `factor`: both biases; `r_mag` is a ratio."""
        super().rescale(factor)
        self.b_mag.mul_(factor)

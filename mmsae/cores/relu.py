"""ReLU with an L1 penalty."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.base import Losses
from mmsae.cores.linear import LinearCore
from mmsae.errors import checked
from mmsae.kernels import linear_above
from mmsae.spec import ActivationSpec, Batch


class ReLU(LinearCore):
    """Keeps positive pre-activations and pays an L1 price for them (Transformer Circuits, April 2024 update).

    The price is `l1_coefficient * sum_i z_i ||w_i||` beside the squared error summed over the width, so it presumes
    activations scaled to a mean squared norm of `d_in` (`--model.normalise=center_scale`).

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        l1_coefficient: Price of a unit of code.
        decoder_norm: "free" puts the decoder norm into the price; "unit" is the older recipe.
    """

    centres_input: ClassVar[bool] = False
    selects_per_latent: ClassVar[bool] = True

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        l1_coefficient: float = 5.0,
        decoder_norm: Literal["free", "unit"] = "free",
    ) -> None:
        super().__init__(spec, d_latent, decoder_norm, init_norm=0.1 if decoder_norm == "free" else 1.0)
        self.l1_coefficient = checked("l1_coefficient", l1_coefficient, 0)

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """Positive part: a pair list when few fire, else dense, since nobody bounds how many do."""
        x, table, bias, centre = self.encoder(x)
        found = linear_above(x, table, bias, torch.zeros_like(bias), centre)
        values, indices = found or (self.pre_activations(x), None)
        return Codes(values.relu(), indices, self.d_latent)

    def losses(self, batch: Batch) -> Losses:
        """Squared error and L1."""
        losses = super().losses(batch)
        codes, norms = losses.codes, self.decoder_norms()
        if codes.indices is None:
            price = codes.values @ norms
        else:
            price = (codes.values * norms.index_select(0, codes.indices.flatten()).view_as(codes.values)).sum(-1)
        losses.terms["sparsity"] = self.l1_coefficient * price.mean()
        return losses

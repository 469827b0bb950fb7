"""BatchTopK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import linear_above, linear_batch_topk
from mmsae.spec import ActivationSpec, Batch


class BatchTopK(TopK):
    """Keeps the k * batch largest pre-activations of the whole batch (arXiv 2412.06410; Mutual Choice, 2411.02124).

    Rows share the budget while training. In `eval` a latent fires above a threshold, the running mean of the smallest
    activation that was kept, so that the code of a row does not depend on its neighbours.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Latents kept per activation, on average over a batch.
        aux_coefficient: Weight of AuxK; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
        threshold_decay: Decay of the running mean per step.
    """

    reduce: ClassVar[Mapping[str, str]] = {"threshold": "mean"}

    threshold: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
        threshold_decay: float = 0.99,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        self.threshold_decay = checked("threshold_decay", threshold_decay, 0, 1)
        self.register_buffer("threshold", torch.full((), -1.0, dtype=torch.float64))  # -1: never measured

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """Over the batch while training, by the threshold otherwise."""
        x, table, bias, centre = self.encoder(x)
        if self.training:
            n_rows = x.shape[:-1].numel()
            return Codes(*linear_batch_topk(x, table, bias, self.k * n_rows, centre), self.d_latent)
        if self.threshold < 0:
            raise MmsaeError(
                f"{type(self).__name__} has no inference threshold yet: train it for at least one step, or call train()"
            )
        found = linear_above(x, table, bias, self.threshold.to(x.dtype).expand(self.d_latent), centre)
        values, indices = found or (self.pre_activations(x), None)
        return Codes(values * (values > self.threshold), indices, self.d_latent).sparse()

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Unit rows; the threshold follows the smallest activation kept, in float64."""
        super().after_step(step, codes)
        kept = codes.values.detach().double()
        smallest = torch.where(kept > 0, kept, torch.inf).min()
        smallest = torch.where(smallest.isinf(), self.threshold, smallest)  # nothing fired: stay
        mixed = self.threshold_decay * self.threshold + (1 - self.threshold_decay) * smallest
        self.threshold.copy_(torch.where(self.threshold < 0, smallest, mixed))

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Codes times `factor`, which is the same for all latents here; so is the threshold's."""
        super().rescale(factor)
        if self.threshold >= 0:
            self.threshold.mul_(factor[0])

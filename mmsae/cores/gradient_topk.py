"""TopK that also looks at what the model would do with a latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmsae.codes import Codes
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError, checked
from mmsae.kernels.pairs import Pairs
from mmsae.kernels.products import encode_pairs
from mmsae.spec import GRADS, ActivationSpec, Batch

CHUNK = 2**24
"""Scores held at a time."""


class GradientTopK(TopK):
    """g-SAE: the k latents that are strong and matter to the model's loss (arXiv 2411.10397).

    With `a = relu(pre-activation)`, decoder row `w` and the gradient `g` of the model's loss by the activation, the
    score of a latent is `a + gradient_weight * a * |w . g| / mean |g|`; the values kept are `a`. Rows carry gradients
    with `data.gradients=true`. What is selected in `eval` depends on `gradients_in_eval`; in our runs the gain exists
    only with gradients there too, which leak the truth that the loss was measured against (docs/cores.md).

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Latents kept per activation.
        gradient_weight: Share of the gradient in the score (beta); 0 is TopK. Scale-free: gradients are divided by a
            running mean of their norm.
        gradients_in_eval: Whether `encode` needs gradients in `eval` too; otherwise it is that of TopK there.
        aux_coefficient: Weight of AuxK; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
    """

    needs: ClassVar[frozenset[str]] = frozenset({GRADS})
    reduce: ClassVar[Mapping[str, str]] = {"gradient_norm": "mean"}

    gradient_norm: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        gradient_weight: float = 1.0,
        gradients_in_eval: bool = False,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        self.gradient_weight = checked("gradient_weight", gradient_weight, 0)
        self.gradients_in_eval = gradients_in_eval
        self.register_buffer("gradient_norm", torch.ones(()))

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """As TopK; the scale of the gradients."""
        super().start(batch)
        self.gradient_norm.copy_(self._slopes(batch).norm(dim=-1).mean().clamp_min(1e-12))

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """The k largest scores of each row; `batch` has the gradients."""
        if not (self.training or self.gradients_in_eval):
            return super().encode(x)
        slopes = self._slopes(batch)
        x, table, bias, centre = self.encoder(x)
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            indices = self._choose(rows, slopes.reshape(len(rows), -1))
            values = encode_pairs(rows, table, bias, Pairs.of(indices, self.d_latent), centre)
        shape = (*x.shape[:-1], self.k)
        return Codes(values.view(shape).relu(), indices.view(shape), self.d_latent)

    def losses(self, batch: Batch) -> Any:
        """As TopK; the scale of the gradients follows them."""
        if self.training:
            with torch.no_grad():
                self.gradient_norm.lerp_(self._slopes(batch).norm(dim=-1).mean().clamp_min(1e-12), 0.01)
        return super().losses(batch)

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Decoder rows become shorter as codes grow, and the score stays in proportion."""
        super().rescale(factor)
        self.gradient_norm.div_(factor.mean())

    @torch.no_grad()
    def _choose(self, x: Tensor, slopes: Tensor) -> Tensor:
        """Latents `[n, k]` of the largest scores, without all scores at a time."""
        inner = x - self.b_dec if self.subtracts_b_dec else x
        parts = []
        for rows, slope in zip(*(t.split(max(CHUNK // self.d_latent, 1)) for t in (inner, slopes)), strict=True):
            score = linear(rows, self.W_enc, self.b_enc).relu_()
            effect = linear(slope, self.W_dec).abs_().mul_(self.gradient_weight / self.gradient_norm).add_(1)
            parts.append(score.mul_(effect).topk(self.k, dim=-1, sorted=False).indices)
        return torch.cat(parts)

    def _slopes(self, batch: Batch | None) -> Tensor:
        if batch is None or GRADS not in batch:
            raise MmsaeError(
                f"{type(self).__name__} selects by gradients of the model's loss: set data.gradients=true."
            )
        return batch[GRADS][self.outputs[0]].to(self.W_dec.dtype)

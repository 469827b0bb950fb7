"""top-AFA: the norm of the activation says how many latents fire."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.base import Affine, Losses
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import linear_topk
from mmsae.spec import TARGET, ActivationSpec, Batch


class TopAFA(TopK):
    """Keeps, row by row, the largest pre-activations whose joint norm comes closest to the input's: no k to choose
    (arXiv 2503.24277).

    If decoder rows are nearly orthogonal, a code is as long as what it encodes. Where they are, and the dictionary is
    right, this finds the number of active features; training does not find it (see docs/cores.md: an L0 of ten times
    the truth and more), so set `k_max`, or use the estimate to judge other dictionaries (`mmsae.metrics.afa`).

    As in the authors' code the encoder has no bias (`b_enc` stays 0), and the norms that `afa_coefficient` draws
    together are of the code and of the input before `b_dec` is subtracted.

    Args:
        spec: Width of the only stream; a transcoder's output has another norm than its input.
        d_latent: Number of latents.
        k_max: Most latents kept per activation; None is no limit.
        afa_coefficient: Weight of the squared difference of the norms, in units of the variance per dimension.
        aux_coefficient: Weight of AuxK, the share of the residual that dead latents fail to explain; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
    """

    frame: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k_max: int | None = None,
        afa_coefficient: float = 1 / 32,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        limit = d_latent if k_max is None else checked("k_max", k_max, 1, d_latent)
        super().__init__(spec, d_latent, limit, aux_coefficient, k_aux, dead_after)
        self.k_max = k_max
        if TARGET in self.spec.streams:
            raise MmsaeError("TopAFA compares norms of code and input, so it cannot be a transcoder: use BatchTopK.")
        self.afa_coefficient = checked("afa_coefficient", afa_coefficient, 0)
        self.b_enc.requires_grad_(False)
        self.register_buffer("frame", torch.eye(self.spec.d_in))  # takes raw inputs to where norms were compared
        self._width = min(64, self.k)  # candidates looked at first; what is found does not depend on it

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """The largest of each row until their norm is the input's; `extra["k"]` says how many."""
        x, table, bias, centre = self.encoder(x)
        assert centre is not None
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            norm = ((x - centre) @ self.frame).norm(dim=-1)
        while True:
            values, indices = linear_topk(x, table, bias, self._width, centre)
            values = values.relu()
            if self._width == self.k or (values.detach().norm(dim=-1) >= norm).all():
                break  # more candidates could only make the code longer
            self._width = min(2 * self._width, self.k)
        order = values.detach().argsort(dim=-1, descending=True, stable=True)
        values, indices = values.gather(-1, order), indices.gather(-1, order)
        k = matching_l0(values.detach(), norm)
        width = int(k.max()) if k.numel() else 1
        kept = torch.arange(width, device=x.device) < k[..., None]
        return Codes(values[..., :width] * kept, indices[..., :width].contiguous(), self.d_latent, {"k": k})

    def losses(self, batch: Batch) -> Losses:
        """The terms of TopK, and the distance of the norms of codes from those of inputs."""
        losses = super().losses(batch)
        if self.afa_coefficient:
            gap = losses.codes.values.norm(dim=-1) - self.inputs(batch).norm(dim=-1)
            losses.terms["afa"] = self.afa_coefficient * gap.pow(2).mean() * self.spec.d_in / self.variance
        return losses

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation; norms are still compared where training compared them."""
        super().fold(affine)
        scale = affine[self.spec.input].scale.to(self.frame.dtype)
        self.frame.copy_(scale * self.frame if scale.ndim == 0 else scale @ self.frame)

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Codes times `factor`, which is the same for all latents here; so are the norms."""
        super().rescale(factor)
        self.frame.mul_(factor[0])


def matching_l0(magnitudes: Tensor, norm: Tensor) -> Tensor:
    """How many of the largest entries of a code come closest in norm to the activation.

    Args:
        magnitudes: Entries times decoder norms, in descending order, not negative, `[..., n]`.
        norm: Of the activations, `[...]`.

    Returns:
        int64 `[...]`, at least 1.
    """
    reached = magnitudes.pow(2).cumsum(-1).sqrt()
    return (reached - norm[..., None]).abs().argmin(-1) + 1

"""TopK with the auxiliary loss that revives dead latents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmsae.codes import Codes
from mmsae.cores.base import Losses, geometric_median, squared_error, variance
from mmsae.cores.linear import LinearCore
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import CROSSOVER, dense_linear, linear_topk, sparse_decode
from mmsae.spec import TARGET, ActivationSpec, Batch


class TopK(LinearCore):
    """Keeps the k largest pre-activations of each row (arXiv 2406.04093).

    The main term is the squared error over the variance of the data, an FVU, so no coefficient depends on the scale.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Latents kept per activation.
        aux_coefficient: Weight of AuxK, the share of the residual that dead latents fail to explain; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
    """

    variance: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        if k > d_latent:
            raise MmsaeError(f"k={k} is larger than d_latent={d_latent}: choose k of at most {d_latent}.")
        super().__init__(spec, d_latent)
        self.k = checked("k", k, 1)
        self.aux_coefficient = checked("aux_coefficient", aux_coefficient, 0)
        self.k_aux = k_aux if k_aux is None else checked("k_aux", k_aux, 1)
        self.dead_after = checked("dead_after", dead_after, 1)
        self.register_buffer("variance", torch.ones(()))

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """The k largest of each row, their positive part; of largest magnitude where codes are `signed`."""
        x, table, bias, centre = self.encoder(x)
        values, indices = linear_topk(x, table, bias, self.k, centre, self.signed)
        return Codes(self.rectify(values), indices, self.d_latent)

    def rectify(self, pre: Tensor) -> Tensor:
        """The positive part, unless codes are `signed`."""
        return pre if self.signed else pre.relu()

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """`b_dec` at the geometric median of at most 32,768 rows; the variance that the main term is divided by."""
        target = self.target(batch).float()[:32768]
        self.b_dec.copy_(target.mean(0) if TARGET in self.spec.streams else geometric_median(target))
        self.variance.copy_(variance(target).clamp_min(1e-12))

    def losses(self, batch: Batch) -> Losses:
        """Fraction of variance unexplained, and AuxK once latents have died."""
        x, target = self.inputs(batch), self.target(batch)
        codes = self.encode(x, batch)
        terms, reconstruction = self.reconstruct(target, codes)
        terms |= self.auxiliary(x, target, reconstruction)
        return Losses(terms, codes, reconstruction)

    def reconstruct(self, target: Tensor, codes: Codes) -> tuple[dict[str, Tensor], Tensor]:
        """The main term, and the reconstruction."""
        reconstruction = self.joined(self.decode(codes))
        return {"reconstruction": squared_error(target, reconstruction) / self.variance}, reconstruction

    def idle_latents(self) -> Tensor:
        """Latents that AuxK teaches, int64 `[n]`: the dead ones."""
        return self.dead_latents(self.dead_after)

    def auxiliary(self, x: Tensor | dict[str, Tensor], target: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """AuxK with its weight; nothing in `eval` or where it is switched off."""
        if not (self.aux_coefficient and self.training):
            return {}
        return {"aux": self.aux_coefficient * self.auxk(x, (target - reconstruction).detach())}

    def auxk(self, x: Tensor | dict[str, Tensor], residual: Tensor) -> Tensor:
        """Share of the residual's variance that the best `k_aux` dead latents leave unexplained (0 if none is dead)."""
        x, table, bias, centre = self.encoder(x)
        k_aux = self.k_aux or max(len(self.b_dec) // 2, 1)
        dead = self.idle_latents()
        return explain(residual, x, table, bias, self.decoder_rows, dead, k_aux, centre, self.signed)


def explain(
    residual: Tensor,
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    rows: Tensor,
    dead: Tensor,
    k_aux: int,
    centre: Tensor | None = None,
    signed: bool = False,
) -> Tensor:
    """AuxK: the share of the residual's variance that the best dead latents leave unexplained; 0 if none is dead.

    Only dead latents are computed: as a dense matrix while they are few, as pairs when they are many.

    Args:
        residual: What is to be explained, `[n, d_out]`, without gradients.
        x: `[n, d_in]`.
        table: Encoder rows `[d_latent, d_in]`.
        bias: `[d_latent]`.
        rows: Decoder rows `[d_latent, d_out]`.
        dead: Latents that may explain it, int64 `[n_dead]`.
        k_aux: How many of them per row.
        centre: Subtracted from x, `[d_in]`.
        signed: Whether codes may be negative.
    """
    if len(dead) == 0:
        return residual.new_zeros(())
    k_aux = min(k_aux, len(dead))
    table, bias, rows = (t.index_select(0, dead) for t in (table, bias, rows))
    # no b_dec in the explanation: the residual has none
    if len(dead) < CROSSOVER * k_aux:
        # rows of zeros explain nothing; they keep the sizes few, as oneDNN compiles and keeps a product for each
        table, bias, rows = (pad(t, (0, 0) * (t.ndim - 1) + (0, -len(dead) % 64)) for t in (table, bias, rows))
        pre = dense_linear(x if centre is None else x - centre, table, bias)
        if k_aux < len(dead):
            strength = pre.detach().abs() if signed else pre.detach()
            best = strength.topk(k_aux, dim=-1, sorted=False).indices
            pre = pre * torch.zeros_like(pre).scatter_(-1, best, 1.0)
        explained = dense_linear(pre if signed else pre.relu(), rows.t())
    else:
        values, indices = linear_topk(x, table, bias, k_aux, centre, signed)
        explained = sparse_decode(values if signed else values.relu(), indices, rows)
    spread, floor = variance(residual), 1e-9 * residual.pow(2).sum(-1).mean()
    # rows that are all alike have nothing to explain; a NaN would come back through the gradient of the division
    share = squared_error(residual, explained) / torch.where(spread > floor, spread, 1.0)
    return torch.where(spread > floor, share, 0.0)

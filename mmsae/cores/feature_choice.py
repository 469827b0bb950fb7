"""Feature Choice: latents choose rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.base import Losses
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import dense_linear, linear_above, linear_batch_topk
from mmsae.kernels.pairs import Pairs
from mmsae.kernels.products import encode_pairs
from mmsae.spec import ActivationSpec, Batch

CHUNK = 1 << 21  # pre-activations held at a time
RANK_DECAY = 0.98  # per step, of the densities that rank the latents
GOLDEN = 0.6180339887498949


class FeatureChoice(TopK):
    """Each latent keeps its best rows of a batch, as many as a Zipf law allots to its rank (arXiv 2411.02124).

    Every latent fires, so none dies. Latents are ranked by how often they fire when the largest `k * batch` entries of
    the whole batch are kept (Mutual Choice, which is BatchTopK); training begins with that selection. In `eval` a
    latent fires above its own threshold, the running mean of the smallest activation that it kept. AuxK teaches, beside
    dead latents, those that fire much less than the Zipf law allots (the paper's aux_zipf).

    The paper's text gives no constants; exponent, offset and `underused` are ours. A latent whose share is less than
    one row per batch gets a row in some batches only, and its threshold, the mean of the maxima of those batches, lets
    it fire about once per batch: use batches of `d_latent / k` rows and more.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Latents kept per activation, on average over a batch.
        zipf_exponent: Shares fall as `(rank + zipf_offset) ** -zipf_exponent`; 0 gives all latents the same.
        zipf_offset: Flattens the head.
        underused: Share of its allotted density below which a latent is taught by AuxK; 0 leaves it to dead latents.
        warmup_rows: Rows (over all ranks) of Mutual Choice first; about a tenth of the training.
        aux_coefficient: Weight of AuxK; 0 switches it off.
        k_aux: Latents used by AuxK per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
        threshold_decay: Decay of the running means per step.
    """

    selects_per_latent: ClassVar[bool] = True
    reduce: ClassVar[Mapping[str, str]] = {"density": "mean", "smallest": "mean"}

    density: Tensor
    smallest: Tensor
    shares: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        zipf_exponent: float = 1.0,
        zipf_offset: float = 5.0,
        underused: float = 0.3,
        warmup_rows: int = 10_000_000,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
        threshold_decay: float = 0.99,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        self.zipf_exponent = checked("zipf_exponent", zipf_exponent, 0)
        self.zipf_offset = checked("zipf_offset", zipf_offset, 0)
        self.underused = checked("underused", underused, 0, 1)
        self.warmup_rows = checked("warmup_rows", warmup_rows, 0)
        self.threshold_decay = checked("threshold_decay", threshold_decay, 0, 1)
        shares = torch.from_numpy(zipf_shares(d_latent, k, zipf_exponent, zipf_offset))
        self.register_buffer("shares", shares, persistent=False)  # rows per row, by rank
        self.register_buffer("density", torch.zeros(d_latent, dtype=torch.float64))
        # running sums of the smallest value kept, and of how often there was one: averages over ranks stay exact
        self.register_buffer("smallest", torch.zeros(2, d_latent, dtype=torch.float64))
        self._density: Tensor | None = None  # of this step

    @property
    def thresholds(self) -> Tensor:
        """Threshold of each latent `[d_latent]`; infinite where it has never fired."""
        total, weight = self.smallest
        return torch.where(weight > 0, total / weight.clamp_min(1e-300), torch.inf)

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """By the latents' choice while training, by their thresholds otherwise."""
        x, table, bias, centre = self.encoder(x)
        if self.training:
            if int(self.rows_seen) < self.warmup_rows:
                budget = self.k * x.shape[:-1].numel()
                return Codes(*linear_batch_topk(x, table, bias, budget, centre), self.d_latent)
            return self._chosen(x, table, bias, centre)
        thresholds = self.thresholds.to(x.dtype)
        if not thresholds.isfinite().any():
            raise MmsaeError(f"{type(self).__name__} has no inference thresholds yet: train it for at least one step")
        found = linear_above(x, table, bias, thresholds, centre)
        if found is None:
            values = self.pre_activations(x)
            return Codes(torch.where(values > thresholds, values, 0.0), None, self.d_latent).sparse()
        values, indices = found
        above = values > thresholds.index_select(0, indices.flatten()).view_as(values)
        return Codes(torch.where(above, values, 0.0), indices, self.d_latent)

    def budgets(self, n_rows: int) -> np.ndarray:
        """Rows that the latent of each rank may keep in this batch, int64 `[d_latent]`, `k * n_rows` in total.

        Shares are rounded along their running sum from a start that moves from step to step, so that every latent gets
        its share on average.
        """
        start = int(self.rows_seen) * GOLDEN % 1
        ends = np.floor(np.cumsum(self.shares.cpu().numpy()) * n_rows + start + 1e-6)
        return np.diff(ends, prepend=0.0).clip(0, n_rows).astype(np.int64)

    def _chosen(self, x: Tensor, table: Tensor, bias: Tensor, centre: Tensor | None) -> Codes:
        """The best rows of each latent; latents in order of rank, a chunk at a time."""
        flat = x.reshape(-1, x.shape[-1])
        n_rows = len(flat)
        with torch.no_grad():
            inner = flat if centre is None else flat - centre
            order, budgets = self.density.argsort(descending=True, stable=True), self.budgets(n_rows)
            found = [x.new_empty(2, 0, dtype=torch.int64)]
            step = max(1, CHUNK // max(n_rows, 1))
            for begin in range(0, self.d_latent, step):
                width = int(budgets[begin : begin + step].max())
                if width == 0:
                    continue
                latents = order[begin : begin + step]
                pre = dense_linear(table.index_select(0, latents), inner) + bias.index_select(0, latents)[:, None]
                values, rows = pre.topk(width, dim=-1)
                allowed = torch.from_numpy(budgets[begin : begin + step]).to(x.device)
                kept = (torch.arange(width, device=x.device) < allowed[:, None]) & (values > 0)
                found.append(torch.stack([rows[kept], latents[:, None].expand_as(rows)[kept]]))
            rows, latents = torch.cat(found, dim=1)
            rows, order = rows.sort(stable=True)
            counts = torch.bincount(rows, minlength=n_rows)
            indices, pairs = Pairs.ragged(latents[order], rows, counts, self.d_latent)
        values = pairs.padded(encode_pairs(flat, table, bias, pairs, centre), indices.shape)
        values, indices = pairs.reshaped(values, indices, x.shape[:-1])
        return Codes(values.relu(), indices, self.d_latent)

    def losses(self, batch: Batch) -> Losses:
        """The terms of TopK; and how often each latent would fire under Mutual Choice."""
        losses = super().losses(batch)
        if self.training:
            with torch.no_grad():
                codes = losses.codes
                if int(self.rows_seen) >= self.warmup_rows:
                    x, table, bias, centre = self.encoder(self.inputs(batch))
                    budget = self.k * x.shape[:-1].numel()
                    codes = Codes(*linear_batch_topk(x, table, bias, budget, centre), self.d_latent)
                self._density = codes.firings().double() / codes.values.shape[:-1].numel()
        return losses

    def idle_latents(self) -> Tensor:
        """Dead latents, and those far below the density that the Zipf law allots to their rank."""
        idle = self.rows_since_fired >= self.dead_after
        if self.underused:
            allotted = torch.empty_like(self.density)
            allotted[self.density.argsort(descending=True, stable=True)] = self.shares
            idle = idle | ((self.density < self.underused * allotted) & (self.density.sum() > 0))
        return idle.nonzero()[:, 0]

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Unit rows; densities; thresholds follow the smallest value that each latent kept."""
        super().after_step(step, codes)
        if self._density is not None:
            mixed = RANK_DECAY * self.density + (1 - RANK_DECAY) * self._density
            self.density.copy_(torch.where(self.density.sum() > 0, mixed, self._density))
            self._density = None
        kept = codes.sparse()
        assert kept.indices is not None
        values = torch.where(kept.values > 0, kept.values, torch.inf).double().flatten()
        least = torch.full_like(self.density, torch.inf).scatter_reduce_(0, kept.indices.flatten(), values, "amin")
        fired = least.isfinite()
        now = torch.stack([torch.where(fired, least, 0.0), fired.double()])
        self.smallest.mul_(self.threshold_decay).add_(now, alpha=1 - self.threshold_decay)

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Codes and thresholds times `factor`."""
        super().rescale(factor)
        self.smallest[0].mul_(factor)


def zipf_shares(n: int, k: float, exponent: float, offset: float) -> np.ndarray:
    """Densities of ranks 1 to n, `c (rank + offset) ** -exponent` but at most 1, `k` in sum, float64 `[n]`."""
    law = (np.arange(1, n + 1) + offset) ** -float(exponent)
    shares = k * law / law.sum()
    while (shares > 1 + 1e-12).any():  # what is above 1 is handed down the ranks
        full = shares >= 1
        shares = np.where(full, 1.0, law * (k - full.sum()) / np.maximum(law[~full].sum(), 1e-300))
    return np.minimum(shares, 1.0)

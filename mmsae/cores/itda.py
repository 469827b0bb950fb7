"""Inference-time decomposition: a dictionary of activations, grown in one pass without gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmsae.codes import Codes, merge_repeats
from mmsae.cores.base import Affine
from mmsae.cores.linear import LinearCore
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import linear_topk, sparse_decode
from mmsae.spec import TARGET, ActivationSpec, Batch

CHUNK = 64  # rows looked at together while growing; the result does not depend on it


class ITDA(LinearCore):
    """Activations themselves as the dictionary, taken where matching pursuit fails (ITDA, arXiv 2505.17769).

    Rows are seen once and in order. A row whose reconstruction by `k` steps of matching pursuit misses more than
    `threshold` of its squared norm becomes the next latent, scaled to norm 1, and remembers which row it was: latents
    of different models are the same where their row ids are (`mmsae.metrics.jaccard`), provided that both saw the same
    rows in the same order. The rule is applied row by row, whatever the size of the batches.

    The paper compares the squared error itself with its threshold. The share that is used here does not change when
    all activations are scaled, so that models of different scale stay comparable.

    Args:
        spec: Widths of the streams.
        d_latent: Latents at most; growth ends there, and places that were not needed stay 0 and never fire.
        k: Steps of matching pursuit, so latents kept per activation at most.
        threshold: Share of a row's squared norm that may stay unexplained.
    """

    gradient_free: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    n_atoms: Tensor
    ids: Tensor

    def __init__(self, spec: ActivationSpec | int, d_latent: int, k: int = 32, threshold: float = 0.3) -> None:
        super().__init__(spec, d_latent, decoder_norm="free")
        if TARGET in self.spec.streams:
            raise MmsaeError("ITDA's latents are its inputs, so it has no target to transcode to: use TopK for that.")
        self.k = checked("k", k, 1)
        self.threshold = checked("threshold", threshold, 0, 1)
        self.requires_grad_(False)
        self.W_dec.zero_()
        self.W_enc.zero_()
        self.register_buffer("n_atoms", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ids", torch.full((d_latent, 2), -1))

    @property
    def row_ids(self) -> Tensor:
        """The row that each latent was: `sample_id` and `position`, int64 `[n_atoms, 2]`."""
        return self.ids[: int(self.n_atoms)]

    # The residual stays in the units of the input: W_enc reads a latent off it and W_dec is what it takes away, with
    # <W_enc[i], W_dec[i]> = 1. Both are the same until a normalisation is folded in, which leaves the pursuit as it is.

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """Matching pursuit: k times the latent of largest magnitude on the residual; its coefficient has a sign."""
        x, table, _, centre = self.encoder(x)
        assert centre is not None
        n = int(self.n_atoms)
        if n == 0:
            shape = (*x.shape[:-1], self.k)
            return Codes(x.new_zeros(shape), x.new_zeros(shape, dtype=torch.int64), self.d_latent)
        table, rows, residual = table[:n], self.W_dec[:n], x - centre
        values, indices = [], []
        for _ in range(self.k):
            value, index = linear_topk(residual, table, None, 1, signed=True)
            residual = residual - sparse_decode(value, index, rows)
            values.append(value)
            indices.append(index)
        chosen = torch.cat(indices, -1)
        return Codes(merge_repeats(torch.cat(values, -1), chosen), chosen, self.d_latent)

    @torch.no_grad()
    def partial_fit(self, batch: Batch) -> None:
        """Look at each row once, in order, and take those that are not explained."""
        x = self.inputs(batch).to(self.W_enc.dtype)
        for rows, ids in zip(x.split(CHUNK), self._ids(batch, len(x)).split(CHUNK), strict=True):
            self._grow(rows, ids)

    def _ids(self, batch: Batch, n_rows: int) -> Tensor:
        """Names of the rows `[n_rows, 2]`: sample and position, or their place in the stream and -1."""
        if "sample_id" not in batch:
            number = self.rows_seen + torch.arange(n_rows, device=self.ids.device)
            return torch.stack([number, torch.full_like(number, -1)], -1)
        sample = batch["sample_id"].to(self.ids)
        position = batch["position"].to(self.ids) if "position" in batch else torch.full_like(sample, -1)
        return torch.stack([sample, position], -1)

    def _grow(self, x: Tensor, ids: Tensor) -> None:
        path, strength = self._pursue(x)
        begin = 0
        while (n := int(self.n_atoms)) < self.d_latent:
            failing = self.unexplained(x[begin:], path[begin:, -1]).nonzero()
            if len(failing) == 0:
                return
            row = begin + int(failing[0])
            atom = x[row] / x[row].norm()
            self.W_enc[n], self.W_dec[n], self.ids[n] = atom, atom, ids[row]
            self.n_atoms += 1
            begin = row + 1
            # Later rows go another way only where the new latent would have been chosen; the rest need no second look.
            changed = ((path[begin:, :-1] @ atom).abs() > strength[begin:]).any(-1).nonzero()[:, 0] + begin
            path[changed], strength[changed] = self._pursue(x[changed])

    def unexplained(self, x: Tensor, residual: Tensor) -> Tensor:
        """Which rows are too far from their reconstruction, bool `[n]`; rows of zeros never are."""
        return residual.pow(2).sum(-1) > self.threshold * x.pow(2).sum(-1)

    def _pursue(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Residual before each step and after the last `[n, k + 1, d]`, and the coefficient's size `[n, k]`."""
        n = int(self.n_atoms)
        path, strength = x[:, None].repeat(1, self.k + 1, 1), x.new_zeros(len(x), self.k)
        for step in range(self.k if n and len(x) else 0):
            value, index = linear_topk(path[:, step], self.W_enc[:n], None, 1, signed=True)
            path[:, step + 1] = path[:, step] - value * self.W_dec[index[:, 0]]
            strength[:, step] = value[:, 0].abs()
        return path, strength

    @torch.no_grad()
    def finish(self) -> None:
        """Refuse a dictionary without latents."""
        if self.n_atoms == 0:
            raise MmsaeError("ITDA has taken no row: it has seen none but zeros, or threshold=1.")

    @torch.no_grad()
    def fold(self, affine: dict[str, Affine]) -> None:  # type: ignore[override]
        """Absorb the normalisation; then norm 1 for the latents, where one factor for all of them does it."""
        super().fold(affine)
        if affine[self.spec.input].scale.ndim == 0 and self.n_atoms > 0:
            self.rescale(self.W_dec[: int(self.n_atoms)].norm(dim=-1).mean().expand(self.d_latent))

"""Codes of a batch of activations, sparse unless somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Codes:
    """Which latents fired, and how strongly.

    Two layouts, told apart by `indices`: a *pair list* of `n` entries per row, where unused entries have value 0, or a
    *dense* matrix. An entry counts as active when its value is not 0, so signed codes work everywhere.

    Attributes:
        values: `[..., n]`, or `[..., d_latent]` when dense.
        indices: Latent of each value, int64 `[..., n]`; None when dense. No latent occurs twice in a row with a
            value other than 0.
        d_latent: Size of the dictionary.
        extra: What else an encoder has to say (gate, log-variance, k per row), one entry per row.
    """

    values: Tensor
    indices: Tensor | None
    d_latent: int
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether `values` holds one column per latent."""
        return self.indices is None

    def dense(self) -> Tensor:
        """The codes as `[..., d_latent]`."""
        if self.indices is None:
            return self.values
        empty = self.values.new_zeros(*self.values.shape[:-1], self.d_latent)
        return empty.scatter_add(-1, self.indices, self.values)

    def sparse(self) -> Codes:
        """The codes as a pair list just wide enough for the fullest row."""
        if self.indices is not None:
            return self
        width = max(int(self.l0().max()) if self.values.numel() else 0, 1)
        indices = self.values.abs().topk(width, dim=-1).indices
        return Codes(self.values.gather(-1, indices), indices, self.d_latent, self.extra)

    def l0(self) -> Tensor:
        """Active latents per row, `[...]` int64."""
        return (self.values != 0).sum(-1)

    def firings(self) -> Tensor:
        """Rows in which each latent is active, int64 `[d_latent]`."""
        active = self.values != 0
        if self.indices is None:
            return active.reshape(-1, self.d_latent).sum(0)
        counts = torch.zeros(self.d_latent, dtype=torch.int64, device=self.values.device)
        return counts.index_add_(0, self.indices.reshape(-1), active.reshape(-1).long())

    def detach(self) -> Codes:
        """The same codes without their autograd history."""
        return Codes(self.values.detach(), self.indices, self.d_latent, {k: v.detach() for k, v in self.extra.items()})

    def __getitem__(self, rows: slice | Tensor | int) -> Codes:
        indices = None if self.indices is None else self.indices[rows]
        return Codes(self.values[rows], indices, self.d_latent, {k: v[rows] for k, v in self.extra.items()})


def merge_repeats(values: Tensor, indices: Tensor) -> Tensor:
    """Values of a pair list in which a latent may occur several times, summed where it occurs first.

    Args:
        values: `[..., n]`.
        indices: `[..., n]`.

    Returns:
        `[..., n]`, 0 at later occurrences, as `Codes` wants it.
    """
    first = (indices[..., :, None] == indices[..., None, :]).int().argmax(-1)
    return torch.zeros_like(values).scatter_add(-1, first, values)

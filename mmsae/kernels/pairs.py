"""Which latent fires in which row: the pattern of a sparse code matrix, read by row or by latent."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class ByLatent(NamedTuple):
    """The same pairs, sorted by latent.

    Attributes:
        order: Place of each sorted pair among the pairs by row, int64 `[n_pairs]`.
        offsets: Where the pairs of each latent begin, and the end, int64 `[n_latents + 1]`.
        rows: int64 `[n_pairs]`.
        latents: int64 `[n_pairs]`.
    """

    order: Tensor
    offsets: Tensor
    rows: Tensor
    latents: Tensor


class Pairs:
    """The pattern of a matrix `[n_rows, n_latents]` with few entries, sorted by row.

    Args:
        offsets: Where the pairs of each row begin, and the end, int64 `[n_rows + 1]`.
        latents: int64 `[n_pairs]`.
        rows: int64 `[n_pairs]`.
        n_latents: Number of columns.
        places: Where each pair stands in a padded list `[n_rows, n]`, flattened; None if that list has no padding.
    """

    def __init__(
        self, offsets: Tensor, latents: Tensor, rows: Tensor, n_latents: int, places: Tensor | None = None
    ) -> None:
        self.offsets, self.latents, self.rows, self.n_latents, self.places = offsets, latents, rows, n_latents, places

    @property
    def n_rows(self) -> int:
        """Rows, also those without a pair."""
        return len(self.offsets) - 1

    @classmethod
    def of(cls, indices: Tensor, n_latents: int) -> Pairs:
        """The pairs of a list without padding; made once for the same `indices`, however many products need them.

        Args:
            indices: Latents `[..., n]`, int64; leading dimensions are rows.
            n_latents: Number of columns.
        """
        known = _known.get(indices)
        if known is not None and known[0] == _version(indices) and known[1].n_latents == n_latents:
            return known[1]
        n, device = indices.shape[-1], indices.device
        n_rows = indices.shape[:-1].numel()
        offsets = torch.arange(n_rows + 1, device=device) * n
        rows = torch.arange(n_rows, device=device).repeat_interleave(n, output_size=n_rows * n)
        # cloned, because a view would keep its base, the key of the memory below, alive for ever
        return cls(offsets, indices.flatten().clone(), rows, n_latents)._remember(indices)

    @classmethod
    def within(cls, indices: Tensor, used: Tensor, n_latents: int) -> tuple[Tensor, Pairs]:
        """A list with padding made as narrow as its fullest row, and the pairs in it; waits for the device.

        Args:
            indices: Latents `[n_rows, n]`, int64.
            used: bool `[n_rows, n]`; the other places are padding, which takes part in nothing.
            n_latents: Number of columns.

        Returns:
            indices `[n_rows, width]`, 0 where padded, and the pairs.
        """
        rows, columns = used.nonzero(as_tuple=True)
        return cls.ragged(indices[rows, columns], rows, used.sum(-1), n_latents)

    @classmethod
    def ragged(cls, latents: Tensor, rows: Tensor, counts: Tensor, n_latents: int) -> tuple[Tensor, Pairs]:
        """Pairs given row by row, and their padded list, as wide as the fullest row; waits for the device.

        Args:
            latents: int64 `[n_pairs]`.
            rows: int64 `[n_pairs]`, ascending.
            counts: Pairs of each row, int64 `[n_rows]`.
            n_latents: Number of columns.

        Returns:
            indices `[n_rows, width]`, 0 where padded, and the pairs.
        """
        width = max(int(counts.max()), 1) if len(counts) else 1
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        places = torch.arange(len(latents), device=latents.device) + (rows * width - offsets.index_select(0, rows))
        indices = latents.new_zeros(len(counts) * width).index_copy_(0, places, latents).view(-1, width)
        return indices, cls(offsets, latents, rows, n_latents, places)._remember(indices)

    def reshaped(self, values: Tensor, indices: Tensor, leading: torch.Size) -> tuple[Tensor, Tensor]:
        """A padded list of values and indices `[n_rows, n]` with other leading dimensions, for the same pairs."""
        if len(leading) != 1:
            shape = (*leading, indices.shape[-1])
            values, indices = values.view(shape), indices.view(shape)
            self._remember(indices)
        return values, indices

    def _remember(self, indices: Tensor) -> Pairs:
        _known[indices] = _version(indices), self
        return self

    @cached_property
    def by_latent(self) -> ByLatent:
        """The pairs sorted by latent; rows ascend within a latent."""
        latents, order = self.latents.int().sort(stable=True)  # half as many passes as int64 takes
        bounds = torch.arange(self.n_latents + 1, device=latents.device, dtype=torch.int32)
        return ByLatent(order, torch.searchsorted(latents, bounds), self.rows.index_select(0, order), latents.long())

    def flat(self, padded: Tensor) -> Tensor:
        """The entries of a padded list `[n_rows, n]` that belong to pairs, `[n_pairs]`."""
        padded = padded.reshape(-1)
        return padded if self.places is None else padded.index_select(0, self.places)

    def padded(self, flat: Tensor, shape: torch.Size, padding: float = 0.0) -> Tensor:
        """The inverse of `flat`, with `padding` where there is no pair."""
        if self.places is None:
            return flat.view(shape)
        return flat.new_full((shape.numel(),), padding).index_copy(0, self.places, flat).view(shape)


def _version(indices: Tensor) -> int:
    """Number of changes in place; tensors of inference mode do not count them, nor do they allow them outside."""
    return -1 if indices.is_inference() else indices._version


# One pattern serves the decoder, its two gradients and both of the encoder; it goes away with its indices.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

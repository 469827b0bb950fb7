"""The strongest rows of every latent, kept while codes stream by."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mmsae.codes import Codes
from mmsae.errors import MmsaeError, checked
from mmsae.files import write_atomic

MAX_ROWS = 2**31


class TopActivations:
    """For each latent the `n` rows with the strongest codes, in one pass and 8 bytes per kept row.

    Signed codes are ranked by magnitude; of equally strong rows the lower one wins. The result depends only on the set
    of rows seen, not on their order or on how batches cut them, so accumulators of several devices can be merged.

    Each candidate is one integer that sorts as it should: the bits of the magnitude (a float32 that is not negative
    orders like its bits), then the row counted down, then the sign. A batch is first thinned to what beats the weakest
    kept row of its latent, which after a while is almost nothing.

    Args:
        d_latent: Number of latents.
        n: Rows kept for each.
        device: Where codes come from.
    """

    def __init__(self, d_latent: int, n: int, device: torch.device | str = "cpu") -> None:
        self.n = checked("n", n, 1)
        self.keys = torch.zeros(d_latent, n, dtype=torch.int64, device=device)  # descending; 0 is no row
        self.firings = torch.zeros(d_latent, dtype=torch.int64, device=device)
        self.n_rows = 0

    def update(self, codes: Codes, first_row: int | None = None) -> None:
        """Add a batch.

        Args:
            codes: Of rows `[rows, ...]`.
            first_row: Number of its first row; by default they are counted as they come.
        """
        codes = codes.detach().sparse()
        assert codes.indices is not None
        first = self.n_rows if first_row is None else first_row
        n_rows, width = codes.values.shape
        if first + n_rows > MAX_ROWS:
            raise MmsaeError(f"row {first + n_rows} is beyond the {MAX_ROWS} rows that can be ranked in one pass.")
        self.firings += codes.firings()
        self.n_rows += n_rows
        values, latents = codes.values.float().reshape(-1), codes.indices.reshape(-1)
        # a first, cheap sieve by magnitude alone; ties with the weakest kept row stay in
        weakest = (self.keys[:, -1] >> 32).to(torch.int32).view(torch.float32)
        found = ((values.abs() >= weakest[latents]) & (values != 0)).nonzero()[:, 0]
        values, latents = values[found], latents[found]
        self._add(latents, _keys(values, first + found // width))

    def merge(self, other: TopActivations) -> None:
        """Add what another accumulator saw; its rows carry their own numbers."""
        latents, place = other.keys.nonzero(as_tuple=True)
        self._add(latents.to(self.keys.device), other.keys[latents, place].to(self.keys.device))
        self.firings += other.firings.to(self.keys.device)
        self.n_rows += other.n_rows

    def _add(self, latents: Tensor, keys: Tensor) -> None:
        better = keys > self.keys[latents, -1]
        latents, keys = latents[better], keys[better]
        if not len(keys):
            return
        keys, order = keys.sort(descending=True)
        latents, again = latents[order].sort(stable=True)
        keys = keys[again]  # latent by latent, strongest first
        touched, group, counts = latents.unique_consecutive(return_inverse=True, return_counts=True)
        rank = torch.arange(len(keys), device=keys.device) - (counts.cumsum(0) - counts)[group]
        kept = rank < self.n
        fresh = keys.new_zeros(len(touched), min(int(counts.max()), self.n))
        fresh[group[kept], rank[kept]] = keys[kept]
        self.keys[touched] = torch.cat([self.keys[touched], fresh], dim=1).topk(self.n, dim=1).values

    @property
    def rows(self) -> Tensor:
        """Strongest first, int64 `[d_latent, n]`; -1 where a latent fired in fewer rows."""
        rows = MAX_ROWS - 1 - ((self.keys & 0xFFFFFFFF) >> 1)
        return torch.where(self.keys == 0, -1, rows)

    @property
    def values(self) -> Tensor:
        """Codes of `rows`, float32 `[d_latent, n]`; 0 where there is no row."""
        magnitude = (self.keys >> 32).to(torch.int32).view(torch.float32)
        return torch.where((self.keys & 1).bool(), -magnitude, magnitude)

    @property
    def density(self) -> Tensor:
        """Share of the rows seen in which each latent fires, float64 `[d_latent]`."""
        return self.firings.double() / max(self.n_rows, 1)

    def save(self, path: Path) -> None:
        """Write `values`, `rows`, `firings` and `n_rows` to a safetensors file."""
        tensors = {name: getattr(self, name) for name in ("values", "rows", "firings")}
        tensors["n_rows"] = torch.tensor(self.n_rows)
        write_atomic(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))

    @classmethod
    def load(cls, path: Path) -> TopActivations:
        """Read what `save` wrote."""
        tensors = load_file(path)
        values, rows = tensors["values"], tensors["rows"]
        top = cls(*values.shape)
        top.keys = torch.where(rows < 0, 0, _keys(values, rows))
        top.firings, top.n_rows = tensors["firings"], int(tensors["n_rows"])
        return top


def _keys(values: Tensor, rows: Tensor) -> Tensor:
    """Integers that sort like (magnitude, lower row first), with the sign in the last bit."""
    return (values.abs().view(torch.int32).long() << 32) | ((MAX_ROWS - 1 - rows) << 1) | (values < 0)

"""The codes of a data set latent by latent, with the metadata of every row: what analyses read."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError
from mmsae.spec import Batch, in_float32
from mmsae.store import CodeStore

PAIRS_AT_ONCE = 1 << 24
"""Pairs looked at in one step, to bound the memory when they lie on disk."""


class LatentStore:
    """Codes of activation rows, latent by latent, and the columns that say where each row comes from.

    The arrays may lie in memory (`build`) or in memory maps (`open`); nothing here loads them whole.

    Args:
        offsets: Where the pairs of each latent begin, int64 `[d_latent + 1]`.
        rows: Row of each pair, ascending within a latent, `[pairs]`.
        values: Code of each pair, never 0, `[pairs]`.
        columns: Metadata name to an array with one entry per row.
        n_rows: Activation rows.
        signed: Whether codes may be negative.
        split: The split that these rows are, whole; empty if they may be a part of one.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        rows: np.ndarray,
        values: np.ndarray,
        columns: Mapping[str, np.ndarray],
        n_rows: int,
        signed: bool = False,
        split: str = "",
    ) -> None:
        self.offsets, self.rows, self.values = offsets, rows, values
        self.n_rows, self.signed, self.split = n_rows, signed, split
        self.columns = columns if "sample_id" in columns else ChainMap({"sample_id": np.arange(n_rows)}, dict(columns))

    @classmethod
    def build(cls, core: SAECore, batches: Iterable[Batch], max_rows: int = 2_000_000, split: str = "") -> LatentStore:
        """Encode batches of raw activations, and keep the codes in memory.

        Args:
            core: A folded dictionary in `eval` mode.
            batches: With `sample_id` and any other columns.
            max_rows: Stop after so many rows, to bound the memory.
            split: Whose rows these are.
        """
        parts: list[sparse.csr_matrix] = []
        columns: dict[str, list[np.ndarray]] = {}
        n_rows = 0
        for batch in tqdm(batches, desc=f"encoding {split}".strip(), leave=False, disable=None):
            with torch.no_grad():
                codes = core.encode(core.inputs(in_float32(batch)), batch)
            codes, metadata = core.by_row(codes, {k: v for k, v in batch.items() if isinstance(v, Tensor)})
            parts.append(to_csr(codes))
            for name, column in metadata.items():
                columns.setdefault(name, []).append(column.cpu().numpy())
            n_rows += parts[-1].shape[0]
            if n_rows >= max_rows:
                split = ""
                break
        if not parts:
            raise MmsaeError("there are no activations to encode: are the data, or the positions, empty?")
        joined = {name: np.concatenate(values) for name, values in columns.items()}
        found = sparse.vstack(parts, format="csr").tocsc()
        return cls(found.indptr, found.indices, found.data, joined, n_rows, core.signed, split)

    @classmethod
    def open(cls, codes: CodeStore, split: str = "") -> LatentStore:
        """The codes of `mmsae encode`, left on disk; the first time they are sorted by latent there."""
        return cls(*codes.by_latent, codes.columns, len(codes), codes.manifest.signed, split)

    @property
    def d_latent(self) -> int:
        """Latents."""
        return len(self.offsets) - 1

    @property
    def codes(self) -> sparse.csc_matrix:
        """The codes as a SciPy matrix `[n_rows, d_latent]`, float32; makes a copy in memory if they lie on disk."""
        arrays = self.values.astype(np.float32, copy=False), self.rows, self.offsets
        return sparse.csc_matrix(arrays, shape=(self.n_rows, self.d_latent))

    @property
    def firings(self) -> np.ndarray:
        """Rows in which each latent is active, int64 `[d_latent]`."""
        return np.diff(self.offsets).astype(np.int64)

    @property
    def density(self) -> np.ndarray:
        """Share of rows in which each latent is active, `[d_latent]`."""
        return self.firings / self.n_rows

    @property
    def l0(self) -> float:
        """Active latents per row."""
        return len(self.values) / self.n_rows

    @cached_property
    def strongest(self) -> np.ndarray:
        """Largest magnitude of each latent, float32 `[d_latent]`; 0 where it never fires."""
        found = np.zeros(self.d_latent, dtype=np.float32)
        for first, last in self._runs(0, self.d_latent):
            live = first + np.flatnonzero(np.diff(self.offsets[first : last + 1]))
            if len(live):
                values = np.abs(self.values[self.offsets[first] : self.offsets[last]])
                found[live] = np.maximum.reduceat(values, self.offsets[live] - self.offsets[first])
        return found

    @cached_property
    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct sample ids, ascending, and for each row the place of its sample among them."""
        ids, place = np.unique(self.columns["sample_id"], return_inverse=True)
        return ids, place

    @cached_property
    def rows_of_sample(self) -> list[np.ndarray]:
        """For each place among `samples`, its rows."""
        ids, place = self.samples
        order = np.argsort(place, kind="stable")
        return np.split(order, np.searchsorted(place[order], np.arange(1, len(ids))))

    def of_latent(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows in which a latent is active, ascending, and its values there, float32."""
        pairs = slice(int(self.offsets[latent]), int(self.offsets[latent + 1]))
        return self.rows[pairs], self.values[pairs].astype(np.float32, copy=False)

    def at(self, latent: int, rows: np.ndarray) -> np.ndarray:
        """Codes of one latent in some rows, float32 `[rows]`; 0 where it is silent."""
        active, values = self.of_latent(latent)
        place = np.searchsorted(active, rows)
        found = np.zeros(len(rows), dtype=np.float32)
        inside = place < len(active)
        inside[inside] = active[place[inside]] == rows[inside]
        found[inside] = values[place[inside]]
        return found

    def pool(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Strongest code of some latents in each sample, float32 `[n_samples, last - first]`; signs are kept."""
        ids, place = self.samples
        last = self.d_latent if last is None else last
        pooled = np.zeros((len(ids), last - first), dtype=np.float32)
        for begin, end in self._runs(first, last):
            pairs = slice(int(self.offsets[begin]), int(self.offsets[end]))
            values = self.values[pairs].astype(np.float32, copy=False)
            latent = np.repeat(np.arange(begin - first, end - first), np.diff(self.offsets[begin : end + 1]))
            order = np.argsort(np.abs(values), kind="stable")  # the strongest is written last
            pooled[place[self.rows[pairs]][order], latent[order]] = values[order]
        return pooled

    def _runs(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        """Neighbouring latents with about `PAIRS_AT_ONCE` pairs together, or one latent."""
        while first < last:
            end = int(np.searchsorted(self.offsets, self.offsets[first] + PAIRS_AT_ONCE, side="right")) - 1
            end = min(max(end, first + 1), last)
            yield first, end
            first = end

    def labels(self) -> dict[str, np.ndarray]:
        """Factor to the index of its value for each of `samples` (of the sample's first row)."""
        first = np.unique(self.samples[1], return_index=True)[1]
        names = [name for name in self.columns if name.startswith("label.")]
        return {name.removeprefix("label."): self.columns[name][first] for name in names}

    def top_samples(self, latent: int, n: int, among: np.ndarray | None = None) -> list[tuple[int, int, float]]:
        """The samples with the strongest activations: place among `samples`, row, value; strongest first.

        Args:
            latent: Which.
            n: At most so many samples.
            among: Rows that count, bool `[n_rows]`; None counts all.
        """
        rows, values = self.of_latent(latent)
        if among is not None:
            counted = among[rows]
            rows, values = rows[counted], values[counted]
        order = np.argsort(-np.abs(values), kind="stable")
        found: dict[int, tuple[int, int, float]] = {}
        place = self.samples[1]
        for i in order:
            sample = int(place[rows[i]])
            if sample not in found:
                found[sample] = (sample, int(rows[i]), float(values[i]))
                if len(found) == n:
                    break
        return list(found.values())


def to_csr(codes: Any) -> sparse.csr_matrix:
    """Codes of a batch as a sparse matrix without explicit zeros."""
    codes = codes.sparse()
    values = codes.values.float().cpu()
    kept = values != 0
    indptr = np.concatenate([[0], kept.sum(1).cumsum(0).numpy()])
    matrix = sparse.csr_matrix(
        (values[kept].numpy(), codes.indices.cpu()[kept].numpy().astype(np.int32), indptr),
        shape=(len(values), codes.d_latent),
    )
    matrix.sort_indices()
    return matrix

"""The codes of a data set, kept sparse, with the metadata of every row."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from tqdm.auto import tqdm

from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError
from mmsae.spec import ACTS, Batch, rows_of


class LatentStore:
    """Codes of activation rows as a sparse matrix, and the columns that say where each row comes from.

    Args:
        codes: CSR `[n_rows, d_latent]`, float32.
        columns: Metadata name to an array with one entry per row; `sample_id` is among them.
        signed: Whether codes may be negative.
    """

    def __init__(self, codes: sparse.csr_matrix, columns: dict[str, np.ndarray], signed: bool = False) -> None:
        self.codes, self.columns, self.signed = codes, columns, signed

    @classmethod
    def build(cls, core: SAECore, batches: Iterable[Batch], max_rows: int = 2_000_000, label: str = "") -> LatentStore:
        """Encode batches of raw activations.

        Args:
            core: A folded dictionary in `eval` mode.
            batches: With `sample_id` and any other columns.
            max_rows: Stop after so many rows, to bound the memory.
            label: Shown in the progress bar.
        """
        parts: list[sparse.csr_matrix] = []
        columns: dict[str, list[np.ndarray]] = {}
        n_rows = 0
        for batch in tqdm(batches, desc=label or "encoding", leave=False, disable=None):
            with torch.no_grad():
                codes = core.encode(batch[ACTS][core.spec.input].float(), batch)
            parts.append(to_csr(codes))
            for name, column in batch.items():
                if name != ACTS:
                    columns.setdefault(name, []).append(column.cpu().numpy())
            n_rows += rows_of(batch)
            if n_rows >= max_rows:
                break
        if not parts:
            raise MmsaeError("there are no activations to encode: are the data, or the positions, empty?")
        joined = {name: np.concatenate(values) for name, values in columns.items()}
        joined.setdefault("sample_id", np.arange(n_rows))
        return cls(sparse.vstack(parts, format="csr"), joined, core.signed)

    @property
    def n_rows(self) -> int:
        """Activation rows."""
        return self.codes.shape[0]

    @property
    def d_latent(self) -> int:
        """Latents."""
        return self.codes.shape[1]

    @cached_property
    def by_latent(self) -> sparse.csc_matrix:
        """The same codes, latent by latent."""
        return self.codes.tocsc()

    @cached_property
    def firings(self) -> np.ndarray:
        """Rows in which each latent is active, int64 `[d_latent]`."""
        return np.diff(self.by_latent.indptr)

    @property
    def density(self) -> np.ndarray:
        """Share of rows in which each latent is active, `[d_latent]`."""
        return self.firings / self.n_rows

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
        """Rows in which a latent is active, and its values there."""
        begin, end = self.by_latent.indptr[latent : latent + 2]
        return self.by_latent.indices[begin:end], self.by_latent.data[begin:end]

    def pool(self) -> np.ndarray:
        """Strongest code of each latent in each sample, float32 `[n_samples, d_latent]`; signs are kept."""
        ids, place = self.samples
        pooled = np.zeros((len(ids), self.d_latent), dtype=np.float32)
        entries = self.codes.tocoo()
        cell = place[entries.row].astype(np.int64) * self.d_latent + entries.col
        order = np.argsort(np.abs(entries.data), kind="stable")  # the strongest is written last
        pooled.reshape(-1)[cell[order]] = entries.data[order]
        return pooled

    def labels(self) -> dict[str, np.ndarray]:
        """Factor to the index of its value for each of `samples` (of the sample's first row)."""
        first = np.array([rows[0] for rows in self.rows_of_sample])
        return {
            name.removeprefix("label."): column[first]
            for name, column in self.columns.items()
            if name.startswith("label.")
        }

    def top_samples(self, latent: int, n: int) -> list[tuple[int, int, float]]:
        """The samples with the strongest activations: place among `samples`, row, value; strongest first."""
        rows, values = self.of_latent(latent)
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

"""Reads codes on disk: by row, by latent, or the strongest of each latent, without loading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.errors import MmsaeError
from mmsae.files import sha256
from mmsae.store.by_latent import ByLatent, write_by_latent
from mmsae.store.code_writer import FIRINGS, LATENTS, OFFSETS, VALUES
from mmsae.store.manifest import CodeManifest
from mmsae.store.shards import fields_of, map_arrays
from mmsae.store.top import TopActivations

MAPPED = 64
"""Shards mapped at a time; a map holds a file open, and systems allow about a thousand."""


class Pairs(NamedTuple):
    """Codes of consecutive rows; the arrays may lie in memory maps.

    Attributes:
        counts: Pairs of each row, int64 `[rows]`.
        latents: `[pairs]`.
        values: `[pairs]`.
    """

    counts: np.ndarray
    latents: np.ndarray
    values: np.ndarray


class CodeStore:
    """A finished store of codes. Opening it reads the manifest alone; rows are read from memory maps when used.

    `store[1000:2000]` gives the `Codes` of these rows, `store.latent(7)` the rows and values of a latent.

    Args:
        folder: Where `manifest.json` lies.
        verify: "size" compares the lengths of the files with the manifest; "checksum" reads every byte once, which
            finds flipped bits, too.
    """

    def __init__(self, folder: str | Path, verify: str = "size") -> None:
        self.folder = Path(folder)
        self.manifest = CodeManifest.load(self.folder)
        again = "delete the store and run mmsae encode again."
        for entry in self.manifest.shards:
            path = self.folder / entry["file"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise MmsaeError(f"shard {path} is missing or does not have the size in the manifest: {again}")
            if verify == "checksum" and sha256(path) != entry["sha256"]:
                raise MmsaeError(f"shard {path} is damaged (its checksum differs from the manifest): {again}")
        self.starts = np.cumsum([0, *(entry["rows"] for entry in self.manifest.shards)])
        self.columns = Columns(self)
        self._mapped: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.manifest.n_rows

    @property
    def d_latent(self) -> int:
        """Size of the dictionary."""
        return self.manifest.d_latent

    @property
    def n_pairs(self) -> int:
        """Codes other than 0."""
        return self.manifest.n_pairs

    def shard(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a shard, mapped."""
        if number not in self._mapped:
            if len(self._mapped) >= MAPPED:
                self._mapped.pop(next(iter(self._mapped)))
            path = self.folder / self.manifest.shards[number]["file"]
            self._mapped[number] = map_arrays(path, fields_of(path, "encode"))
        return self._mapped[number]

    # ---- by row

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where rows lie: shard, first row in it, row after the last."""
        for number in range(int(np.searchsorted(self.starts, start, side="right")) - 1, len(self.starts) - 1):
            if self.starts[number] >= stop:
                return
            begin, end = int(self.starts[number]), int(self.starts[number + 1])
            yield number, max(start, begin) - begin, min(stop, end) - begin

    def pairs(self, start: int, stop: int) -> Pairs:
        """The pairs of rows from `start` to before `stop`."""
        found = []
        for number, first, last in self.pieces(start, stop):
            shard = self.shard(number)
            offsets = shard[OFFSETS][first : last + 1]
            inside = slice(int(offsets[0]), int(offsets[-1]))
            found.append(Pairs(np.diff(offsets), shard[LATENTS][inside], shard[VALUES][inside]))
        if len(found) == 1:
            return found[0]
        if not found:
            return Pairs(np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.float32))
        return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def __getitem__(self, rows: slice) -> Codes:
        """The codes of consecutive rows, values in float32, in a pair list as wide as the fullest of them."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise MmsaeError(f"rows of a code store are read in one piece, not in steps of {step}.")
        pairs = self.pairs(start, max(start, stop))
        n_rows, width = len(pairs.counts), int(pairs.counts.max(initial=1))
        values = torch.from_numpy(pairs.values.astype(np.float32))
        indices = torch.from_numpy(pairs.latents.astype(np.int64))
        if len(values) == n_rows * width:
            return Codes(values.view(n_rows, width), indices.view(n_rows, width), self.d_latent)
        used = torch.arange(width) < torch.from_numpy(pairs.counts.astype(np.int64))[:, None]
        padded = Codes(torch.zeros(n_rows, width), torch.zeros(n_rows, width, dtype=torch.int64), self.d_latent)
        padded.values[used] = values
        padded.indices[used] = indices  # type: ignore[index]
        return padded

    def batches(self, batch_size: int = 8192) -> Iterator[tuple[Codes, dict[str, Tensor]]]:
        """All rows in order: their codes and their metadata."""
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            columns = {name: torch.from_numpy(self.column(name, start, stop)) for name in self.manifest.columns}
            yield self[start:stop], columns

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A metadata column, in memory."""
        stop = len(self) if stop is None else stop
        return np.concatenate([self.shard(n)[name][first:last] for n, first, last in self.pieces(start, stop)])

    # ---- by latent

    @cached_property
    def firings(self) -> np.ndarray:
        """Rows in which each latent is active, int64 `[d_latent]`; counted when the codes were written."""
        total = np.zeros(self.d_latent, dtype=np.int64)
        for number in range(len(self.manifest.shards)):
            total += self.shard(number)[FIRINGS]
        return total

    @cached_property
    def by_latent(self) -> ByLatent:
        """The same codes latent by latent, in memory maps; the first time they are sorted into a file beside."""
        path = self.folder / "by_latent.safetensors"
        if not path.is_file():
            write_by_latent(self, path)
        arrays = map_arrays(path, fields_of(path, "encode"))
        if len(arrays["values"]) != self.n_pairs:
            raise MmsaeError(f"{path} belongs to other codes: delete it, and it will be made again.")
        return ByLatent(arrays["offsets"], arrays["rows"], arrays["values"])

    def latent(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows in which a latent is active, ascending, and its values there, float32."""
        begin, end = self.by_latent.offsets[latent : latent + 2]
        return self.by_latent.rows[begin:end], self.by_latent.values[begin:end].astype(np.float32, copy=False)

    def top(self, n: int = 16, batch_size: int = 16384) -> TopActivations:
        """The strongest rows of each latent, in one pass over the codes; kept in a file beside them."""
        path = self.folder / f"top_{n}.safetensors"
        if path.is_file():
            return TopActivations.load(path)
        top = TopActivations(self.d_latent, n)
        for start in range(0, len(self), batch_size):
            top.update(self[start : start + batch_size])
        top.save(path)
        return top


class Columns(Mapping[str, np.ndarray]):
    """Metadata columns of a store, each read when it is asked for the first time.

    Args:
        store: Whose.
    """

    def __init__(self, store: CodeStore) -> None:
        self.store = store
        self.read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.store.manifest.columns:
            raise KeyError(name)
        if name not in self.read:
            self.read[name] = self.store.column(name)
        return self.read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.store.manifest.columns)

    def __len__(self) -> int:
        return len(self.store.manifest.columns)

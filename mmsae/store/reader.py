"""Reads a store: whole and in order, or shuffled for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmsae.errors import MmsaeError, checked
from mmsae.files import sha256
from mmsae.spec import ACTS, GRADS, ActivationSpec, Batch
from mmsae.store.manifest import Manifest, load_statistics
from mmsae.store.shards import Shard

Piece = tuple[int, int, int]
"""Shard, first row, number of rows."""


class Store:
    """A finished store of activations.

    Args:
        folder: Where `manifest.json` lies.
        verify: "checksum" reads every byte once before anything is used; "size" looks at headers and lengths only,
            which finds truncated files but not flipped bits.
    """

    def __init__(self, folder: str | Path, verify: str = "checksum") -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self.shards = []
        for entry in self.manifest.shards:
            path = self.folder / entry["file"]
            shard = Shard.open(path)
            if path.stat().st_size != entry["bytes"] or shard.n_rows != entry["rows"]:
                raise MmsaeError(f"shard {path} does not have the size in the manifest: extract the activations again.")
            if verify == "checksum" and sha256(path) != entry["sha256"]:
                raise MmsaeError(
                    f"shard {path} is damaged (its checksum differs from the manifest): extract the activations again."
                )
            self.shards.append(shard)
        self.spec = ActivationSpec(dict(self.manifest.streams))
        self.statistics = load_statistics(self.folder, self.manifest.streams)

    def __len__(self) -> int:
        return self.manifest.n_rows

    def read(
        self,
        pieces: Sequence[Piece],
        columns: Sequence[str] | None = None,
        into: dict[str, Tensor] | None = None,
        gradients: bool = False,
    ) -> Batch:
        """The rows of some pieces, one after the other.

        Args:
            pieces: Which rows.
            columns: Metadata to read beside the activations; None is all.
            into: Memory to use again, by tensor name; filled by the first call.
            gradients: Also read the gradients.
        """
        names = list(self.manifest.columns) if columns is None else list(columns)
        n = sum(piece[2] for piece in pieces)
        batch: Batch = {ACTS: {}, GRADS: {}} if gradients else {ACTS: {}}
        streams = {f"{key}.{stream}": (key, stream) for key in batch for stream in self.spec.streams}
        for name in [*streams, *names]:
            field = self.shards[0].fields[name]
            memory = None if into is None else into.get(name)
            if memory is None or len(memory) < n:
                memory = torch.empty((n, *field.shape[1:]), dtype=field.dtype)
                if into is not None:
                    into[name] = memory
            out = memory[:n]
            done = 0
            for shard, start, count in pieces if len(pieces) > 1 else ():
                self.shards[shard].announce(name, start, count)
            for shard, start, count in pieces:
                self.shards[shard].read(name, start, out[done : done + count])
                done += count
            if name in streams:
                key, stream = streams[name]
                batch[key][stream] = out
            else:
                batch[name] = out
        return batch

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """All rows with their metadata, in the order of extraction."""
        for piece in self.cuts(batch_size):
            yield self.read([piece])

    def cuts(self, batch_size: int) -> list[Piece]:
        """All rows in the order of extraction, in batches that do not reach over the end of a shard."""
        return [
            (number, start, min(batch_size, shard.n_rows - start))
            for number, shard in enumerate(self.shards)
            for start in range(0, shard.n_rows, batch_size)
        ]


class DiskChunks:
    """Feeds `Batches` from a store: blocks of consecutive rows, in a random order over the whole store.

    A chunk gathers blocks from all over the store and is shuffled row by row in memory. With `block_rows=1` that is a
    perfect shuffle at the price of random reads; with larger blocks neighbours in the store meet in the same chunk (not
    the same batch) more often than by chance.

    Args:
        store: The store.
        chunk_rows: Rows in memory at a time; twice that with the chunk that is read ahead.
        block_rows: Rows read at once.
        columns: Metadata to carry.
        rank: Which share of each epoch; shares are disjoint.
        world_size: Number of shares.
        gradients: Also read the gradients of the model's loss.
    """

    def __init__(
        self,
        store: Store,
        chunk_rows: int = 131072,
        block_rows: int = 512,
        columns: Sequence[str] = (),
        rank: int = 0,
        world_size: int = 1,
        gradients: bool = False,
    ) -> None:
        if gradients and not store.manifest.gradients:
            raise MmsaeError(f"{store.folder} has no gradients: extract it again with data.gradients=true.")
        self.gradients = gradients
        self.store, self.columns = store, tuple(columns)
        self.chunk_rows = checked("chunk_rows", chunk_rows, 1)
        self.block_rows = checked("block_rows", block_rows, 1)
        unknown = [name for name in columns if name not in store.manifest.columns]
        if unknown:
            raise MmsaeError(
                f"{store.folder} carries no column {unknown[0]!r}; it has {', '.join(store.manifest.columns)}."
            )
        self.n_rows = len(store) // world_size
        self.first = rank * self.n_rows
        self.spec = store.spec
        self._order: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def read(
        self, seed: int, epoch: int, cursor: int, memory: dict[str, Tensor] | None = None
    ) -> tuple[Batch, int | None]:
        """Rows `cursor .. cursor + chunk_rows` of the epoch's order, and the next cursor; `memory` is used again."""
        blocks, ends = self._blocks(seed, epoch)
        start = self.first + cursor
        stop = min(start + self.chunk_rows, self.first + self.n_rows)
        pieces = []
        for index in range(int(np.searchsorted(ends, start, side="right")), len(blocks)):
            shard, row, count = (int(v) for v in blocks[index])
            begin = int(ends[index]) - count  # place of the block in the epoch's order
            if begin >= stop:
                break
            low, high = max(start, begin), min(stop, begin + count)
            pieces.append((shard, row + low - begin, high - low))
        following = stop - self.first
        return self.store.read(
            pieces, self.columns, memory, self.gradients
        ), following if following < self.n_rows else None

    def _blocks(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._order is None or self._order[0] != (seed, epoch):
            parts = []
            for number, shard in enumerate(self.store.shards):
                starts = np.arange(0, shard.n_rows, self.block_rows)
                counts = np.minimum(self.block_rows, shard.n_rows - starts)
                parts.append(np.stack([np.full_like(starts, number), starts, counts], axis=1))
            blocks = np.concatenate(parts)
            blocks = blocks[np.random.default_rng([seed, epoch, 0]).permutation(len(blocks))]
            self._order = ((seed, epoch), blocks, blocks[:, 2].cumsum())
        return self._order[1], self._order[2]

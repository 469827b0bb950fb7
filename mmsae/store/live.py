"""Activations made while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmsae.errors import MmsaeError, checked
from mmsae.spec import ACTS, GRADS, ActivationSpec, Batch, map_batch, rows_of
from mmsae.store.writer import concatenate


class Reader(Protocol):
    """What a source offers to the store: it is the only side that knows a model."""

    @property
    def spec(self) -> ActivationSpec:
        """Widths of the streams."""
        ...

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Join items into a model input."""
        ...

    def read(self, batch: dict[str, Any], gradients: bool = False) -> Batch:
        """Run the model and give activation rows."""
        ...


class LiveChunks:
    """Feeds `Batches` from a running model: a mixing buffer that is refilled in the background.

    Examples come in a random order; a chunk is filled until it holds `chunk_rows` rows and is then shuffled row by row,
    so its batches mix the rows of `chunk_rows / rows per example` examples.

    Args:
        source: Runs the model.
        items: The examples.
        chunk_rows: Size of the buffer.
        examples_per_forward: Examples per forward pass.
        columns: Metadata to carry.
        rank: Which share of each epoch.
        world_size: Number of shares.
        gradients: Also run the model backwards from its loss.
    """

    def __init__(
        self,
        source: Reader,
        items: Dataset[dict[str, Any]],
        chunk_rows: int = 131072,
        examples_per_forward: int = 64,
        columns: Sequence[str] = (),
        rank: int = 0,
        world_size: int = 1,
        gradients: bool = False,
    ) -> None:
        self.gradients = gradients
        self.source, self.items, self.columns = source, items, tuple(columns)
        self.chunk_rows = checked("chunk_rows", chunk_rows, 1)
        self.examples_per_forward = checked("examples_per_forward", examples_per_forward, 1)
        self.rank, self.world_size = rank, world_size
        self.n_rows: int | None = None
        self.spec = source.spec

    def read(
        self, seed: int, epoch: int, cursor: int, memory: dict[str, Tensor] | None = None
    ) -> tuple[Batch, int | None]:
        """Run examples `cursor ...` of the epoch's order until the buffer is full; `memory` is not needed."""
        n_items = len(self.items)  # type: ignore[arg-type]
        order = np.random.default_rng([seed, epoch, 0]).permutation(n_items)
        order = order[: n_items - n_items % self.world_size][self.rank :: self.world_size]
        if len(order) == 0:
            raise MmsaeError(f"{n_items} examples cannot be shared by {self.world_size} devices.")
        parts, total = [], 0
        while total < self.chunk_rows and cursor < len(order):
            chosen = order[cursor : cursor + self.examples_per_forward]
            cursor += len(chosen)
            with torch.no_grad():
                rows = self.source.read(self.source.collate([self.items[int(i)] for i in chosen]), self.gradients)
            missing = [name for name in self.columns if name not in rows]
            if missing:
                raise MmsaeError(f"the source gives no column {missing[0]!r}; it gives {', '.join(rows)}.")
            rows = {name: rows[name] for name in (ACTS, GRADS, *self.columns) if name in rows}
            parts.append(map_batch(rows, lambda t: t.cpu()))
            total += rows_of(rows)
        return concatenate(parts), cursor if cursor < len(order) else None

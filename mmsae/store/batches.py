"""Shuffled batches from chunks, on disk or live, whose order is a pure function of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmsae.errors import MmsaeError, checked
from mmsae.spec import ActivationSpec, Batch, map_batch, rows_of
from mmsae.store.writer import concatenate


class Chunks(Protocol):
    """What `Batches` draws from.

    Attributes:
        spec: Of the streams.
        n_rows: Rows per epoch, or None when nobody knows beforehand.
    """

    spec: ActivationSpec

    @property
    def n_rows(self) -> int | None:
        """See above."""
        ...

    def read(
        self, seed: int, epoch: int, cursor: int, memory: dict[str, Tensor] | None = None
    ) -> tuple[Batch, int | None]:
        """The chunk that begins at `cursor` (0 at first), and the cursor of the next (None at the end).

        The chunk may lie in `memory`, which belongs to the caller: fresh pages would cost more than the reading.
        """
        ...


class Batches:
    """A resumable loader: each row exactly once per epoch, shuffled at row level inside a chunk.

    Each `iter` is an epoch. One background thread reads the next chunk while the current one is used. What does not
    fill a batch is carried into the next chunk; the last batch of an epoch may be smaller.

    Args:
        chunks: Where rows come from.
        batch_size: Rows per batch.
        seed: Of the order.
        read_ahead: Whether to read the next chunk in the background.
        device: Where chunks are kept and batches are drawn: at the speed of an accelerator a step takes its rows faster
            than single batches could be sent.
    """

    def __init__(
        self,
        chunks: Chunks,
        batch_size: int,
        seed: int = 0,
        read_ahead: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.chunks, self.seed, self.read_ahead, self.device = chunks, seed, read_ahead, torch.device(device)
        self.batch_size = checked("batch_size", batch_size, 1)
        if chunks.n_rows is not None and batch_size > chunks.n_rows:
            raise MmsaeError(
                f"batch_size={batch_size} is larger than the data ({chunks.n_rows} activation rows): lower it."
            )
        self.next_epoch = 0
        self._state: dict[str, Any] | None = None  # of the running epoch
        self._resume: dict[str, Any] | None = None

    def __len__(self) -> int:
        if self.chunks.n_rows is None:
            raise TypeError("the number of live activation rows is not known beforehand")
        return -(-self.chunks.n_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._resume is not None:
            state, self._resume = self._resume, None
        else:
            state = {"epoch": self.next_epoch, "cursor": 0, "used": 0, "carry": None}
        self.next_epoch = state["epoch"] + 1
        self._state = state
        epoch: int = state["epoch"]
        cursor: int | None = state["cursor"]
        memories: list[dict[str, Tensor]] = [{}, {}]  # one in use, one being filled
        with ThreadPoolExecutor(1) as pool:
            ahead = self._fetch(pool, epoch, state["cursor"], memories[0])
            while cursor is not None:
                rows, following = ahead.result()
                memories.reverse()
                rows = self._place(rows)
                if following is not None:
                    ahead = self._fetch(pool, epoch, following, memories[0])
                shuffled = np.random.default_rng([self.seed, epoch, 1, cursor]).permutation(rows_of(rows))
                order, carry = torch.from_numpy(shuffled).to(self.device), state["carry"]
                if carry is not None:
                    carry = map_batch(carry, lambda t: t.to(self.device))
                n_carried = rows_of(carry) if carry is not None else 0
                n = n_carried + len(order)
                n_used = n if following is None else n - n % self.batch_size
                for start in range(state["used"] * self.batch_size, n_used, self.batch_size):
                    chosen = order[max(start - n_carried, 0) : max(start + self.batch_size - n_carried, 0)]
                    batch = map_batch(rows, lambda t, i=chosen: t.index_select(0, i))
                    if start < n_carried:
                        batch = concatenate([map_batch(carry, lambda t, a=start: t[a : a + self.batch_size]), batch])
                    state["used"] += 1
                    yield batch
                left = order[max(n_used - n_carried, 0) :]
                rest = map_batch(rows, lambda t, i=left: t.index_select(0, i)) if n_used < n else None
                if rest is not None and n_used < n_carried:
                    rest = concatenate([map_batch(carry, lambda t, a=n_used: t[a:]), rest])
                cursor = following
                state.update(cursor=cursor, used=0, carry=rest)

    def _place(self, rows: Batch) -> Batch:
        """The chunk on the device, by one copy from pinned memory, finished when this returns."""
        if self.device.type == "cpu":
            return rows
        pin = self.device.type == "cuda"
        placed = map_batch(rows, lambda t: (t.pin_memory() if pin else t).to(self.device, non_blocking=True))
        if pin:
            torch.cuda.current_stream(self.device).synchronize()  # the memory is read into again soon
        return placed

    def _fetch(
        self, pool: ThreadPoolExecutor, epoch: int, cursor: int, memory: dict[str, Tensor]
    ) -> Future[tuple[Batch, int | None]]:
        if self.read_ahead:
            return pool.submit(self.chunks.read, self.seed, epoch, cursor, memory)
        future: Future[tuple[Batch, int | None]] = Future()
        future.set_result(self.chunks.read(self.seed, epoch, cursor, memory))
        return future

    def sample(self, n_rows: int) -> Batch:
        """The first rows of epoch 0 in their shuffled order, without moving the position."""
        return first_rows(Batches(self.chunks, self.batch_size, self.seed, read_ahead=False), n_rows)

    def state_dict(self) -> dict[str, Any]:
        """Position in the running epoch; after its last batch an empty rest is left, as Lightning expects."""
        state = self._resume or self._state
        if state is None:
            return {"seed": self.seed, "epoch": self.next_epoch, "cursor": 0, "used": 0, "carry": None}
        return {"seed": self.seed, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; the next `iter` finishes that epoch."""
        state = dict(state)
        if state.pop("seed") != self.seed:
            raise MmsaeError(f"the checkpoint was made with another data seed than {self.seed}: resume with that one.")
        self._state = None
        if state["cursor"] is None:  # that epoch was complete
            self.next_epoch = state["epoch"] + 1
        else:
            self._resume = state


def first_rows(batches: Iterable[Batch], n_rows: int) -> Batch:
    """The first `n_rows` rows of some batches, or all if there are fewer."""
    taken, total = [], 0
    for batch in batches:
        taken.append(batch)
        total += rows_of(batch)
        if total >= n_rows:
            break
    if not taken:
        raise MmsaeError("the training data give no activation rows: are the data empty, or the positions?")
    return map_batch(concatenate(taken), lambda t: t[:n_rows])

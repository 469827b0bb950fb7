"""Rows to disk in shards of a fixed size: atomic, and after an interruption on to the same bytes."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from mmsae.errors import MmsaeError, checked
from mmsae.files import write_atomic
from mmsae.store.manifest import MANIFEST
from mmsae.store.shards import fields_of

PLAN = "plan.json"

Piece = TypeVar("Piece")


class Progress(NamedTuple):
    """Where an interrupted writer goes on: skip `batches` batches, then `rows` rows of the next."""

    batches: int
    rows: int


class ShardWriter(ABC, Generic[Piece]):
    """One rank's share of a folder of shards.

    Rows are cut into shards of `rows_per_shard`, whatever the size of the batches. A finished shard is committed by a
    small JSON file beside it, which says up to which row of which batch it reaches; a restart drops what was not
    committed and goes on from there. When all ranks are done, one of them joins the commits into the manifest.

    Args:
        folder: Where to.
        plan: Everything that decides the bytes, as JSON; a restart with another plan is refused.
        rows_per_shard: Rows of every shard but each rank's last.
        rank: Of this writer.
        world_size: Number of writers.
    """

    verb: ClassVar[str] = "extract"
    """The command that writes such a folder."""

    def __init__(
        self, folder: Path, plan: dict[str, Any], rows_per_shard: int = 65536, rank: int = 0, world_size: int = 1
    ) -> None:
        self.folder, self.rank = folder, rank
        self.rows_per_shard = checked("rows_per_shard", rows_per_shard, 1)
        self.plan = json.loads(json.dumps({**plan, "rows_per_shard": rows_per_shard, "world_size": world_size}))
        self.pending: list[Piece] = []
        self.n_pending = 0
        self.n_batches = 0

    @abstractmethod
    def serialise(self, pieces: list[Piece]) -> tuple[bytes, dict[str, Any]]:
        """A shard's bytes, and what the manifest says about it beside its rows, bytes and checksum."""

    @property
    def complete(self) -> bool:
        """Whether the folder is finished; with another plan it is refused."""
        self._check_plan()
        done = (self.folder / MANIFEST).is_file()
        if done and self.rank == 0:
            self.drop_commits()  # a kill right after the manifest may have left them
        return done

    def _check_plan(self) -> None:
        path = self.folder / PLAN
        if not path.is_file():
            return
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise MmsaeError(f"{path} is damaged: delete {self.folder} and {self.verb} again.") from error
        changed = [key for key in sorted({*old, *self.plan}) if old.get(key) != self.plan.get(key)]
        if changed:
            key = changed[0]
            raise MmsaeError(
                f"{self.folder} was begun with another {key} ({old.get(key)!r}, now {self.plan.get(key)!r}): "
                f"{self.verb} into another folder, or delete this one."
            )

    def resume(self) -> Progress:
        """Check the plan, drop what was not committed, and say where to go on."""
        self._check_plan()
        if self.rank == 0 and not (self.folder / PLAN).is_file():
            write_atomic(self.folder / PLAN, json.dumps(self.plan, indent=1).encode())
        self.folder.mkdir(parents=True, exist_ok=True)
        self.n_shards, progress = 0, Progress(0, 0)
        while (commit := self._commit_path(self.n_shards)).is_file():
            entry = json.loads(commit.read_text())
            fields_of(self.folder / entry["file"], self.verb)  # a truncated one is named here
            progress = Progress(*entry["end"])
            self.n_shards += 1
        if not (self.folder / MANIFEST).is_file():  # what a killed writer left behind
            leftovers = [*self.folder.glob(f"{self.rank:03d}-*.part"), self.folder / self._shard_name(self.n_shards)]
            for path in leftovers:
                path.unlink(missing_ok=True)
        self.n_batches, self.skip_rows = progress
        return progress

    def _shard_name(self, index: int) -> str:
        return f"{self.rank:03d}-{index:05d}.safetensors"

    def _commit_path(self, index: int) -> Path:
        return self.folder / f"{self.rank:03d}-{index:05d}.json"

    def take(self, n_rows: int, cut: Callable[[int, int], Piece]) -> None:
        """Take the rows of one batch, in order.

        Args:
            n_rows: How many it has.
            cut: Gives the rows from a first to before a last.
        """
        start, self.skip_rows = self.skip_rows, 0
        while start < n_rows:
            count = min(n_rows - start, self.rows_per_shard - self.n_pending)
            self.pending.append(cut(start, start + count))
            self.n_pending += count
            start += count
            if self.n_pending == self.rows_per_shard:
                self._write((self.n_batches + 1, 0) if start == n_rows else (self.n_batches, start))
        self.n_batches += 1

    def close(self) -> None:
        """Write this rank's last, shorter shard."""
        if self.n_pending:
            self._write((self.n_batches, 0))

    def _write(self, end: tuple[int, int]) -> None:
        data, more = self.serialise(self.pending)
        name = self._shard_name(self.n_shards)
        write_atomic(self.folder / name, data)
        entry = {
            "file": name,
            "rows": self.n_pending,
            **more,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "end": list(end),
        }
        write_atomic(self._commit_path(self.n_shards), json.dumps(entry).encode())
        self.pending, self.n_pending, self.n_shards = [], 0, self.n_shards + 1

    def committed(self) -> list[dict[str, Any]]:
        """Entries of all ranks for the manifest."""
        entries = [json.loads(path.read_text()) for path in sorted(self.folder.glob("[0-9]*-[0-9]*.json"))]
        for entry in entries:
            entry.pop("end")
        return entries

    def drop_commits(self) -> None:
        """The manifest has taken their place."""
        for path in self.folder.glob("[0-9]*-[0-9]*.json"):
            path.unlink()

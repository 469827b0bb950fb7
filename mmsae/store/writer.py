"""Writes activations to disk: fixed-size shards, atomic, resumable to the same bytes."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mmsae
from mmsae.errors import MmsaeError, checked
from mmsae.spec import ACTS, Batch, map_batch, rows_of
from mmsae.store.manifest import DTYPES, MANIFEST, Manifest, Statistics, save_statistics, write_atomic
from mmsae.store.shards import MOMENTS, Shard, encode_shard

PLAN = "plan.json"


class Progress(NamedTuple):
    """Where an interrupted extraction goes on: skip `batches` batches, then `rows` rows of the next."""

    batches: int
    rows: int


class Writer:
    """One rank's share of a store.

    Rows are cut into shards of `rows_per_shard`, whatever the size of the batches. A finished shard is committed by a
    small JSON file beside it, which says up to which row of which batch it reaches; a restart drops what was not
    committed and goes on from there. `finish` (on one rank, after all are done) writes the manifest.

    Args:
        folder: The store.
        plan: Everything that decides the bytes (source, data, batch size, ...), as JSON; a restart with another plan
            is refused.
        dtype: Activations are stored as this; "auto" keeps them as the model gives them.
        rows_per_shard: Rows of every shard but each rank's last.
        covariance: Also keep second moments.
        rank: Of this writer.
        world_size: Number of writers.
    """

    def __init__(
        self,
        folder: Path,
        plan: dict[str, Any],
        dtype: str = "auto",
        rows_per_shard: int = 65536,
        covariance: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if dtype not in ("auto", *DTYPES):
            raise MmsaeError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}.")
        self.folder, self.dtype, self.covariance, self.rank = folder, dtype, covariance, rank
        self.rows_per_shard = checked("rows_per_shard", rows_per_shard, 1)
        sizes = {"dtype": dtype, "rows_per_shard": rows_per_shard, "covariance": covariance, "world_size": world_size}
        self.plan = json.loads(json.dumps({**plan, **sizes}))
        self.pending: list[Batch] = []
        self.n_pending = 0
        self.n_batches = 0

    @property
    def complete(self) -> bool:
        """Whether the store is finished; with another plan it is refused."""
        self._check_plan()
        done = (self.folder / MANIFEST).is_file()
        if done and self.rank == 0:
            self._drop_commits()  # a kill right after the manifest may have left them
        return done

    def _check_plan(self) -> None:
        path = self.folder / PLAN
        if not path.is_file():
            return
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise MmsaeError(f"{path} is damaged: delete {self.folder} and extract again.") from error
        changed = [key for key in sorted({*old, *self.plan}) if old.get(key) != self.plan.get(key)]
        if changed:
            key = changed[0]
            raise MmsaeError(
                f"{self.folder} was begun with another {key} ({old.get(key)!r}, now {self.plan.get(key)!r}): "
                "extract into another folder, or delete this one."
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
            Shard.open(self.folder / entry["file"])  # a truncated one is named here
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

    def add(self, batch: Batch) -> None:
        """Take the rows of one batch, in order."""
        kept = {stream: x.dtype if self.dtype == "auto" else DTYPES[self.dtype] for stream, x in batch[ACTS].items()}
        acts = {stream: x.detach().to("cpu", kept[stream]) for stream, x in batch[ACTS].items()}
        rows = map_batch({**batch, ACTS: acts}, lambda t: t.cpu())
        n, start = rows_of(rows), self.skip_rows
        self.skip_rows = 0
        while start < n:
            take = min(n - start, self.rows_per_shard - self.n_pending)
            self.pending.append(map_batch(rows, lambda t, a=start, b=start + take: t[a:b]))
            self.n_pending += take
            start += take
            if self.n_pending == self.rows_per_shard:
                end = (self.n_batches + 1, 0) if start == n else (self.n_batches, start)
                self._write(end)
        self.n_batches += 1

    def close(self) -> None:
        """Write this rank's last, shorter shard."""
        if self.n_pending:
            self._write((self.n_batches, 0))

    def _write(self, end: tuple[int, int]) -> None:
        rows = concatenate(self.pending)
        data, broken = encode_shard(rows, self.covariance)
        if broken:
            x = rows[ACTS][broken[0]]
            bad = int((~torch.isfinite(x)).any(1).nonzero()[0])
            where = f"sample {int(rows['sample_id'][bad])}" if "sample_id" in rows else f"row {bad} of a shard"
            raise MmsaeError(
                f"activations at {broken[0]} are not finite as {str(x.dtype).removeprefix('torch.')} ({where}): "
                "store them in a wider dtype, or look at the model's inputs."
            )
        name = self._shard_name(self.n_shards)
        write_atomic(self.folder / name, data)
        entry = {
            "file": name,
            "rows": self.n_pending,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "end": list(end),
        }
        write_atomic(self._commit_path(self.n_shards), json.dumps(entry).encode())
        self.pending, self.n_pending, self.n_shards = [], 0, self.n_shards + 1

    def finish(self, source: dict[str, Any], data: dict[str, Any], factors: dict[str, list[str]]) -> Manifest:
        """Join the commits of all ranks into the manifest and the statistics."""
        commits = sorted(self.folder.glob("[0-9]*-[0-9]*.json"))
        entries = [json.loads(path.read_text()) for path in commits]
        for entry in entries:
            entry.pop("end")
        if not entries:
            raise MmsaeError(f"no activations were extracted into {self.folder}: are data or positions empty?")
        first = Shard.open(self.folder / entries[0]["file"])
        streams = {n.removeprefix(f"{ACTS}."): f.shape[1] for n, f in first.fields.items() if n.startswith(f"{ACTS}.")}
        columns = {
            name: str(field.dtype).removeprefix("torch.")
            for name, field in sorted(first.fields.items())
            if not name.startswith((f"{ACTS}.", MOMENTS))
        }
        dtype = str(first.fields[f"{ACTS}.{next(iter(streams))}"].dtype).removeprefix("torch.")
        save_statistics(self.folder, self._statistics(entries, streams))
        manifest = Manifest(dtype, streams, columns, source, data, entries, library_versions(), factors)
        manifest.save(self.folder)
        self._drop_commits()
        return manifest

    def _drop_commits(self) -> None:
        for path in self.folder.glob("[0-9]*-[0-9]*.json"):
            path.unlink()

    def _statistics(self, entries: list[dict[str, Any]], streams: dict[str, int]) -> dict[str, Statistics]:
        totals: dict[str, Tensor] = {}
        for entry in entries:
            shard = Shard.open(self.folder / entry["file"])
            for name in shard.fields:
                if name.startswith(MOMENTS):
                    value = shard.tensor(name)
                    totals[name] = totals[name] + value if name in totals else value
        n_rows = sum(entry["rows"] for entry in entries)
        sums: dict[str, dict[str, Tensor]] = {stream: {} for stream in streams}
        for name, total in totals.items():
            stream, _, moment = name.removeprefix(MOMENTS).rpartition(".")
            sums[stream][moment] = total
        return {stream: Statistics.of(found, n_rows) for stream, found in sums.items()}


def concatenate(batches: list[Batch]) -> Batch:
    """Join batches row by row."""
    if len(batches) == 1:
        return batches[0]
    return {
        key: {s: torch.cat([b[key][s] for b in batches]) for s in value}
        if isinstance(value, dict)
        else torch.cat([b[key] for b in batches])
        for key, value in batches[0].items()
    }


def library_versions() -> dict[str, str]:
    """Of what decides the numbers."""
    found = {"mmsae": mmsae.__version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "transformers", "open_clip_torch", "timm", "torchvision", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

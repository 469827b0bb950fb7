"""Writes activations to disk."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmsae
from mmsae.errors import MmsaeError
from mmsae.spec import ACTS, GRADS, Batch, map_batch, rows_of
from mmsae.store.manifest import DTYPES, Manifest, Statistics, save_statistics
from mmsae.store.shard_writer import ShardWriter
from mmsae.store.shards import MOMENTS, Shard, encode_shard


class Writer(ShardWriter[Batch]):
    """One rank's share of a store of activations; `finish` (on one rank, after all are done) writes the manifest.

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
        self.dtype, self.covariance = dtype, covariance
        super().__init__(folder, {**plan, "dtype": dtype, "covariance": covariance}, rows_per_shard, rank, world_size)

    def add(self, batch: Batch) -> None:
        """Take the rows of one batch, in order."""
        kinds = {ACTS: DTYPES.get(self.dtype), GRADS: DTYPES.get(self.dtype)}
        if kinds[GRADS] == torch.float16:
            kinds[GRADS] = torch.bfloat16  # gradients are small, and float16 has no room below 1e-7
        cast = {
            key: {stream: x.detach().to("cpu", kind or x.dtype) for stream, x in batch[key].items()}
            for key, kind in kinds.items()
            if key in batch
        }
        rows = map_batch({**batch, **cast}, lambda t: t.cpu())
        self.take(rows_of(rows), lambda a, b: map_batch(rows, lambda t: t[a:b]))

    def serialise(self, pieces: list[Batch]) -> tuple[bytes, dict[str, Any]]:
        """Refuses rows that are not finite."""
        rows = concatenate(pieces)
        data, broken = encode_shard(rows, self.covariance)
        if broken:
            x = rows[ACTS][broken[0]]
            bad = int((~torch.isfinite(x)).any(1).nonzero()[0])
            where = f"sample {int(rows['sample_id'][bad])}" if "sample_id" in rows else f"row {bad} of a shard"
            raise MmsaeError(
                f"activations at {broken[0]} are not finite as {str(x.dtype).removeprefix('torch.')} ({where}): "
                "store them in a wider dtype, or look at the model's inputs."
            )
        return data, {}

    def finish(self, source: dict[str, Any], data: dict[str, Any], factors: dict[str, list[str]]) -> Manifest:
        """Join the commits of all ranks into the manifest and the statistics."""
        entries = self.committed()
        if not entries:
            raise MmsaeError(f"no activations were extracted into {self.folder}: are data or positions empty?")
        first = Shard.open(self.folder / entries[0]["file"])
        streams = {n.removeprefix(f"{ACTS}."): f.shape[1] for n, f in first.fields.items() if n.startswith(f"{ACTS}.")}
        gradients = any(name.startswith(f"{GRADS}.") for name in first.fields)
        columns = {
            name: str(field.dtype).removeprefix("torch.")
            for name, field in sorted(first.fields.items())
            if not name.startswith((f"{ACTS}.", f"{GRADS}.", MOMENTS))
        }
        dtype = str(first.fields[f"{ACTS}.{next(iter(streams))}"].dtype).removeprefix("torch.")
        save_statistics(self.folder, self._statistics(entries, streams))
        manifest = Manifest(dtype, streams, columns, source, data, entries, library_versions(), factors, gradients)
        manifest.save(self.folder)
        self.drop_commits()
        return manifest

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

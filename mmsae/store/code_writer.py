"""Writes codes to disk, nothing but the pairs that are not 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from mmsae.codes import Codes
from mmsae.errors import MmsaeError
from mmsae.spec import ActivationSpec
from mmsae.store.manifest import CodeManifest
from mmsae.store.shard_writer import ShardWriter
from mmsae.store.shards import fields_of
from mmsae.store.writer import library_versions

OFFSETS, LATENTS, VALUES, FIRINGS = "codes.offsets", "codes.latents", "codes.values", "codes.firings"
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Rows(NamedTuple):
    """Some rows of a batch, as stored.

    Attributes:
        values: `[n, width]`.
        latents: `[n, width]`.
        columns: `[n, ...]` each.
    """

    values: np.ndarray
    latents: np.ndarray
    columns: dict[str, np.ndarray]


def compact(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of each row, and the latents and values of those that are not 0."""
    kept = rows.values != 0
    counts = kept.sum(1, dtype=np.int64)
    if kept.all():  # as TopK gives them: nothing to pick out
        return counts, rows.latents.reshape(-1), rows.values.reshape(-1)
    return counts, rows.latents[kept], rows.values[kept]


class CodeWriter(ShardWriter[Rows]):
    """One rank's share of a store of codes; `finish` (on one rank, after all are done) writes the manifest.

    A shard is a safetensors file, so raw little-endian arrays at known places: `codes.offsets` int64 `[rows + 1]`,
    `codes.latents` (uint16 up to 65,536 latents, else int32) and `codes.values` `[pairs]` in the order in which the
    dictionary gives them, `codes.firings` int32 `[d_latent]`, and the metadata columns.

    Args:
        folder: The store.
        plan: Everything that decides the bytes (dictionary, data, batch size, ...), as JSON; a restart with another
            plan is refused.
        d_latent: Size of the dictionary.
        dtype: Codes are stored as this. "float16" takes a third less disk and keeps three digits; a code too small for
            it becomes 0 and is dropped.
        rows_per_shard: Rows of every shard but each rank's last.
        rank: Of this writer.
        world_size: Number of writers.
    """

    verb: ClassVar[str] = "encode"

    def __init__(
        self,
        folder: Path,
        plan: dict[str, Any],
        d_latent: int,
        dtype: str = "float32",
        rows_per_shard: int = 65536,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if dtype not in DTYPES:
            raise MmsaeError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
        super().__init__(folder, {**plan, "d_latent": d_latent, "dtype": dtype}, rows_per_shard, rank, world_size)
        self.d_latent, self.dtype = d_latent, dtype

    def add(self, codes: Codes, columns: dict[str, Tensor]) -> None:
        """Take the rows of one batch, in order.

        Args:
            codes: `[rows, ...]`; made narrow where they are, before they travel to the CPU.
            columns: Metadata, `[rows, ...]` each.
        """
        assert codes.d_latent == self.d_latent
        pairs = codes.detach().sparse()
        assert pairs.indices is not None
        narrow = torch.uint16 if self.d_latent <= 2**16 else torch.int32
        rows = Rows(
            pairs.values.to(DTYPES[self.dtype]).cpu().numpy(),
            pairs.indices.to(narrow).cpu().numpy(),
            {name: column.cpu().numpy() for name, column in columns.items()},
        )

        def cut(first: int, last: int) -> Rows:
            own = {name: column[first:last] for name, column in rows.columns.items()}
            return Rows(rows.values[first:last], rows.latents[first:last], own)

        self.take(len(rows.values), cut)

    def serialise(self, pieces: list[Rows]) -> tuple[bytes, dict[str, Any]]:
        """Refuses codes that are not finite."""
        columns = {name: np.concatenate([p.columns[name] for p in pieces]) for name in pieces[0].columns}
        counts, latents, values = (np.concatenate(parts) for parts in zip(*map(compact, pieces), strict=True))
        offsets = np.concatenate([[0], counts.cumsum()])
        if not np.isfinite(values).all():
            row = int(np.searchsorted(offsets, np.flatnonzero(~np.isfinite(values))[0], side="right")) - 1
            where = f"sample {int(columns['sample_id'][row])}" if "sample_id" in columns else f"row {row} of a shard"
            raise MmsaeError(
                f"codes are not finite as {self.dtype} ({where}): store them as float32, or look at the activations."
            )
        firings = np.bincount(latents, minlength=self.d_latent).astype(np.int32)
        tensors = {OFFSETS: offsets, LATENTS: latents, VALUES: values, FIRINGS: firings, **columns}
        return save(tensors), {"pairs": len(values)}

    def finish(
        self,
        dictionary: dict[str, Any],
        spec: ActivationSpec,
        signed: bool,
        source: dict[str, Any],
        data: dict[str, Any],
        factors: dict[str, list[str]],
    ) -> CodeManifest:
        """Join the commits of all ranks into the manifest."""
        entries = self.committed()
        if not entries:
            raise MmsaeError(f"no codes were written into {self.folder}: are the data, or the positions, empty?")
        fields = fields_of(self.folder / entries[0]["file"], self.verb)
        columns = {
            name: str(field.dtype).removeprefix("torch.")
            for name, field in sorted(fields.items())
            if not name.startswith("codes.")
        }
        manifest = CodeManifest(
            self.dtype, spec.streams, columns, source, data, entries, library_versions(), factors,
            d_latent=self.d_latent, signed=signed, dictionary=dictionary,
        )  # fmt: skip
        manifest.save(self.folder)
        self.drop_commits()
        return manifest

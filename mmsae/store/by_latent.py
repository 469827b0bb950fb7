"""Turns codes row by row into codes latent by latent, on disk, in bounded memory."""

from __future__ import annotations

import json
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from mmsae.files import sync_folder
from mmsae.store.shards import fields_of, map_arrays

if TYPE_CHECKING:
    from mmsae.store.code_store import CodeStore

CACHED, BUCKETS = 1 << 21, 1024
"""Pairs sorted at a time, about 40 bytes each: few enough for the cache, but in no more than so many buckets."""
NAMES = {"int64": "I64", "int32": "I32", "uint16": "U16", "float32": "F32", "float16": "F16"}


class ByLatent(NamedTuple):
    """Codes latent by latent; the arrays may lie in memory maps.

    Attributes:
        offsets: Where the pairs of each latent begin, int64 `[d_latent + 1]`.
        rows: Of each pair, ascending within a latent, `[pairs]`.
        values: Of each pair, `[pairs]`.
    """

    offsets: np.ndarray
    rows: np.ndarray
    values: np.ndarray


def write_by_latent(store: CodeStore, path: Path, pairs_at_once: int | None = None) -> None:
    """Sort the pairs of a store by latent into a safetensors file (offsets, rows, values).

    Counts are known from the writing, so the place of every latent is, too. Neighbouring latents form buckets that fit
    into memory. The first pass moves every pair into the region of its bucket; the second sorts each region in place.
    Disks see long runs in both.

    Args:
        store: The codes.
        path: The file; it appears whole or not at all.
        pairs_at_once: Bound of what is held in memory; by default 2 million, and more beyond 2 billion pairs.
    """
    pairs_at_once = pairs_at_once or max(CACHED, store.n_pairs // BUCKETS)
    offsets = np.concatenate([[0], store.firings.cumsum()])
    bucket_of, edges = buckets(store.firings, pairs_at_once)
    part, scratch = path.with_name(path.name + ".part"), path.with_name(path.name + ".latents.part")
    n, row_dtype = store.n_pairs, "int32" if len(store) < 2**31 else "int64"
    value_dtype, latent_dtype = store.manifest.dtype, "uint16" if store.d_latent <= 2**16 else "int32"
    shapes = {"offsets": ("int64", len(offsets)), "rows": (row_dtype, n), "values": (value_dtype, n)}
    try:
        reserve(part, shapes)
        reserve(scratch, {"latents": (latent_dtype, n)})
        out, latents = writable(part), writable(scratch)["latents"]
        out["offsets"][:] = offsets
        spread(store, out, latents, bucket_of, edges, offsets, pairs_at_once)
        for first, last in pairwise(edges):
            region = slice(int(offsets[first]), int(offsets[last]))
            if last - first > 1 and region.stop > region.start:  # a latent alone is in order already
                order = stable_order(latents[region] - latents.dtype.type(first))
                for array in (out["rows"], out["values"]):
                    array[region] = array[region][order]
        del out, latents
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)
        scratch.unlink(missing_ok=True)


def buckets(firings: np.ndarray, limit: int) -> tuple[np.ndarray, list[int]]:
    """Runs of at most 65,536 latents with at most `limit` pairs together, or one latent.

    Returns:
        Bucket of each latent `[d_latent]`, and the first latent of each bucket, with `d_latent` at the end.
    """
    edges, total = [0], 0
    for latent, count in enumerate(firings.tolist()):
        if (total and total + count > limit) or latent - edges[-1] == 2**16:
            edges.append(latent)
            total = 0
        total += count
    edges.append(len(firings))
    bucket_of = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    return bucket_of.astype(np.min_scalar_type(len(edges))), edges


def spread(
    store: CodeStore,
    out: dict[str, np.ndarray],
    latents: np.ndarray,
    bucket_of: np.ndarray,
    edges: list[int],
    offsets: np.ndarray,
    pairs_at_once: int,
) -> None:
    """Move every pair into the region of its bucket; within a region rows ascend."""
    cursor = offsets[edges[:-1]].copy()
    rows_at_once = max(1, pairs_at_once * len(store) // max(store.n_pairs, 1))
    for start in tqdm(range(0, len(store), rows_at_once), desc="sorting by latent", leave=False, disable=None):
        pairs = store.pairs(start, min(start + rows_at_once, len(store)))
        rows = np.repeat(np.arange(start, start + len(pairs.counts), dtype=out["rows"].dtype), pairs.counts)
        bucket = bucket_of[pairs.latents]
        order = stable_order(bucket)
        counts = np.bincount(bucket, minlength=len(cursor))
        moved = rows[order], pairs.values[order], pairs.latents[order]
        ends = counts.cumsum()
        for number in np.flatnonzero(counts).tolist():
            own, place = slice(ends[number] - counts[number], ends[number]), cursor[number]
            for array, source in zip((out["rows"], out["values"], latents), moved, strict=True):
                array[place : place + counts[number]] = source[own]
        cursor += counts


def stable_order(keys: np.ndarray) -> np.ndarray:
    """Order that sorts small integers and keeps equal ones in place; NumPy sorts 16 bits by radix, much faster."""
    return np.argsort(keys.astype(np.uint16) if keys.max(initial=0) < 2**16 else keys, kind="stable")


def reserve(path: Path, shapes: dict[str, tuple[str, int]]) -> None:
    """A safetensors file of one-dimensional arrays whose space is taken but not yet filled.

    A memory map of a file with holes would end the process when the disk is full; here that is an error.
    """
    header, end = {}, 0
    for name, (dtype, n) in shapes.items():
        size = n * np.dtype(dtype).itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": [n], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        file.truncate(8 + len(text) + end)


def writable(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a reserved file, in a memory map that is written back."""
    return map_arrays(path, fields_of(path, "encode"), mode="r+")

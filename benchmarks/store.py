"""Write and read rates of the activation store against the sequential rate of the same disk.

    python benchmarks/store.py --rows 1000000 --width 768

Rounds are interleaved; the table shows the median, minimum and maximum of each way. Files are dropped from the page
cache before each cold read (`posix_fadvise`), so that no root rights are needed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmsae.spec import ACTS, rows_of
from mmsae.store import Batches, DiskChunks, Store, Writer


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(folder: Path, rows: int, width: int) -> None:
    """A store of random half-precision rows."""
    shutil.rmtree(folder, ignore_errors=True)
    writer = Writer(folder, {"benchmark": True}, "float16")
    writer.resume()
    block = torch.randn(16384, width).half()
    for start in range(0, rows, len(block)):
        n = min(len(block), rows - start)
        writer.add({ACTS: {"x": block[:n]}, "sample_id": torch.arange(start, start + n)})
    writer.close()
    writer.finish({}, {}, {})


def sequential(store: Store) -> int:
    """Read the files from front to back."""
    for shard in store.shards:
        with open(shard.path, "rb", buffering=0) as file:
            while file.read(1 << 22):
                pass
    return len(store)


def shuffled(store: Store, block_rows: int) -> int:
    """One epoch of training batches."""
    return sum(rows_of(batch) for batch in Batches(DiskChunks(store, block_rows=block_rows), 4096))


def in_order(store: Store) -> int:
    """All rows with their metadata."""
    return sum(rows_of(batch) for batch in store.in_order(4096))


def mixing(store: Store, block_rows: int) -> float:
    """Share of pairs within a batch that lay in the same block of 512 rows on disk, over what chance would give."""
    batch = next(iter(Batches(DiskChunks(store, block_rows=block_rows, columns=["sample_id"]), 4096)))
    block = batch["sample_id"] // 512
    counts = torch.bincount(block).double()
    n = len(block)
    observed = float((counts * (counts - 1)).sum()) / (n * (n - 1))
    return observed / (512 / len(store))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: the temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=args.folder)) / "store"
    gigabytes = args.rows * args.width * 2 / 1e9
    times: dict[str, list[float]] = {}

    def clock(name: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        times.setdefault(name, []).append(time.perf_counter() - start)

    for _ in range(args.rounds):
        clock("write", lambda: write(folder, args.rows, args.width))
        store = Store(folder, verify="size")
        for state in ("cold", "warm"):
            ways: dict[str, Callable[[], object]] = {
                f"sequential read, {state}": partial(sequential, store),
                f"shuffled batches, blocks of 512, {state}": partial(shuffled, store, 512),
                f"shuffled batches, blocks of 64, {state}": partial(shuffled, store, 64),
                f"rows in order with metadata, {state}": partial(in_order, store),
            }
            for name, action in ways.items():
                if state == "cold":
                    forget(folder)
                clock(name, action)
        clock("verify checksums, warm", lambda: Store(folder))
    table = Table(title=f"{args.rows:,} rows of {args.width} x float16 ({gigabytes:.2f} GB), {args.rounds} rounds")
    for column in ("", "GB/s median", "min", "max", "rows/s median", "of sequential"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in times.items():
        state = "cold" if name.endswith("cold") else "warm"
        ratios = [s / t for s, t in zip(times[f"sequential read, {state}"], found, strict=True)]
        rates = sorted(gigabytes / t for t in found)
        median = statistics.median(rates)
        table.add_row(
            name,
            *(f"{rate:.2f}" for rate in (median, rates[0], rates[-1])),
            f"{median * 1e9 / (2 * args.width):,.0f}",
            f"{statistics.median(ratios):.0%}" if name != "write" else "",
        )
    Console().print(table)
    for block_rows in (1, 64, 512):
        factor = mixing(store, block_rows)
        print(
            f"rows of one 512-row stretch of the store meet in a batch {factor:.2f} x as often as by chance "
            f"(blocks of {block_rows})"
        )
    shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()

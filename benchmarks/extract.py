"""What reading activations costs beside the bare forward pass of the model, for every class of source.

    python benchmarks/extract.py
    python benchmarks/extract.py --sources CausalLM,Timm --rounds 9

Models of the real classes with random weights read data sets in files. In each round, in turn and on the same batches:
the bare forward pass as far as the hook point (a hook that does nothing but stop), the same in full, the source's
`read`, collating alone, and the whole of `mmsae extract` (files, collating, reading, writing a store). Ratios are of
CPU time in the same round, which other work on the machine disturbs least; 1.10 means 10 % more than the bare forward
pass. Wall time is in the file of `--json`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.table import Table
from rounds import CONSOLE, save
from specimens import SPECIMENS, Size, Specimen

from mmsae.hooks import HookPoint
from mmsae.training.extract import ExtractModule

WAYS = ("to depth", "in full", "read", "collate", "extract")


class Enough(Exception):
    """The hook point was reached."""


def to_depth(specimen: Specimen, model: Any, points: list[HookPoint], batch: dict[str, Any]) -> None:
    """The bare forward pass, which ends behind the last hook point."""
    left = len(points)
    handles = []

    def stop(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Enough

    for point in points:
        handles.append(model.get_submodule(point.path).register_forward_hook(stop))
    try:
        specimen.bare(model, batch)
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def ways(specimen: Specimen, folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed; each goes over all batches once."""
    data, source = specimen.data, specimen.data.source
    assert source is not None
    model = source.model
    batches = list(data.item_batches("train"))
    numbers = count()

    def extract() -> None:
        module = ExtractModule(str(folder / f"store{next(numbers)}"), splits=["train"])
        module.prepare(data)
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False,
        )  # fmt: skip
        trainer.predict(module, return_predictions=False)

    def shallow() -> None:
        for batch in batches:
            to_depth(specimen, model, source.points, batch)

    found: dict[str, Callable[[], object]] = {
        "to depth": shallow,
        "in full": lambda: [bool(specimen.bare(model, batch) is None) for batch in batches],
        "read": lambda: [len(source.read(batch)) for batch in batches],
        "collate": lambda: [None for _ in data.item_batches("train")],
        "extract": extract,
    }
    # Pairs are read at the end of both towers, and a sampler calls its network once a step: its first call is no depth
    if type(source).__name__ in ("PairedEmbeddings", "Diffusion"):
        del found["to depth"]
    return found


def measured(name: str, size: Size, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """CPU and wall seconds of every way in every round, and the rows of one."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        specimen = SPECIMENS[name](size, Path(folder))
        timed = ways(specimen, Path(folder))
        source = specimen.data.source
        assert source is not None
        rows = sum(len(source.read(batch)["sample_id"]) for batch in specimen.data.item_batches("train"))
        for action in timed.values():
            action()  # what is made once
        cpu: dict[str, list[float]] = {way: [] for way in timed}
        wall: dict[str, list[float]] = {way: [] for way in timed}
        names = list(timed)
        for number in range(rounds):
            shift = number % len(names)
            for way in names[shift:] + names[:shift]:
                start, began = time.process_time(), time.perf_counter()
                timed[way]()
                cpu[way].append(time.process_time() - start)
                wall[way].append(time.perf_counter() - began)
    return cpu, wall, rows


def ratio(of: list[float], to: list[float]) -> str:
    """Median, least and most of the ratios by round."""
    found = sorted(a / b for a, b in zip(of, to, strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f}, {found[-1]:.2f})"


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", default=",".join(SPECIMENS), help="which, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--batch", type=int, default=8, help="examples of a forward pass; models of text get twice that"
    )
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="the smallest models, to see that everything runs")
    parser.add_argument("--json", default=None, help="file for the raw numbers")
    args = parser.parse_args()
    chosen = args.sources.split(",")
    for name in chosen:
        if name not in SPECIMENS:
            raise SystemExit(f"no source {name!r}; known: {', '.join(SPECIMENS)}")
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    size = Size(args.toy, args.batch, args.batches)
    table = Table(
        title=f"{args.rounds} rounds of {args.batches} batches, {args.threads} thread(s), CPU time: median (min, max)"
    )
    for column in ("", "rows/s, bare", "rows/s, read", "read / bare to depth", "read / bare in full",
                   "extract / in full", "extract / to depth", "collate / in full"):  # fmt: skip
        table.add_column(column, justify="left" if not column else "right")
    records = []
    for name in chosen:
        try:
            seconds, wall, rows = measured(name, size, args.rounds)
        except ModuleNotFoundError as error:
            CONSOLE.print(f"{name}: {error.name} is not installed")
            continue
        records.append({"program": "extract", "source": name, "rows": rows, "seconds": seconds, "wall": wall})
        full, depth = seconds["in full"], seconds.get("to depth", seconds["in full"])
        table.add_row(
            name,
            *(f"{rows / statistics.median(of):,.0f}" for of in (depth, seconds["read"])),
            ratio(seconds["read"], depth),
            ratio(seconds["read"], full),
            ratio(seconds["extract"], full),
            ratio(seconds["extract"], depth),
            ratio(seconds["collate"], full),
        )
        CONSOLE.print(f"{name}: read {ratio(seconds['read'], depth)} of the bare forward pass to the same depth")
    CONSOLE.print(table)
    save(args.json, "cpu", args.threads, records)


if __name__ == "__main__":
    main()

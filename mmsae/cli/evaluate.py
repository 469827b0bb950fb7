"""`mmsae evaluate`."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

import mmsae.artifact
from mmsae.analyses import AFA, Analysis, Downstream, FactorRecovery, Fidelity, TopExamples
from mmsae.cli.base import quiet
from mmsae.cli.messages import Parser
from mmsae.cli.run import codes_of, datamodule_of, training_result
from mmsae.files import write_atomic
from mmsae.latents import LatentStore
from mmsae.results import Result


def evaluate(
    run: str,
    sae: str | None = None,
    split: Literal["train", "val", "test"] = "test",
    analyses: list[Analysis] | None = None,
    store: str | None = None,
    codes: str | None = None,
    max_rows: int = 2_000_000,
    threads: int | None = None,
) -> None:
    """Run analyses on a trained dictionary and write their results.

    Args:
        run: Folder of a `mmsae fit` run.
        sae: Another dictionary to measure on the data of that run: a folder or a hub id.
        split: Split whose activations are encoded.
        analyses: What to run; by default Fidelity, AFA, FactorRecovery, Downstream and TopExamples.
        store: Folder of stored activations instead of the run's own.
        codes: Folder of codes by `mmsae encode` instead of encoding again; they stay on disk.
        max_rows: Activation rows whose codes are kept in memory, without `codes`.
        threads: CPU threads of torch; default: its own.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    folder = Path(run)
    data = datamodule_of(folder, store=store)
    core = mmsae.artifact.load(sae or folder)
    core.check(data.spec)
    if codes is None:
        latents = LatentStore.build(core, data.rows(split), max_rows, split)
    else:
        stored = codes_of(Path(codes) / split, mmsae.artifact.identity(sae or folder), data.origin(split))
        latents = LatentStore.open(stored, split)
    kept = []
    questions = analyses or [Fidelity(), AFA(), FactorRecovery(), Downstream(), TopExamples()]
    for result in chain([training_result(folder)], (question.run(core, latents, data) for question in questions)):
        if result is not None:
            result.save(folder / "results")  # at once: an analysis that fails must not take the others along
            kept.append(result)
    numbers = {result.name: result.numbers for result in kept if result.numbers}
    write_atomic(folder / "results.json", json.dumps(numbers, indent=1).encode())
    show(kept)
    print(f"results: {folder / 'results.json'}")
    print(f"next:    mmsae report --run {run}")


def show(results: list[Result]) -> None:
    """Print the tables."""
    console = Console()
    for result in results:
        for table in result.tables:
            drawn = RichTable(
                title=f"{result.name}: {table.title}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
            )
            for i, column in enumerate(table.columns):
                words = all(isinstance(row[i], str) for row in table.rows)
                drawn.add_column(column, justify="left" if words else "right", no_wrap=words)
            for row in table.rows:
                drawn.add_row(*(_cell(value) for value in row))
            console.print(drawn)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def run(args: list[str]) -> None:
    """Parse and run."""
    quiet()
    auto_cli(evaluate, args=args[1:], as_positional=False, parser_class=Parser)

"""Rows encoded per second, against other libraries, each through its public `encode`.

    python benchmarks/encode.py --sizes "512,8192,32,4096"

Untrained TopK dictionaries, as loaded for inference; contenders take turns. mmsae and sparsify give the k values and
indices of each row; the others give dense codes.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import roster
from rounds import CONSOLE, MEMORY_NOTE, Worker, comparison, interleave, n_batches, save
from world import World

WARM_UP = 2


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    roster.add_arguments(parser, "512,8192,32,4096", ("mmsae-fp32", "dense"))
    args = parser.parse_args()
    names = roster.choose(args)
    records: list[dict[str, Any]] = []
    for task in roster.tasks(args):
        steps = args.steps or 4 * roster.default_steps(task)
        task = replace(task, steps=n_batches(args.rounds, steps, WARM_UP))
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.npy"
            World(task.d_in, 4 * task.d_in, task.k).write(data, 8 * task.batch_size)
            workers = [
                Worker(name, partial(roster.encode, name, task, data), args.device, args.threads) for name in names
            ]
            results = roster.with_reference(
                interleave(workers, args.rounds, steps, WARM_UP, f"{len(names)} contenders")
            )
        size = f"encode, d_in {task.d_in}, d_latent {task.d_latent}, k {task.k}, batch {task.batch_size}"
        title = f"{size}\n{args.rounds} rounds of {steps} batches; {args.device}, {args.threads} thread(s)"
        CONSOLE.print(comparison(title, results, roster.REFERENCE, task.batch_size))
        records += [
            {"program": "encode", "contender": name, "task": vars(task), **result.record()}
            for name, result in results.items()
        ]
    CONSOLE.print(MEMORY_NOTE)
    save(args.json, args.device, args.threads, records)


if __name__ == "__main__":
    main()

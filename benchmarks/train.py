"""Time, memory and quality of training against other libraries, each through its own trainer.

    python benchmarks/train.py --sizes "512,8192,32,4096;512,32768,32,1024"
    python benchmarks/train.py --quality

Every contender trains the same dictionary on the same activations, which lie in memory, in a process of its own; they
take turns of a few steps in rounds. Ratios above 1 mean that mmsae is faster. mmsae is the whole path through
Lightning; mmsae-loop the same core in a bare loop; dense a textbook step in plain PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import roster
from contenders import CORES, Task
from rich.table import Table
from rounds import CONSOLE, MEMORY_NOTE, Result, Worker, comparison, interleave, n_batches, ratios, save
from world import World

SPEED, QUALITY = "512,8192,32,4096", "256,2048,16,1024"
WARM_UP = 2


def contest(names: list[str], task: Task, args: argparse.Namespace, steps: int, rounds: int) -> dict[str, Result]:
    """Let them train."""
    task = replace(task, steps=n_batches(rounds, steps, WARM_UP))
    world = World(task.d_in, 4 * task.d_in, task.k)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.npy"
        world.write(data, min(task.steps, args.pool) * task.batch_size)
        judged = world if args.quality else None
        workers = [
            Worker(name, partial(roster.train, name, task, data, judged), task.device, args.threads) for name in names
        ]
        return interleave(workers, rounds, steps, WARM_UP, f"{len(names)} contenders")


def quality_table(title: str, results: dict[str, Result]) -> Table:
    """What was learnt."""
    table = Table(title=title)
    for column in ("", "FVU", "L0", "dead", "recovered", "mean cosine", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in results.items():
        facts = result.facts
        seconds = result.warm_up.wall + sum(turn.wall for turn in result.turns)
        shown = (f"{facts[key]:{form}}" for key, form in
                 (("fvu", ".4f"), ("l0", ".1f"), ("dead", ".1%"), ("recovered", ".1%"), ("cosine", ".3f")))  # fmt: skip
        table.add_row(name, *shown, f"{seconds:.0f}")
    return table


def show(task: Task, results: dict[str, Result], steps: int, rounds: int, threads: int, judged: bool) -> None:
    """Print the tables."""
    size = f"{task.core}, d_in {task.d_in}, d_latent {task.d_latent}, k {task.k}, batch {task.batch_size}"
    where = f"{task.device}, {threads} thread(s), mmsae in {task.precision}"
    CONSOLE.print(
        comparison(f"{size}\n{rounds} rounds of {steps} steps; {where}", results, roster.REFERENCE, task.batch_size)
    )
    if "mmsae-loop" in results:
        cost = statistics.median(ratios(results[roster.REFERENCE], results["mmsae-loop"])) - 1
        CONSOLE.print(f"Lightning costs {cost:+.1%} over the bare loop.")
    if judged:
        n_rows = task.batch_size * n_batches(rounds, steps, WARM_UP)
        CONSOLE.print(quality_table(f"{size}\n{n_rows:,} rows seen; {4 * task.d_in} true features", results))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    roster.add_arguments(parser, "", ("mmsae-fp32", "mmsae-loop", "dense"))
    parser.add_argument("--core", choices=CORES, default="TopK")
    parser.add_argument("--lr", type=float, default=None, help="peak, of all contenders; default 3e-4, quality 1e-3")
    parser.add_argument("--pool", type=int, default=None, help="batches kept in memory; default 16, with --quality 512")
    parser.add_argument("--quality", action="store_true", help="train longer, and measure what was learnt")
    args = parser.parse_args()
    args.sizes = args.sizes or (QUALITY if args.quality else SPEED)
    args.pool = args.pool or (512 if args.quality else 16)
    rate = args.lr or (1e-3 if args.quality else 3e-4)
    names = roster.choose(args, args.core)
    records: list[dict[str, Any]] = []
    for task in roster.tasks(args, core=args.core, learning_rate=rate):
        steps = args.steps or (500 if args.quality else roster.default_steps(task))
        results = roster.with_reference(contest(names, task, args, steps, args.rounds))
        show(task, results, steps, args.rounds, args.threads, args.quality)
        records += [
            {"program": "train", "contender": name, "task": vars(task), **result.record()}
            for name, result in results.items()
        ]
    CONSOLE.print(MEMORY_NOTE)
    save(args.json, args.device, args.threads, records)


if __name__ == "__main__":
    main()

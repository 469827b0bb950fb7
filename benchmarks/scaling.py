"""How the cost of our own training step grows with the size of the dictionary, k, the batch, and the threads.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --latents 4096,8192 --ks "" --batches "" --thread-counts ""

One setting is varied at a time around `--size`; the settings of a sweep take turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import roster
import torch
from contenders import CORES, Task
from rich.table import Table
from rounds import CONSOLE, Result, Worker, interleave, n_batches, ratios, save, spread
from world import World

from mmsae.kernels import fast_precision

WARM_UP = 2
TARGETS = {"d_latent": 2.1, "k": 1.3}
"""What doubling may cost at most."""


def sweep(values: Sequence[int], settings: Sequence[tuple[Task, int]], rounds: int, steps: int) -> list[Result]:
    """The results of some settings, each a task and a number of threads."""
    n = n_batches(rounds, steps, WARM_UP)
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        first = settings[0][0]
        largest = max(task.batch_size for task, _ in settings)
        data = Path(folder) / "rows.npy"
        World(first.d_in, 4 * first.d_in, 32).write(data, 4 * largest)
        for value, (task, threads) in zip(values, settings, strict=True):
            work = partial(roster.train, roster.REFERENCE, replace(task, steps=n), data, None)
            workers.append(Worker(str(value), work, task.device, threads))
        found = interleave(workers, rounds, steps, WARM_UP, f"{len(workers)} settings")
    return [found[str(value)] for value in values if str(value) in found]


def table(name: str, values: Sequence[int], results: Sequence[Result]) -> Table:
    """Time per step, and growth per doubling from one value to the next."""
    target = f" (target: at most {TARGETS[name]})" if name in TARGETS else ""
    made = Table(title=f"{name}: cost of doubling{target}")
    for column in (name, "ms per step", "min", "max", "per doubling", "min", "max", "peak MB"):
        made.add_column(column, justify="right")
    for number, (value, result) in enumerate(zip(values, results, strict=True)):
        growth = ("", "", "")
        if number:
            doublings = math.log2(value / values[number - 1])
            growth = spread([ratio ** (1 / doublings) for ratio in ratios(result, results[number - 1])])
        times = spread([1000 * seconds for seconds in result.seconds], ".1f")
        made.add_row(f"{value}", *times, *growth, f"{max(turn.peak for turn in result.turns) / 1e6:,.0f}")
    if len(results) > 1:
        total = statistics.median(ratios(results[-1], results[0])) ** (1 / math.log2(values[-1] / values[0]))
        made.caption = f"{total:.2f} per doubling over the whole range"
    return made


def numbers(text: str) -> list[int]:
    """Ascending, from the command line."""
    return sorted({int(number) for number in text.split(",") if number})


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512,16384,32,1024", help="d_in,d_latent,k,batch around which one is varied")
    parser.add_argument("--latents", default="4096,8192,16384,32768,65536,131072")
    parser.add_argument("--ks", default="16,32,64,128")
    parser.add_argument("--batches", default="1024,2048,4096,8192,16384")
    parser.add_argument("--thread-counts", default="1,2")
    parser.add_argument("--core", choices=CORES, default="TopK")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="per round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("auto", "32-true", "bf16-mixed"), default="auto")
    parser.add_argument("--json", default=None, help="file for the raw numbers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    precision = fast_precision(args.device) if args.precision == "auto" else args.precision
    d_in, d_latent, k, batch = (int(number) for number in args.size.split(","))
    base = Task(d_in, d_latent, k, batch, core=args.core, device=args.device, precision=precision)
    CONSOLE.print(
        f"{base.core}, d_in {d_in}, {args.device}, {precision}; around d_latent {d_latent}, k {k}, batch {batch}"
    )
    sweeps = {
        "d_latent": [(n, (replace(base, d_latent=n), args.threads)) for n in numbers(args.latents)],
        "k": [(n, (replace(base, k=n), args.threads)) for n in numbers(args.ks)],
        "batch": [(n, (replace(base, batch_size=n), args.threads)) for n in numbers(args.batches)],
        "threads": [(n, (base, n)) for n in numbers(args.thread_counts)],
    }
    records: list[dict[str, Any]] = []
    for name, settings in sweeps.items():
        if not settings:
            continue
        values = [value for value, _ in settings]
        results = sweep(values, [setting for _, setting in settings], args.rounds, args.steps)
        if len(results) < len(values):
            raise SystemExit(f"The sweep over {name} is not complete.")
        CONSOLE.print(table(name, values, results))
        records += [
            {"program": "scaling", "varied": name, "value": value, "task": vars(task), **result.record()}
            for value, (task, _), result in zip(values, [setting for _, setting in settings], results, strict=True)
        ]
    save(args.json, args.device, args.threads, records)


if __name__ == "__main__":
    main()

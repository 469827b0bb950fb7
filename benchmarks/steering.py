"""What steering costs: time of drawing with an intervention over that without, in turns.

    python benchmarks/steering.py
    python benchmarks/steering.py --model /path/to/stable-diffusion-v1-5 --hook_point unet.up_blocks.1.attentions.1 \
        --d_latent 20480 --k 32 --steps 20

The dictionary has random weights: its cost depends on its size alone. All contenders draw the same pictures in one
process; each round begins with another one, and ratios are taken within a round.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from mmsae.cores import TopK
from mmsae.sources import Diffusion
from mmsae.steering import Add, Box, Clamp, Conditional, Intervention, Scale, draw
from mmsae.steering.drawing import items_of


def main(
    model: str = "miniature:diffusion",
    hook_point: str = "unet.up_blocks.0.attentions.1",
    prompts: list[str | int] = ["a red seven at the left", "a blue two at the top"],  # noqa: B006, it is read only
    d_latent: int = 512,
    k: int = 16,
    steps: int = 10,
    pictures: int = 8,
    rounds: int = 7,
    threads: int = 1,
    out: str | None = None,
) -> None:
    """Measure.

    Args:
        model: Pipeline.
        hook_point: Where it is steered.
        prompts: What is drawn, over and over.
        d_latent: Latents of the dictionary.
        k: Active ones.
        steps: Of the sampler.
        pictures: Drawn at a time.
        rounds: After one to warm up.
        threads: CPU threads of torch.
        out: File for raw numbers.
    """
    torch.set_num_threads(threads)
    source = Diffusion(model, [hook_point], steps=steps)
    core = TopK(source.spec.d_in, d_latent, k=k).to(source.placed).eval().requires_grad_(False)
    items = items_of([prompts[i % len(prompts)] for i in range(pictures)])
    contenders: dict[str, list[Intervention]] = {
        "without": [],
        "Add, everywhere": [Intervention(core, hook_point, [Add([1, 2], 1e-3)])],
        "Add, a box, conditional half": [
            Intervention(core, hook_point, [Add([1, 2], 1e-3)], Box(0, 0, 0.5, 1) & Conditional())
        ],
        "Clamp and Scale (encodes)": [Intervention(core, hook_point, [Clamp(1, 1e-3, active=True), Scale(2, 1.001)])],
    }

    def timed(interventions: list[Intervention]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        draw(source, items, list(range(pictures)), interventions, pictures)
        if source.placed.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = timed(contenders[name])
            if number:
                found[name].append(taken)
    table = Table(title=f"{model}, {hook_point}, {d_latent} latents: {pictures} pictures, {rounds} rounds")
    for column in ("", "time / without", "min", "max", "CPU time / without", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for name, turns in found.items():
        walls, cpus = (ratio(turns, found["without"], kind) for kind in (0, 1))
        shown = (statistics.median(walls), min(walls), max(walls), statistics.median(cpus))
        table.add_row(name, *(f"{v:.3f}" for v in shown), f"{statistics.median(t[0] for t in turns):.2f}")
    Console(width=120).print(table)
    if out:
        Path(out).write_text(json.dumps(found))


def ratio(turns: list[tuple[float, float]], reference: list[tuple[float, float]], kind: int) -> list[float]:
    """Time over that of the reference in the same round."""
    pick: Callable[[tuple[float, float]], float] = lambda turn: turn[kind]  # noqa: E731
    return [pick(a) / pick(b) for a, b in zip(turns, reference, strict=True)]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

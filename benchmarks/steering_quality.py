"""How well colours are steered on the miniature diffusion model: success against what else changes.

    python benchmarks/steering_quality.py --what colours --seeds 0 1 2
    python benchmarks/steering_quality.py --what masks --run runs/scene_diffusion_up

Latents are chosen on prompts of the validation split with noise of its own; figures are of test prompts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli

sys.path.append(str(Path(__file__).parent.parent / "recipes"))

from diffusion_stage import Opened, open_run, place
from steer_diffusion import concept_rows

from mmsae.cli.evaluate import show
from mmsae.results import Result, Table
from mmsae.steering import Add, Intervention, PictureJudge, Stage, by_effect, candidates_for, draw
from mmsae.steering.picture_judge import wilson


def chosen_latents(opened: Opened, judge: PictureJudge, colour: int, n: int, candidates: int, seed: int) -> list[int]:
    """Latents of a colour by their effect on validation prompts of other colours."""
    text = judge.prompts["colour"][colour]
    latents, positive = concept_rows(opened, text)
    tried = candidates_for(latents, positive, opened.scale, candidates)
    others = [item for item in opened.items if item["labels"]["colour"] != colour][:4]
    stage = Stage(opened.source, opened.core, opened.hook_point, opened.scale, others, [seed], place(opened))
    return [e.latents[0] for e in by_effect(stage, judge, tried, text, "a digit", 2.0)][:n]


def colours(
    opened: Opened, judge: PictureJudge, strengths: list[float], seeds: list[int], n: int, latents: int
) -> list[Result]:
    """Every colour, on test prompts of other colours."""
    from mmsae.cli.run import datamodule_of

    data = datamodule_of(Path("runs/scene_diffusion_text"))
    test = [dict(data.items("test")[i]) for i in range(len(data.items("test")))]  # type: ignore[arg-type]
    names = opened.factors["colour"]
    by_hand = [chosen_latents(opened, judge, c, latents, 8, 1010) for c in range(len(names))]
    found: dict[float, list[np.ndarray]] = {s: [] for s in strengths}
    each: dict[tuple[int, float], list[float]] = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for c in range(len(names)):
            own = [test[i] for i in rng.permutation(len(test)) if test[i]["labels"]["colour"] != c][:n]
            noise = [100_000 * seed + 1000 * c + i for i in range(n)]
            truth = {f: np.array([item["labels"][f] for item in own]) for f in opened.factors}
            plain = judge.factors(draw(opened.source, own, noise))
            for s in strengths:
                edit = Intervention(
                    opened.core, opened.hook_point, [Add(by_hand[c], s)], place(opened), scale=opened.scale
                )
                seen = judge.factors(draw(opened.source, own, noise, [edit]))
                rows = np.stack(
                    [
                        seen["colour"] == c, seen["digit"] == plain["digit"], seen["digit"] == truth["digit"],
                        plain["digit"] == truth["digit"], seen["position"] == truth["position"],
                    ],
                    1,
                )  # fmt: skip
                found[s].append(rows)
                each.setdefault((c, s), []).append(float((seen["colour"] == c).mean()))
            print(f"seed {seed}, {names[c]}", flush=True)
    rows: list[list[Any]] = []
    for s in strengths:
        every = np.concatenate(found[s])
        low, high = wilson(int(every[:, 0].sum()), len(every))
        rows.append([s, float(every[:, 0].mean()), f"{low:.2f} to {high:.2f}", *every[:, 1:].mean(0).tolist()])
    columns = [
        "strength", "is of the colour ↑", "95 %", "digit as without ↑", "digit of the prompt ↑", "digit without edit",
        "position ↑",
    ]  # fmt: skip
    first = Table(f"{len(names)} colours, {n} pictures each, seeds {seeds}", columns, rows)
    per = [
        [names[c], ", ".join(map(str, by_hand[c])), *(float(np.mean(each[c, s])) for s in strengths)]
        for c in range(len(names))
    ]
    second = Table("of the colour, by colour", ["", "latents", *(f"strength {s:g}" for s in strengths)], per)
    return [Result("Colours", "steering every colour", tables=[first, second])]


def masks(
    opened: Opened, judge: PictureJudge, strengths: list[float], seeds: list[int], n: int, latents: int
) -> list[Result]:
    """Pixel change outside of a half of the picture by that inside."""
    prompts = opened.items[:n]
    by_hand = chosen_latents(opened, judge, 5, latents, 8, 1010)
    rows: list[list[Any]] = []
    for name, box in {"left half": (0, 0, 1, 0.5), "top half": (0, 0, 0.5, 1)}.items():
        for s in strengths:
            shares, inner = [], []
            for seed in seeds:
                noise = [1000 * seed + i for i in range(n)]
                plain = draw(opened.source, prompts, noise)
                edit = Intervention(
                    opened.core, opened.hook_point, [Add(by_hand, s)], place(opened, box=box), scale=opened.scale
                )
                change = (draw(opened.source, prompts, noise, [edit]) - plain).abs().mean((0, 1))
                H, W = change.shape
                inside = torch.zeros(H, W, dtype=torch.bool)
                inside[: round(box[2] * H), : round(box[3] * W)] = True
                inner.append(float(change[inside].mean()))
                shares.append(float(change[~inside].mean()) / max(inner[-1], 1e-9))
            rows.append([name, s, float(np.mean(inner)), float(np.mean(shares)), min(shares), max(shares)])
    table = Table(
        f"{n} prompts, seeds {seeds}", ["mask", "strength", "inside", "outside / inside ↓", "min", "max"], rows
    )
    return [Result("Masks", "pixel change outside of a mask", tables=[table])]


def main(
    what: Literal["colours", "masks"] = "colours",
    run: str | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    strengths: list[float] = [1.0, 2.0, 3.0],  # noqa: B006
    n: int = 6,
    n_latents: int = 2,
    steps: int | None = None,
    out: str | None = None,
    threads: int | None = None,
) -> None:
    """Measure steering on the miniature.

    Args:
        what: "colours" or "masks".
        run: Of `mmsae fit`; default: the words of the miniature's text encoder.
        seeds: Of noise and prompts.
        strengths: In units of the 99th percentile.
        n: Pictures for each colour and seed, or prompts for each mask.
        n_latents: Added together.
        steps: Of the sampler.
        out: File for the figures.
        threads: CPU threads of torch.
    """
    if threads:
        torch.set_num_threads(threads)
    opened = open_run(run, None, None, None, [], steps=steps)
    judge = PictureJudge.load()
    results = (colours if what == "colours" else masks)(opened, judge, strengths, seeds, n, n_latents)
    show(results)
    if out:
        Path(out).write_text(json.dumps([[t.__dict__ for t in r.tables] for r in results], indent=1))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

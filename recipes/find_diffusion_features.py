"""Find out what latents do to the pictures of a diffusion model, without being asked for anything.

    python recipes/find_diffusion_features.py --page runs/find_diffusion_features/index.html
    python recipes/find_diffusion_features.py --run runs/sdxl --judge ViT-B-32:laion2b_s34b_b79k --words words.txt \
        --template "a photo of {}" --prompts "a photo of a dog" "a photo of a house" --band 1e-4 1e-2

Each candidate is added to some prompts, drawn with some seeds. Kept are those that change all pictures in one direction
of a CLIP's space, more than 95 % of random directions of the same length do; the nearest word names them. Without --run
it works on the words of the miniature's text encoder, whose dictionary it trains the first time (a minute).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusion_stage import open_run, place
from jsonargparse import auto_cli
from tqdm import tqdm

from mmsae.cli.evaluate import show
from mmsae.errors import MmsaeError
from mmsae.files import write_atomic
from mmsae.report.page import write_report
from mmsae.results import Plot, Result, Table
from mmsae.steering import Add, Effect, PictureJudge, Stage, discover, in_band
from mmsae.steering.drawing import items_of
from mmsae.steering.sheet import inline, sheet


def find_diffusion_features(
    run: str | None = None,
    sae: str | None = None,
    model: str | None = None,
    hook_point: str | None = None,
    prompts: list[str | int] | None = None,
    seeds: list[int] = [0, 1],  # noqa: B006, it is read only
    n_prompts: int = 4,
    n_candidates: int = 40,
    band: list[float] = [1e-3, 0.3],  # noqa: B006
    strength: float = 2.0,
    n_random: int = 20,
    words: str | None = None,
    template: str = "{}",
    neutral: str | None = None,
    judge: str = "miniature:clip",
    timesteps: list[float] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    n_shown: int = 12,
    out: str = "runs/find_diffusion_features",
    page: str | None = None,
    threads: int | None = None,
) -> None:
    """Rank latents by how consistently they change pictures, and name what they do.

    Args:
        run: Folder of a `mmsae fit` run on a diffusion model.
        sae: A dictionary, folder or hub id, instead of the run's or with --model.
        model: Pipeline, folder or hub id.
        hook_point: Instead of the one that the dictionary was trained on.
        prompts: What is drawn; default: some of the run's.
        seeds: Each prompt is drawn with each of them.
        n_prompts: How many of the run's.
        n_candidates: Latents that are tried, those with the sharpest activations first.
        band: Lowest and highest share of rows in which a candidate fires. 1e-4 to 1e-2 is usual for large dictionaries.
        strength: In units of each latent's 99th percentile.
        n_random: Random directions of the same lengths.
        words: File with a word or phrase in each line; default: the texts that the judge knows.
        template: How a word becomes a text for the judge.
        neutral: What the pictures show anyway; default: the first prompt.
        judge: CLIP that measures and names.
        timesteps: Lowest and highest timestep at which latents are added.
        steps: Of the sampler.
        guidance_scale: Of the sampler.
        size: Of the pictures.
        batch_size: Pictures drawn at a time.
        seed: Of the random directions.
        n_shown: Latents on the sheet.
        out: Folder for the table (features.json) and the sheet.
        page: Also write a page.
        threads: CPU threads of torch.
    """
    if threads:
        torch.set_num_threads(threads)
    if len(band) != 2 or not 0 <= band[0] < band[1] <= 1:
        raise MmsaeError(f"--band takes the lowest and the highest share, not {band}.")
    opened = open_run(run, sae, model, hook_point, prompts or [], steps=steps, guidance_scale=guidance_scale, size=size)
    clip = PictureJudge.load(judge)
    vocabulary = vocabulary_of(clip, words)
    items = items_of(prompts) if prompts else opened.items[:n_prompts]
    stage = Stage(
        opened.source, opened.core, opened.hook_point, opened.scale, items, seeds,
        place(opened, timesteps=timesteps), batch_size,
    )  # fmt: skip
    candidates = in_band(opened.latents, *band, n=n_candidates).tolist()
    plain = neutral or str(items[0].get("text", ""))
    with tqdm(total=len(candidates) + n_random, desc="drawing") as bar:
        found = discover(
            stage, clip, candidates, vocabulary, plain, template, strength, n_random, seed=seed,
            progress=lambda done, total: bar.update(),
        )  # fmt: skip
    kept = found.found
    table = Table(
        f"consistency above {found.threshold:.2f}, the 95th percentile of {n_random} random directions",
        ["latent", "does", "cosine", "or", "consistency ↑", "size of the change", "fires in", "found"],
        [line(effect, opened.latents.density, found.threshold) for effect in found.effects],
    )
    title = f"{len(kept)} of {len(candidates)} latents change pictures consistently"
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    record = [
        {
            "latent": e.latents[0],
            "consistency": e.consistency,
            "size": e.size,
            "words": e.description,
            "found": e in kept,
        }
        for e in found.effects
    ]
    write_atomic(
        folder / "features.json", json.dumps({"threshold": found.threshold, "features": record}, indent=1).encode()
    )
    shown = found.effects[:n_shown]
    columns = [stage.pictures(), *(stage.pictures(Add(list(e.latents), strength)) for e in shown)]
    headings = ["no edit", *(f"{e.latents[0]}: {e.description[0][0]}" for e in shown)]
    names = [f"{item.get('text', '')}, seed {s}" for item in items for s in seeds]
    few = range(0, len(names), max(len(names) // 4, 1))
    grid = sheet([[column[i] for column in columns] for i in few], headings, [names[i] for i in few], title)
    grid.save(folder / "grid.png")
    spread = Plot(
        f"{title}; of random directions {sum(e.consistency > found.threshold for e in found.control)}",
        "size of the change (1 − cosine)",
        "consistency",
        [cloud("latents", found.effects), cloud("random directions", found.control)],
        kind="points",
    )
    result = Result(
        "Discovery", title, tables=[table], plots=[spread], pictures=[inline(grid, "the most consistent", title)]
    )
    result.numbers = {"found": len(kept), "candidates": len(candidates), "threshold": found.threshold}
    result.save(folder)
    show([result])
    print(f"features: {folder / 'features.json'}\npictures: {folder / 'grid.png'}")
    if page is not None:
        write_report(
            [result], Path(page), "What latents do", {"model": opened.source.name, "hook point": opened.hook_point}
        )
        print(f"page: {page}")


def vocabulary_of(judge: PictureJudge, words: str | None) -> list[str]:
    """Words of a file, or the texts that the judge classifies with."""
    if words is None:
        known = [text for texts in judge.prompts.values() for text in texts]
        if not known:
            raise MmsaeError("give --words, a file with a word in each line: this judge knows none of its own.")
        return known
    try:
        found = [entry.strip() for entry in Path(words).read_text(encoding="utf-8").splitlines() if entry.strip()]
    except OSError as error:
        raise MmsaeError(f"{words} cannot be read ({error}).") from error
    if len(found) < 2:
        raise MmsaeError(f"{words} has {len(found)} words; a description needs a choice.")
    return found


def line(effect: Effect, density: np.ndarray, threshold: float) -> list[Any]:
    """A row of the table."""
    first, second = effect.description[0], effect.description[1]
    latent = effect.latents[0]
    above = "yes" if effect.consistency > threshold else "no"
    return [latent, *first, second[0], effect.consistency, effect.size, float(density[latent]), above]


def cloud(label: str, effects: list[Effect]) -> dict[str, Any]:
    """Points of the plot."""
    return {"label": label, "x": [e.size for e in effects], "y": [e.consistency for e in effects]}


if __name__ == "__main__":
    try:
        auto_cli(find_diffusion_features, as_positional=False)
    except MmsaeError as error:
        raise SystemExit(f"error: {error}") from None

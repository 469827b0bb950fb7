"""Remove a concept from a diffusion model with latents of a dictionary (SAeUron), and measure what is lost with it.

    python recipes/unlearn_concept.py --factor colour --concepts red
    python recipes/unlearn_concept.py --factor digit --concepts seven --page runs/unlearn/index.html
    python recipes/unlearn_concept.py --run runs/scene_diffusion_up --concepts red blue

Percentile and gamma are chosen on prompts of the validation split, figures are of the test split. Without --run it
works on the words of the miniature's text encoder, whose dictionary it trains the first time (a minute).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusion_stage import open_run, place
from jsonargparse import auto_cli
from torch import Tensor

from mmsae.cli.evaluate import show
from mmsae.cli.run import datamodule_of
from mmsae.errors import MmsaeError
from mmsae.report.page import write_report
from mmsae.results import Result, Table
from mmsae.sources.diffusion import Diffusion
from mmsae.spec import ACTS
from mmsae.steering import (
    Ablate,
    ConceptMeans,
    Edit,
    Intervention,
    PictureJudge,
    Project,
    Unlearn,
    difference_in_means,
    draw,
    matched_random,
)
from mmsae.steering.drawing import Item
from mmsae.steering.sheet import inline, sheet


class Measured(NamedTuple):
    """Of some pictures.

    Attributes:
        removed: Accuracy on prompts of the removed concepts (UA is 1 less this).
        retained: Accuracy of the same factor on the other prompts (IRA).
        crossed: Accuracy of the other factors, on all prompts (CRA).
    """

    removed: float
    retained: float
    crossed: float


def unlearn_concept(
    factor: str = "colour",
    concepts: list[str] = ["red"],  # noqa: B006, it is read only
    run: str | None = None,
    sae: str | None = None,
    model: str | None = None,
    percentiles: list[float] = [97.0, 99.0],  # noqa: B006
    gammas: list[float] = [-0.3, -1.0, -3.0],  # noqa: B006
    relative: bool = False,
    n_choose: int = 8,
    n_removed: int = 24,
    n_retained: int = 48,
    seed: int = 0,
    judge: str = "miniature:clip",
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 16,
    out: str = "runs/unlearn_concept",
    page: str | None = None,
    threads: int | None = None,
) -> None:
    """Remove concepts, one after another if they are several, and compare with what is simpler.

    Args:
        factor: Label of the run's prompts that the concepts are values of.
        concepts: Values to remove; they are removed together, each by its own latents.
        run: Folder of a `mmsae fit` run on a diffusion model with labelled prompts.
        sae: Another dictionary for its hook point.
        model: Another pipeline of its kind.
        percentiles: Of the scores, above which latents are taken; tried out.
        gammas: Factors, tried out: a code becomes gamma times its mean for the concept times itself.
        relative: A code becomes gamma times itself.
        n_choose: Pictures with and without the concept for each pair of percentile and gamma.
        n_removed: Pictures of the concepts to measure on.
        n_retained: Pictures without them.
        seed: Of the noise and of the choice of prompts.
        judge: CLIP that classifies; it needs a prompt for each value of the run's labels.
        steps: Of the sampler.
        guidance_scale: Of the sampler.
        batch_size: Pictures drawn at a time.
        out: Folder for pictures and figures.
        page: Also write a page.
        threads: CPU threads of torch.
    """
    if threads:
        torch.set_num_threads(threads)
    opened = open_run(run, sae, model, None, [], steps=steps, guidance_scale=guidance_scale)
    names = opened.factors.get(factor)
    if names is None:
        raise MmsaeError(f"the run's prompts have no label {factor!r}, only {', '.join(opened.factors) or 'none'}.")
    if wrong := [c for c in concepts if c not in names]:
        raise MmsaeError(f"{factor} has no value {wrong[0]!r}; choose among {', '.join(names)}.")
    source, core, point = opened.source, opened.core, opened.hook_point
    clip = PictureJudge.load(judge)
    if missing := [name for name in opened.factors if name not in clip.prompts]:
        raise MmsaeError(f"the judge {judge} has no prompts for {', '.join(missing)}.")
    data = datamodule_of(Path(run or "runs/scene_diffusion_text"))
    batches = list(data.rows("val"))
    means = ConceptMeans.measure(core, batches, factor, names)
    removed = [names.index(c) for c in concepts]
    where = place(opened, tail=True)  # the end of a prompt has read the concept as well

    def prompts(split: Any, n_with: int, n_without: int) -> list[Item]:
        every = [dict(data.items(split)[i]) for i in range(len(data.items(split)))]  # type: ignore[arg-type]
        order = np.random.default_rng(seed).permutation(len(every))
        shuffled = [every[i] for i in order]
        own = [item for item in shuffled if item["labels"][factor] in removed]
        others = [item for item in shuffled if item["labels"][factor] not in removed]
        if not own or not others:
            raise MmsaeError(f"the {split} split has no prompts with {', '.join(concepts)}, or none without.")
        repeated = [own[i % len(own)] for i in range(n_with)] + [others[i % len(others)] for i in range(n_without)]
        return [{**item, "sample_id": i} for i, item in enumerate(repeated)]

    def pictures(items: Sequence[Item], edits: Sequence[Edit]) -> Tensor:
        seeds = [1000 * (seed + 1) + i for i in range(len(items))]
        own = Intervention(core, point, list(edits), where)
        return draw(source, items, seeds, [own] if edits else [], batch_size)

    def measured(items: Sequence[Item], drawn: Tensor) -> Measured:
        seen = clip.factors(drawn)
        truth = {name: np.array([item["labels"][name] for item in items]) for name in opened.factors}
        own = np.isin(truth[factor], removed)
        right = seen[factor] == truth[factor]
        # with the concept gone, any removed value is a failure
        still = np.isin(seen[factor], removed)[own].mean()
        crossed = np.mean([(seen[name] == truth[name]).mean() for name in opened.factors if name != factor])
        return Measured(float(still), float(right[~own].mean()), float(crossed))

    few = prompts("val", n_choose, n_choose)
    trials: list[list[Any]] = []
    for percentile in percentiles:
        for gamma in gammas:
            edit = Unlearn(means, concepts, percentile, gamma, relative)
            found = measured(few, pictures(few, [] if edit.empty else [edit]))
            score = (1 - found.removed + found.retained) / 2
            trials.append(
                [percentile, gamma, max(edit.n_selected), 1 - found.removed, found.retained, found.crossed, score]
            )
            print(f"percentile {percentile:g}, gamma {gamma:g}: UA {1 - found.removed:.2f}, IRA {found.retained:.2f}")
    best = max(trials, key=lambda row: (row[-1], row[5]))
    chosen = Unlearn(means, concepts, best[0], best[1], relative)
    print(f"chosen: percentile {best[0]:g}, gamma {best[1]:g}, latents {chosen.latents.tolist()}")
    items = prompts("test", n_removed, n_retained)
    drawn = {"no edit": pictures(items, [])}
    drawn["SAeUron"] = pictures(items, [chosen])
    for name, edits in baselines(opened, chosen, batches, factor, removed, seed).items():
        drawn[name] = pictures(items, edits)
    if takes_negative(source):
        away = [{**item, "negative_prompt": f"{' '.join(concepts)}"} for item in items]
        drawn["negative prompt"] = pictures(away, [])
    plain = measured(items, drawn["no edit"])
    rows: list[list[Any]] = []
    for name, shown in drawn.items():
        m = measured(items, shown)
        kept = (m.retained / max(plain.retained, 1e-9), m.crossed / max(plain.crossed, 1e-9))
        rows.append([name, 1 - m.removed, m.retained, m.crossed, kept[0], kept[1]])
    table = Table(
        f"{n_removed} pictures with {', '.join(concepts)}, {n_retained} without",
        ["", "UA ↑", "IRA ↑", "CRA ↑", "IRA kept ↑", "CRA kept ↑"],
        rows,
    )
    tried = Table(
        "on validation prompts",
        ["percentile", "gamma", "latents", "UA ↑", "IRA ↑", "CRA ↑", "(UA + IRA) / 2 ↑"],
        trials,
    )
    title = f"without {' and '.join(concepts)}"
    shown_rows = [*range(min(4, n_removed)), *range(n_removed, n_removed + min(4, n_retained))]
    kinds = list(drawn)
    grid = sheet(
        [[drawn[kind][i] for kind in kinds] for i in shown_rows],
        kinds,
        [str(items[i]["text"]) for i in shown_rows],
        title,
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / "grid.png")
    result = Result("Unlearning", title, tables=[table, tried], pictures=[inline(grid, "", title)])
    result.numbers = {"ua": rows[1][1], "ira": rows[1][2], "cra": rows[1][3]}
    result.save(folder)
    show([result])
    print(f"pictures: {folder / 'grid.png'}")
    if page is not None:
        write_report([result], Path(page), f"A model {title}", {"model": source.name, "hook point": point})
        print(f"page: {page}")


def baselines(
    opened: Any, chosen: Unlearn, batches: Sequence[dict[str, Any]], factor: str, removed: Sequence[int], seed: int
) -> dict[str, list[Edit]]:
    """What SAeUron has to beat: ablation, other latents, a direction that needs no dictionary."""
    rows = opened.core.dictionary.detach()
    others = matched_random(opened.latents, chosen.latents, rows, seed=seed)[:, 0].unique()
    x = torch.cat([batch[ACTS][opened.core.spec.input] for batch in batches]).float()
    label = torch.cat([batch[f"label.{factor}"] for batch in batches])
    direction = difference_in_means(x, torch.isin(label, torch.tensor(list(removed))))
    return {
        "ablation": [Ablate(chosen.latents)],
        "ablation of random latents": [Ablate(others)],
        "projection of the means": [Project(direction)],
    }


def takes_negative(source: Diffusion) -> bool:
    """Whether the pipeline has negative prompts."""
    return source._takes("negative_prompt") and not source._takes("class_labels")


if __name__ == "__main__":
    try:
        auto_cli(unlearn_concept, as_positional=False)
    except MmsaeError as error:
        raise SystemExit(f"error: {error}") from None

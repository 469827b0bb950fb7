"""Steer a diffusion model with latents of a dictionary: one command, a grid of pictures, and a page.

    python recipes/steer_diffusion.py --text "a blue digit" --page runs/steer_diffusion/index.html
    python recipes/steer_diffusion.py --latents 188 161 --strengths 0 1 2 4 --prompts "a red seven at the left"
    python recipes/steer_diffusion.py --prompts "a red two at the top" --transplant "a green two at the top"
    python recipes/steer_diffusion.py --run runs/sdxl_down_2_1 --latents 4977 --box 0.2 0.2 0.8 0.8 --half opposed

Without --run or --sae it steers the miniature, offline; the first time it trains a dictionary (a minute).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusion_stage import Opened, area, open_run, place
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor

from mmsae.errors import MmsaeError
from mmsae.latents import LatentStore
from mmsae.metrics.pictures import lpips
from mmsae.report.page import write_report
from mmsae.results import Plot, Result, Table
from mmsae.steering import (
    Ablate,
    Add,
    Clamp,
    Edit,
    Intervention,
    PictureJudge,
    Reconstruct,
    Replace,
    Scale,
    Stage,
    Transplant,
    by_effect,
    candidates_for,
    draw,
    trace,
)
from mmsae.steering.drawing import Item, items_of, over
from mmsae.steering.sheet import inline, sheet

Kind = Literal["add", "clamp", "scale", "ablate", "replace", "reconstruct", "skip_block"]
PROMPTS = ["a red seven at the left", "a green two at the top right"]


def steer_diffusion(
    run: str | None = None,
    sae: str | None = None,
    model: str | None = None,
    hook_point: str | None = None,
    prompts: list[str | int] = PROMPTS,
    latents: list[int] | None = None,
    text: str | None = None,
    like: str | None = None,
    transplant: str | None = None,
    n_latents: int = 2,
    candidates: int = 8,
    strengths: list[float] = [0.0, 1.0, 2.0, 3.0],  # noqa: B006
    seeds: list[int] = [0, 1],  # noqa: B006
    edit: Kind = "add",
    half: Literal["both", "conditional", "opposed"] = "both",
    timesteps: list[float] | None = None,
    box: list[float] | None = None,
    mask: str | None = None,
    keep_outside: bool = True,
    judge: str = "miniature:clip",
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    batch_size: int = 16,
    side: int = 96,
    out: str = "runs/steer_diffusion/grid.png",
    page: str | None = None,
    threads: int | None = None,
) -> None:
    """Draw prompts with some latents at several strengths, side by side.

    Args:
        run: Folder of a `mmsae fit` run on a diffusion model.
        sae: A dictionary, folder or hub id, instead of the run's or with --model.
        model: Pipeline, folder or hub id: SD 1.x, SDXL (Turbo), DiT, PixArt, SD3, Flux; default: the run's.
        hook_point: Instead of the one that the dictionary was trained on.
        prompts: What to draw; for a DiT numbers of classes.
        latents: Their numbers.
        text: Choose latents by what they do: of those that fire more for prompts like this text, the ones that move
            the pictures most towards it.
        like: Choose latents by a picture: those that fire for it and for few others.
        transplant: Choose no latents, but put features of this prompt in place of those of the prompts.
        n_latents: How many to choose; they are added together. Of a transplant, switched on and off.
        candidates: Latents whose effect is tried out.
        strengths: Columns, in units of each latent's 99th percentile; of "scale" factors, of a transplant its share.
        seeds: Each prompt is drawn with each of them.
        edit: "add" to the code, "clamp" it, "scale" it, "ablate" it, "replace" the update of the block by it, let it
            write what the dictionary "reconstruct"s, or "skip_block".
        half: Half of guidance; "opposed" pushes the other one to the other side.
        timesteps: Lowest and highest timestep at which the edit acts.
        box: Top, left, bottom, right in shares of the picture where it acts.
        mask: A picture instead, white where it acts.
        keep_outside: Outside of box or mask, predict what the model without the edit does; each column is drawn twice.
            Without this, the rest of the picture changes, too.
        judge: CLIP that measures: miniature:clip, MODEL:TAG of open_clip, or a folder or hub id of transformers.
        steps: Of the sampler.
        guidance_scale: Of the sampler.
        size: Of the pictures.
        dtype: Of the weights.
        batch_size: Pictures drawn at a time.
        side: Pixels of a picture in the grid.
        out: The grid.
        page: Also write a page with the grid and figures.
        threads: CPU threads of torch.
    """
    if threads:
        torch.set_num_threads(threads)
    asked = [name for name, value in (("latents", latents), ("text", text), ("like", like)) if value is not None]
    free = transplant is not None or edit in ("reconstruct", "skip_block")
    if len(asked) != 1 and not (free and not asked):
        raise MmsaeError("choose latents in one way: --latents, --text or --like (or --transplant a prompt).")
    opened = open_run(
        run, sae, model, hook_point, prompts, steps=steps, guidance_scale=guidance_scale, size=size, dtype=dtype
    )
    where = place(opened, half, timesteps, box, mask)
    inside = area(box, mask) if keep_outside else None
    if opened.source.encoder and (box or mask) and not keep_outside:
        raise MmsaeError("words have no places: --box and --mask need keep_outside with this dictionary.")
    items, drawn_seeds = over(items_of(prompts), seeds)
    clip = PictureJudge.load(judge)
    trials: Table | None = None
    if transplant is not None:
        chosen: list[int] = []
    elif latents is not None or free:
        chosen = latents or []
    else:
        stage = Stage(opened.source, opened.core, opened.hook_point, opened.scale, items_of(prompts), seeds[:2], where)
        chosen, trials = choose(opened, stage, clip, text, like, n_latents, candidates)
        print(f"latents {', '.join(map(str, chosen))}")
    makes = edits_of(edit, chosen)
    if transplant is not None:
        makes = transplanted(opened, items, drawn_seeds, transplant, n_latents, area(box, mask))
    columns = []
    for strength in strengths:
        own = Intervention(opened.core, opened.hook_point, makes(strength), where, edit != "reconstruct", opened.scale)
        columns.append(draw(opened.source, items, drawn_seeds, [own] if makes(strength) else [], batch_size, inside))
    reference = draw(opened.source, items, drawn_seeds, (), batch_size)
    headings = [f"{'×' if edit == 'scale' else ''}{strength:g}" for strength in strengths]
    rows = [f"{item['text']}, seed {seed}" for item, seed in zip(items, drawn_seeds, strict=True)]
    what = text or transplant or like or edit
    title = f"{what}: latents {', '.join(map(str, chosen))}" if chosen else f"{what}"
    grid = sheet([[column[i] for column in columns] for i in range(len(items))], headings, rows, title, side)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    grid.save(out)
    table = figures(clip, reference, columns, headings, items, text or transplant)
    print_table(table)
    print(f"grid: {out}")
    if page is not None:
        results = [
            Result("Steering", title, pictures=[inline(grid, "strength from left to right", title)], tables=[table])
        ]
        results[0].plots = [curves(table)] if len(strengths) > 2 else []
        if trials is not None:
            results.append(Result("Choice", "latents by what they do to the pictures", tables=[trials]))
        facts = {"model": opened.source.name, "hook point": opened.hook_point, "half": half}
        write_report(results, Path(page), f"Steering towards {what}" if what != edit else f"Edit: {edit}", facts)
        print(f"page: {page}")


def edits_of(kind: Kind, latents: Sequence[int]) -> Any:
    """From a strength to the edits of a column."""

    def make(strength: float) -> list[Edit]:
        if kind == "add":
            return [Add(latents, strength)]
        if kind == "clamp":
            return [Clamp(latents, strength)]
        if kind == "scale":
            return [Scale(latents, strength)]
        if kind == "ablate":
            return [Ablate(latents)] if strength else []
        if kind == "replace":
            return [Replace(), Add(latents, strength)]
        return ([Reconstruct()] if kind == "reconstruct" else [Replace()]) if strength else []

    return make


def transplanted(
    opened: Opened, items: list[Item], seeds: list[int], prompt: str, n: int, inside: Tensor | None
) -> Any:
    """From a strength to the transplant of a prompt's features into all items."""
    if opened.source.encoder:
        raise MmsaeError("a transplant needs a dictionary of the unet or the transformer: words have no steps.")
    theirs = [{**item, "text": prompt} for item in items]
    edit = trace(opened.source, opened.core, opened.hook_point, theirs, seeds)
    source = trace(opened.source, opened.core, opened.hook_point, items, seeds)
    return lambda strength: [Transplant(edit, source, n, inside, inside, strength)] if strength else []


def choose(
    opened: Opened, stage: Stage, judge: PictureJudge, text: str | None, like: str | None, n: int, candidates: int
) -> tuple[list[int], Table | None]:
    """Latents by a text or a picture, and the table of what was tried."""
    if like is not None:
        return like_picture(opened, like, n), None
    assert text is not None
    latents, positive = concept_rows(opened, text)
    tried = candidates_for(latents, positive, opened.scale, candidates)
    alike = [str(item["text"]) for item in stage.items]
    ranked = by_effect(stage, judge, tried, text, alike[0] if len(alike) == 1 else _common(alike), strength=2.0)
    rows: list[list[Any]] = [
        [e.latents[0], tried.index(e.latents[0]) + 1, e.description[0][1], e.consistency, e.size] for e in ranked
    ]
    columns = ["latent", "rank by activation", f"gain towards “{text}” ↑", "consistency ↑", "change of the picture"]
    kept = [e.latents[0] for e in ranked if e.description[0][1] > 0][:n]
    if not kept:
        raise MmsaeError(f"none of {len(tried)} latents moves the pictures towards {text!r}; try more --candidates.")
    return kept, Table("tried at strength 2", columns, rows)


def _common(prompts: Sequence[str]) -> str:
    """The words that all prompts share."""
    shared = set.intersection(*(set(prompt.split()) for prompt in prompts))
    return " ".join(word for word in prompts[0].split() if word in shared) or prompts[0]


def concept_rows(opened: Opened, text: str) -> tuple[LatentStore, np.ndarray]:
    """Codes of prompts, and which of them speak of a text: those of the run, or else new ones."""
    said = {int(item["sample_id"]): str(item.get("text", "")).lower().split() for item in opened.items}
    counts = {w: sum(w in words for words in said.values()) for w in text.lower().split()}
    telling = [w for w, count in counts.items() if 0 < count < len(said) / 2]
    positive = np.array([bool(telling) and all(w in said[int(i)] for w in telling) for i in opened.latents.samples[0]])
    if positive.sum() >= 2 and (~positive).sum() >= 2:
        return opened.latents, positive
    plain = list(dict.fromkeys(str(item.get("text", "")) for item in opened.items))[:4]
    items = items_of([*[text] * 4, *(plain * 4)[:4]])
    batches = [opened.source.read(opened.source.collate([item])) for item in items]
    return LatentStore.build(opened.core, batches), np.arange(8) < 4


def like_picture(opened: Opened, path: str, n: int) -> list[int]:
    """Latents that fire for a picture with some noise more than for the prompts of the run, by their own unit."""
    if opened.source.encoder:
        raise MmsaeError("--like needs a dictionary of the unet or the transformer; a text encoder sees no pictures.")
    try:
        image = Image.open(path).convert("RGB")
    except OSError as error:
        raise MmsaeError(f"{path} is no picture ({error}).") from error
    source = copy.copy(opened.source)
    source.mode, source.timesteps, source.seed = "noise", [700, 500, 300], 0
    item = {"sample_id": 0, "text": "", "image": image}
    shown = LatentStore.build(opened.core, [source.read(source.collate([item]))])
    usual = torch.as_tensor(np.asarray(opened.latents.codes.mean(0))[0])
    here = torch.as_tensor(np.asarray(shown.codes.mean(0))[0])
    return ((here - usual) / opened.scale).topk(n).indices.tolist()


def figures(
    judge: PictureJudge,
    reference: Tensor,
    columns: list[Tensor],
    headings: list[str],
    items: list[Item],
    text: str | None,
) -> Table:
    """What changed at each strength, measured by a CLIP and, where its weights are at hand, by LPIPS."""
    prompts = [str(item["text"]) for item in items]
    before = judge.pictures(reference)
    seen = judge.factors(before) if judge.prompts else {}
    towards = {f: texts.index(text) for f, texts in judge.prompts.items() if text in texts} if text else {}
    try:
        lpips(reference[:1], reference[:1])
        perceptual = True
    except MmsaeError as error:
        print(f"no LPIPS: {error}")
        perceptual = False
    names = ["strength", "CLIP score of the prompt ↑", "pixels changed by", "CLIP distance"]
    names += [f"towards “{text}” ↑"] if text else []
    names += [f"is “{text}” ↑" for _ in towards]
    names += [f"{factor} kept ↑" for factor in seen if factor not in towards]
    names += ["LPIPS ↓"] if perceptual else []
    rows: list[list[Any]] = []
    for heading, pictures in zip(headings, columns, strict=True):
        after = judge.pictures(pictures)
        row: list[Any] = [heading, float(judge.clip_score(after, prompts).mean())]
        row += [float((pictures - reference).abs().mean()), max(float((1 - (before * after).sum(-1)).mean()), 0.0)]
        if text:
            row.append(float(judge.directional(before, after, text, _common(prompts)).mean()))
        now = judge.factors(after) if judge.prompts else {}
        row += [float((now[factor] == value).mean()) for factor, value in towards.items()]
        row += [float((now[factor] == seen[factor]).mean()) for factor in seen if factor not in towards]
        row += [float(lpips(pictures, reference).mean())] if perceptual else []
        rows.append(row)
    return Table("", names, rows)


def curves(table: Table) -> Plot:
    """Success and what was kept over strengths."""
    wanted = [i for i, name in enumerate(table.columns) if name.startswith("is ") or name.endswith("kept ↑")]
    wanted = wanted or [2, 3]
    x = [float(str(row[0]).lstrip("×")) for row in table.rows]
    lines = [{"label": table.columns[i].rstrip(" ↑"), "x": x, "y": [row[i] for row in table.rows]} for i in wanted]
    return Plot("what changes, and what stays", "strength", "share of pictures", lines)


def print_table(table: Table) -> None:
    """In the terminal."""
    from mmsae.cli.evaluate import show

    show([Result("Steering", tables=[table])])


if __name__ == "__main__":
    try:
        auto_cli(steer_diffusion, as_positional=False)
    except MmsaeError as error:
        raise SystemExit(f"error: {error}") from None

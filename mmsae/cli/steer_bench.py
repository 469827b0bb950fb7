"""`mmsae steer bench`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

import mmsae.artifact
from mmsae.cli.base import quiet
from mmsae.cli.convert import is_ours
from mmsae.cli.evaluate import show
from mmsae.cli.messages import Parser
from mmsae.cli.run import datamodule_of, dictionary_of, hook_point_of
from mmsae.cli.where import where_of
from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError, checked, nearest
from mmsae.steering.bench import SteeringBench, settings_of
from mmsae.steering.judges import Judge
from mmsae.steering.ledger import Ledger
from mmsae.steering.sweep import STRENGTHS
from mmsae.steering.targets import Contexts, read_layers, unrelated, writes


def bench(
    run: str,
    label: str,
    values: list[str] | None = None,
    sae: str | None = None,
    layers: list[str] | None = None,
    others: list[str] | None = None,
    strengths: list[float] | None = None,
    edit: Literal["add", "clamp", "swap"] = "add",
    where: str = "all",
    select: Literal["difference", "output"] = "difference",
    candidates: int = 3,
    contexts: int = 100,
    samples: int = 2,
    max_new_tokens: int = 24,
    words: dict[str, list[str]] | None = None,
    judge: Judge | None = None,
    split: Literal["train", "val"] = "train",
    max_rows: int = 100_000,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Success against collateral change over strengths, for latents chosen by a label, beside controls.

    Interrupted, the same command goes on where it stopped. Beside the latents stand as many random ones that fire as
    often, the difference of means, and a probe; half of the contexts choose, the other half measure.

    Args:
        run: Folder of a `mmsae fit` run whose data have labels.
        label: What to steer: colour.
        values: To steer towards; default: all.
        sae: Another dictionary than the run's own: a folder or a hub id, also of SAELens and other libraries.
        layers: Further dictionaries, for the grid of layers and strengths: folders, or all for those of the run.
        others: Labels that should not change; default: those that do not follow from the steered one.
        strengths: In units of the 99th percentile of each latent's activations.
        edit: Add to the code, set it, or swap: the codes of the latents of all other values go over to it, so that
            nothing happens where none of them fires.
        where: Positions, see mmsae steer --help.
        select: Candidates: latents that tell the value from others, or output, of language models: those whose decoder
            rows write its words.
        candidates: Latents to choose from; the control has as many.
        contexts: Items to steer.
        samples: Continuations of each, of language models.
        max_new_tokens: Tokens of each.
        words: Value to words that tell it, of language models, if not those of the data.
        judge: Rates continuations: RuleJudge, or a class of your own with one method, my_file.MyJudge.
        split: To choose latents on.
        max_rows: Activation rows of a split.
        seed: Of halves, controls, samples and resamples.
        threads: CPU threads of torch; default: its own.
    """
    if threads:
        torch.set_num_threads(checked("threads", threads, 1))
    folder = Path(run)
    position = where_of(where)
    data = datamodule_of(folder)
    if data.source is None:
        raise MmsaeError(f"{run} was trained from a store alone: steering needs --data.source in its config.yaml.")
    names = data.value_names
    if label not in names:
        raise MmsaeError(f"--label={label}: the data have no such label; nearest: {nearest(label, names)}.")
    wanted = list(names[label]) if values is None else values
    for value in wanted:
        if value not in names[label]:
            known = nearest(value, names[label])
            raise MmsaeError(f"--values: {label} has no value {value!r}; nearest: {known}.")
    for other in others or []:
        if other not in names:
            raise MmsaeError(f"--others: the data have no label {other!r}; nearest: {nearest(other, names)}.")
    if judge is not None and not writes(data.source):
        raise MmsaeError(f"a judge rates texts, and {type(data.source).__name__} writes none: leave --judge out.")
    checked("contexts", contexts, 4)
    numbers = [names[label].index(value) for value in wanted]
    plan = SteeringBench(numbers, tuple(strengths or STRENGTHS), edit, position, select, candidates, seed)
    paths = [sae or run, *_layers(folder, layers or [])]
    cores: dict[str, SAECore] = {}
    for path in paths:
        core = dictionary_of(path)
        point = hook_point_of(core, data)
        if point in cores:
            raise MmsaeError(f"two dictionaries read {point!r}; --layers compares hook points, so give one for each.")
        cores[point] = core
    read = read_layers(data, cores, split, max_rows)
    free = unrelated(read[0].latents, label, list(names)) if others is None else others
    where_measured = Contexts(data, label, free, contexts, seed, words, samples, max_new_tokens)
    about = {
        **settings_of(plan, where_measured), "where": where, "split": split, "rows": max_rows,
        "saes": [mmsae.artifact.identity(path) if is_ours(Path(path)) else path for path in paths],
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]
    ledger = Ledger(folder / "steering" / f"{label}-{digest}.jsonl")
    result = plan.run(read, where_measured, ledger, judge)
    result.save(folder / "results")
    show([result])
    print(f"results: {folder / 'results' / f'{result.name}.json'}")
    print(f"next:    mmsae report --run {run}")


def _layers(folder: Path, given: list[str]) -> list[str]:
    found: list[str] = []
    for one in given:
        own = sorted(str(p) for p in folder.glob("sae-*") if p.is_dir())
        found += own if one == "all" else [one]
    return found


def run(args: list[str]) -> None:
    """Parse and run."""
    quiet()
    about = " ".join(str(bench.__doc__).partition("    Args:")[0].split())
    named: dict[str, Any] = {"prog": "mmsae steer bench", "description": about}
    auto_cli(bench, args=args[1:], as_positional=False, parser_class=Parser, **named)

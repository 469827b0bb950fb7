"""`mmsae steer`, and `mmsae steer bench` in a file of its own."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from rich import box
from rich.console import Console
from rich.table import Table

from mmsae.cli.base import quiet
from mmsae.cli.messages import Parser
from mmsae.cli.run import datamodule_of, dictionary_of, hook_point_of, read_for
from mmsae.cli.where import where_of
from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError, checked, nearest
from mmsae.latents import LatentStore
from mmsae.sources import Source
from mmsae.steering import Ablate, Add, Clamp, Edit, Scale, Suppress, mean_difference, quantiles, steer

EDITS: dict[str, Any] = {"add": Add, "clamp": Clamp, "scale": Scale, "suppress": Suppress, "ablate": Ablate}
UNITS = "the 99th percentile of its own activations"


def steer_one(
    run: str,
    latent: list[int] | None = None,
    concept: str | None = None,
    strength: list[float] | None = None,
    prompt: str | None = None,
    image: str | None = None,
    item: int | None = None,
    captions: list[str] | None = None,
    edit: Literal["add", "clamp", "scale", "suppress", "ablate"] = "add",
    where: str = "all",
    unit: Literal["quantile", "code"] = "quantile",
    sae: str | None = None,
    hook_point: str | None = None,
    split: Literal["train", "val", "test"] = "val",
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    max_rows: int = 100_000,
    threads: int | None = None,
) -> None:
    """Steer the model of a run with latents, and show what it does beside what it did; mmsae steer bench measures it.

    Args:
        run: Folder of a `mmsae fit` run.
        latent: One latent, or several that are moved together.
        concept: Choose the latent instead, by a label of the data: animal=dog.
        strength: One or several, shown side by side; default 4. Of add and clamp in `unit`; of scale the factor; of
            suppress the share that is taken away; ablate has none.
        prompt: What a language model goes on with, or a question about the picture.
        image: A picture.
        item: Number of an item of the split, instead of a prompt and a picture.
        captions: Texts between which a model of pictures and texts decides, instead of the source's prompts.
        edit: What is done to the latents.
        where: Positions: all, generated, prompt, image, words, positions:0-4, box:TOP,LEFT,BOTTOM,RIGHT (shares of the
            picture); joined by &, the opposite by ~.
        unit: Of the strength: quantile, the 99th percentile of each latent's own activations, or code.
        sae: Another dictionary than the run's own, such as RUN/sae-model.layers.1; a folder or a hub id, or a folder of
            SAELens, Gemma Scope or another library.
        hook_point: Where that dictionary belongs, if the run reads several points and it does not say.
        split: Of the data, for units, concepts and items.
        max_new_tokens: Tokens to write.
        temperature: 0 takes the likeliest token.
        seed: Of the sampling.
        max_rows: Activation rows behind units and concepts.
        threads: CPU threads of torch; default: its own.
    """
    if threads:
        torch.set_num_threads(checked("threads", threads, 1))
    if (latent is None) == (concept is None):
        raise MmsaeError("give either --latent=NUMBER or --concept=LABEL=VALUE.")
    condition = where_of(where)
    data = datamodule_of(Path(run))
    source = data.source
    if source is None:
        raise MmsaeError(f"{run} was trained from a store alone: steering needs --data.source in its config.yaml.")
    core = dictionary_of(sae or run)
    point = hook_point_of(core, data, hook_point)
    asked = inputs(data, source, prompt, image, item, split)
    strengths = [4.0] if strength is None else list(strength)
    scaled = unit == "quantile" and edit in ("add", "clamp")
    latents = codes(data, core, point, split, max_rows) if scaled or concept is not None else None
    chosen = [chosen_by(concept, data, latents)] if concept is not None else list(latent or [])
    scale = quantiles(latents) if scaled and latents is not None else None
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if captions:
        settings["prompts"] = {"captions": captions}
    names = {**data.value_names, "captions": captions or []}
    shown = {"unsteered": described(source.generate([asked], **settings)[0], names)}
    for amount in [0.0] if edit == "ablate" else strengths:
        edits: Edit = Ablate(chosen) if edit == "ablate" else EDITS[edit](chosen, amount)
        with steer(source, core, point, edits, condition, scale=scale):
            answer = described(source.generate([asked], **settings)[0], names)
        shown[edit if edit == "ablate" else f"{edit} {amount:g}"] = answer
    told = f"latent {', '.join(map(str, chosen))} of {point}"
    if scale is not None:
        told += f"; 1 is {', '.join(f'{float(scale[i]):.3g}' for i in chosen)}, {UNITS}"
    show(shown, asked, told)


def inputs(
    data: Any, source: Source, prompt: str | None, image: str | None, item: int | None, split: str
) -> dict[str, Any]:
    """The item that the model is given."""
    if item is not None:
        items = data.items(split)
        checked("item", item, 0, len(items) - 1)
        found = items[item]
        return {**found, "text": prompt} if prompt and "text" in found else dict(found)
    if prompt is None and image is None:
        raise MmsaeError("give the model something: --prompt=TEXT, --image=FILE, both, or --item=NUMBER of the data.")
    found = {"sample_id": 0}
    if image is not None:
        if not Path(image).is_file():
            raise MmsaeError(f"there is no picture {image!r}.")
        found["image"] = image
        if prompt is not None:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            found["messages"] = [{"role": "user", "content": content}]
    elif prompt is not None:
        found["text"] = prompt
        if source.modality != "text":
            raise MmsaeError(f"{type(source).__name__} reads no texts alone: give --image=FILE or --item=NUMBER.")
    return found


def codes(data: Any, core: SAECore, hook_point: str, split: Any, max_rows: int) -> LatentStore:
    """Codes of a split, for units."""
    return LatentStore.build(core, read_for(core, hook_point, data.rows(split), max_rows), max_rows, split)


def chosen_by(concept: str, data: Any, latents: LatentStore | None) -> int:
    """The latent that tells a value of a label from the others best."""
    assert latents is not None
    label, _, value = concept.partition("=")
    names = data.value_names
    if label not in names:
        raise MmsaeError(f"--concept={concept}: the data have no label {label!r}; nearest: {nearest(label, names)}.")
    if value not in names[label]:
        known = nearest(value, names[label])
        raise MmsaeError(f"--concept={concept}: {label} has no value {value!r}; nearest: {known}.")
    return int(mean_difference(latents, latents.labels()[label] == names[label].index(value)).ids[0])


def described(answer: dict[str, Any], names: dict[str, list[str]]) -> str:
    """What a model made of an item, for a reader."""
    if "text" in answer:
        return answer["text"].strip()
    lines = []
    for label, row in answer["posterior"].items():
        values = names.get(label) or [str(i) for i in range(len(row))]
        best = row.argsort(descending=True)[:3].tolist()
        lines.append(f"{label}: " + ", ".join(f"{values[i]} {float(row[i]):.2f}" for i in best))
    return "\n".join(lines)


def show(shown: dict[str, str], asked: dict[str, Any], told: str) -> None:
    """Print what was asked and what came."""
    given = asked.get("messages", [{}])[0].get("content", asked.get("text", ""))
    if not isinstance(given, str):
        given = " ".join(part["text"] for part in given if part["type"] == "text")
    table = Table(title=told, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column(str(given) or "item")
    for name, answer in shown.items():
        table.add_row(name, answer)
    Console().print(table)


def run(args: list[str]) -> None:
    """Parse and run."""
    if args[1:2] == ["bench"]:
        import_module("mmsae.cli.steer_bench").run(args[1:])
        return
    quiet()
    about = str(steer_one.__doc__).partition("\n")[0]
    named: dict[str, Any] = {"prog": "mmsae steer", "description": about}
    auto_cli(steer_one, args=listed(args[1:]), as_positional=False, parser_class=Parser, **named)


def listed(words: list[str]) -> list[str]:
    """`--latent 12` and `--strength=1,2` as the lists that they stand for."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("--latent", "--strength"):
            value = value if equals else next(rest, "")
            word = f"{name}={value}" if value.startswith("[") else f"{name}=[{value}]"
        found.append(word)
    return found

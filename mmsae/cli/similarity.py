"""`mmsae similarity`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli

import mmsae.artifact
from mmsae.analyses.dictionary_similarity import Layer, dictionary_similarity
from mmsae.cli.base import quiet
from mmsae.cli.evaluate import show
from mmsae.cli.messages import Parser
from mmsae.cli.run import config_of, datamodule_of
from mmsae.errors import checked
from mmsae.spec import ACTS, Batch, rows_of
from mmsae.store import Store
from mmsae.store.manifest import MANIFEST

ORDERING = ("seed", "batch_size", "chunk_rows", "block_rows", "examples_per_forward")
"""Arguments of a datamodule that decide in which order rows are trained on."""


def similarity(
    models: list[list[str]],
    out: str = "similarity",
    split: Literal["train", "val", "test"] = "test",
    n_rows: int = 10_000,
    threads: int | None = None,
) -> None:
    """Compare layers of models by their dictionaries and activations: which layer is which?

    Args:
        models: For each model its layers, in the same order: runs of `mmsae fit`, dictionaries, or stores, each stream
            of which is a layer. Example: [[runs/a-0,runs/a-1],[runs/b-0,runs/b-1]].
        out: Folder of the result.
        split: Split whose activations are compared.
        n_rows: Activation rows that are compared, the first of the split; 0 compares dictionaries alone.
        threads: CPU threads of torch; default: its own.
    """
    if threads:
        torch.set_num_threads(checked("threads", threads, 1))
    checked("n_rows", n_rows, 0)
    layers = [[layer for entry in model for layer in layers_of(entry, split, n_rows)] for model in models]
    result = dictionary_similarity(layers)
    result.save(Path(out) / "results")
    show([result])
    print(f"results: {Path(out) / 'results' / f'{result.name}.json'}")
    print(f"next:    mmsae report --run {out} --title 'Layers of {len(models)} models'")


def layers_of(entry: str, split: Literal["train", "val", "test"], n_rows: int) -> list[Layer]:
    """The layers that a run, a dictionary or a store stands for."""
    folder = Path(entry)
    for candidate in (folder / split, folder):
        if (candidate / MANIFEST).is_file():
            return stored_layers(Store(candidate, verify="size"), entry, n_rows)
    core, known = mmsae.artifact.load(entry), mmsae.artifact.describe(entry)
    layer = Layer(core.spec.input, entry, core, known.get("activations", {}), known.get("training", {}).get("rows", 0))
    run = next((place for place in (folder, folder.parent) if (place / "config.yaml").is_file()), None)
    if run is not None:
        init = config_of(run)["data"].get("init_args", {})
        layer.order = {name: init.get(name) for name in ORDERING}
        if n_rows:
            data = datamodule_of(run)
            layer.measured_on = data.origin(split)["data"]
            found, layer.ids = read(data.rows(split), n_rows)
            layer.x = found[core.spec.input]
    return [layer]


def stored_layers(store: Store, path: str, n_rows: int) -> list[Layer]:
    """Each stream of a store."""
    found, ids = read(store.in_order(1024), n_rows) if n_rows else ({}, None)
    data = store.manifest.data
    return [Layer(stream, path, x=found.get(stream), ids=ids, measured_on=data) for stream in store.spec.streams]


def read(batches: Iterable[Batch], n_rows: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The first rows of each stream, and their samples and positions `[n, 2]`."""
    acts: dict[str, list[torch.Tensor]] = {}
    ids, left = [], n_rows
    for batch in batches:
        sample = batch["sample_id"][:left].long()
        position = batch["position"][:left].long() if "position" in batch else torch.full_like(sample, -1)
        ids.append(torch.stack([sample, position], -1))
        for stream, x in batch[ACTS].items():
            acts.setdefault(stream, []).append(x[:left].float())
        left -= rows_of(batch)
        if left <= 0:
            break
    return {stream: torch.cat(parts) for stream, parts in acts.items()}, torch.cat(ids)


def run(args: list[str]) -> None:
    """Parse and run."""
    quiet()
    auto_cli(similarity, args=args[1:], as_positional=False, parser_class=Parser)

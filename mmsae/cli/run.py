"""A finished run, opened again: its datamodule, its dictionary and its curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

import mmsae.artifact
import mmsae.sources
from datamodules import ActivationDataModule
from mmsae import formats
from mmsae.cli.convert import is_ours
from mmsae.cli.messages import Parser
from mmsae.cores import SAECore
from mmsae.errors import MmsaeError
from mmsae.results import Plot, Result
from mmsae.spec import ACTS, Batch, rows_of
from mmsae.store import CodeStore


def config_of(run: Path) -> dict[str, Any]:
    """The configuration that `mmsae fit` saved."""
    path = run / "config.yaml"
    if not path.is_file():
        raise MmsaeError(f"{run} is no run of mmsae fit: it has no config.yaml.")
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise MmsaeError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error


def datamodule_of(run: Path, store: str | None = None) -> ActivationDataModule:
    """The datamodule of a run; `store` replaces its own."""
    chosen = config_of(run)["data"]
    init = chosen.setdefault("init_args", {})
    if store is not None:
        init["store"] = store
    parser = Parser()
    parser.add_subclass_arguments(ActivationDataModule, "data")
    try:
        return parser.instantiate_classes(parser.parse_object({"data": chosen})).data
    except MmsaeError as error:
        raise MmsaeError(f"{run / 'config.yaml'}: {error}") from error


def dictionary_of(path: str) -> SAECore:
    """A dictionary of ours (a run, an sae folder, a hub id), or a folder or file of another library."""
    return mmsae.artifact.load(path) if is_ours(Path(path)) else formats.load(Path(path))


def hook_point_of(core: SAECore, data: ActivationDataModule, given: str | None = None) -> str:
    """Where a dictionary belongs: its own stream, or for one of another library the only stream of the data."""
    streams = list(data.spec.streams)
    found = given or (core.spec.input if core.spec.input in streams else streams[0] if len(streams) == 1 else None)
    if found is None:
        raise MmsaeError(f"the dictionary does not say which of {', '.join(streams)} it reads: give --hook_point.")
    if found not in streams:
        raise MmsaeError(f"--hook_point={found} is none of those that the run reads: {', '.join(streams)}.")
    width = data.spec.streams[found]
    if width != core.spec.d_in:
        raise MmsaeError(f"the dictionary reads activations of width {core.spec.d_in}, but {found!r} has {width}.")
    return found


def read_for(core: SAECore, hook_point: str, batches: Iterable[Batch], max_rows: int) -> list[Batch]:
    """Some batches, with the stream of the hook point under the name that the dictionary has for it."""
    found, n = [], 0
    for batch in batches:
        found.append({**batch, ACTS: {**batch[ACTS], core.spec.input: batch[ACTS][hook_point]}})
        n += rows_of(batch)
        if n >= max_rows:
            break
    return found


def codes_of(folder: Path, dictionary: dict[str, Any], origin: dict[str, Any]) -> CodeStore:
    """Stored codes; those of another dictionary or of other data are refused."""
    store = CodeStore(folder)
    found = store.manifest
    if found.dictionary != dictionary:
        own = f"{found.dictionary['core']} {found.dictionary['sha256'][:12]}"
        raise MmsaeError(
            f"{folder} holds codes of another dictionary ({own}, not {dictionary['core']} "
            f"{dictionary['sha256'][:12]}): run mmsae encode for this one."
        )
    if {"source": found.source, "data": found.data} != json.loads(json.dumps(origin)):
        raise MmsaeError(f"{folder} holds codes of other data than the run's: run mmsae encode for these.")
    return store


def training_result(run: Path) -> Result | None:
    """Curves of FVU, L0, loss and dead latents from the run's `metrics.csv`."""
    path = run / "metrics.csv"
    if not path.is_file():
        return None
    with open(path) as file:
        rows = list(csv.DictReader(file))

    def line(key: str, label: str) -> dict[str, Any] | None:
        points = [(int(row["step"]) + 1, float(row[key])) for row in rows if row.get(key)]
        return {"label": label, "x": [p[0] for p in points], "y": [p[1] for p in points]} if len(points) > 1 else None

    wanted = [
        ("fraction of variance unexplained", "FVU", [("fvu", "training"), ("val/fvu", "validation")], "y"),
        ("latents per activation", "L0", [("l0", "training"), ("val/l0", "validation")], ""),
        ("dead latents", "share", [("dead_fraction", "training")], ""),
    ]
    plots = []
    for title, unit, keys, log in wanted:
        lines = [found for key, label in keys if (found := line(key, label)) is not None]
        if lines:
            last = lines[0]["y"][-1]
            plots.append(Plot(f"{title}: {last:.3g} at the end", "optimizer step", unit, lines, log=log))
    return Result(name="Training", title=f"{rows[-1]['step']} steps", plots=plots) if plots else None

"""Which layers of two models are alike, told by their dictionaries and by their activations?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from mmsae.cores import ITDA, SAECore
from mmsae.errors import MmsaeError
from mmsae.metrics.similarity import (
    best_cosine,
    canonical,
    components,
    jaccard,
    layer_matching,
    linear_cka,
    matched_cosine,
)  # fmt: skip
from mmsae.results import Plot, Result, Table

PAIRED = 8192
"""Largest dictionary whose latents are paired off one to one; that takes seconds, and minutes beyond."""
NAMED = "train them with --data.columns=[sample_id,position]"


@dataclass
class Layer:
    """What is known of one layer of one model.

    Attributes:
        name: Its hook point.
        path: Where it was read, for error messages.
        core: Its dictionary.
        origin: Where the dictionary's, or else the stored, activations come from: `source` and `data`.
        rows: Activations that the dictionary was trained on.
        order: What else decides the order of the training rows; None if nobody knows.
        x: Activations `[n, d]`, to compare layers without dictionaries.
        ids: Sample and position of each of them, `[n, 2]`.
        measured_on: Data set that they come from.
    """

    name: str
    path: str
    core: SAECore | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    order: dict[str, Any] | None = None
    x: Tensor | None = None
    ids: Tensor | None = None
    measured_on: Any = None


Measure = Callable[[Any, Any], float]


def dictionary_similarity(models: Sequence[Sequence[Layer]]) -> Result:
    """Compare every layer of a model with every layer of another, by all measures that the layers allow.

    Jaccard index of the rows that ITDA dictionaries took (arXiv 2505.17769), linear CKA and SVCCA of the activations,
    mean cosine of latents between dictionaries of one model. A measure tells layers apart if the most similar layer of
    the other model is the one at the same place (layer matching).

    Args:
        models: Layers of each model, in the same order.

    Raises:
        MmsaeError: Less than two models, or their rows are not the same ones in the same order.
    """
    layers = [layer for model in models for layer in model]
    if len(models) < 2 or not all(models):
        raise MmsaeError("a similarity needs at least two models with a layer each: give --models=[[A],[B]].")
    if len(models) > 2 and len({len(model) for model in models}) > 1:
        raise MmsaeError("more than two models can be compared only layer by layer: give as many layers of each.")
    measures, left_out = _measures(layers)
    if not measures:
        raise MmsaeError(f"nothing can be compared: {'; '.join(f'no {k}, {v}' for k, v in left_out.items())}.")
    square = len({len(model) for model in models}) == 1
    several = square and len(models[0]) > 1
    rows: list[list[Any]] = []
    numbers: dict[str, float] = {}
    plots = []
    for name, (of, measure) in measures.items():
        seen = [[of(layer) for layer in model] for model in models]
        pairs = [torch.tensor([[measure(x, y) for y in b] for x in a]) for a, b in combinations(seen, 2)]
        mean = torch.stack(pairs).mean(0) if square else pairs[0]
        same = float(mean.diagonal().mean())
        if not several:
            numbers[name] = float(mean.mean())
            rows.append([name, float(mean.mean())])
        else:
            n, trials = len(mean), 2 * len(mean) * len(pairs)
            hits = round(sum(layer_matching(found) * 2 * n for found in pairs))
            low, high = binomtest(hits, trials).proportion_ci(method="wilson")
            other = float((mean.sum() - mean.diagonal().sum()) / (n * (n - 1)))
            found = {"matched": hits / trials, "low": low, "high": high, "same": same, "other": other}
            numbers |= {f"{name}/{key}": float(value) for key, value in found.items()}
            rows.append([name, hits / trials, f"{low:.2f} to {high:.2f}", f"{hits} of {trials}", same, other])
        if mean.numel() > 1:
            plots.append(_heat(name, models, mean))
    if several:
        rows.append(["chance", 1 / len(models[0]), "–", "–", None, None])
        columns = ["", "layers matched ↑", "95 %", "layers", "same layer", "other layers"]
    else:
        columns = ["", "similarity" if len(layers) == 2 else "mean similarity"]
    said = ", ".join(f"{row[0]} {row[1]:.0%}" if several else f"{row[0]} {row[1]:.2f}" for row in rows[: len(measures)])
    title = f"Layers that are matched: {said}" if several else said
    settings = {"models": len(models), "layers": [len(model) for model in models], "left out": left_out}
    settings["rows"] = len(layers[0].x) if layers[0].x is not None else 0
    return Result("DictionarySimilarity", title, numbers, [Table("Layers of different models", columns, rows)], plots,
                  settings=settings)  # fmt: skip


def _measures(layers: list[Layer]) -> tuple[dict[str, tuple[Callable[[Layer], Any], Measure]], dict[str, str]]:
    """Name to what is taken of a layer and how two of these are compared, and why others are left out."""
    found: dict[str, tuple[Callable[[Layer], Any], Measure]] = {}
    left_out = {}
    first = layers[0]
    if all(isinstance(layer.core, ITDA) for layer in layers):
        for layer in layers[1:]:
            _same_stream(first, layer)
        found["Jaccard"] = (lambda layer: layer.core.row_ids), jaccard  # type: ignore[union-attr]
    else:
        left_out["Jaccard"] = "not all layers have an ITDA dictionary"
    if all(layer.x is not None for layer in layers):
        for layer in layers[1:]:
            _same_examples(first, layer)
        found["linear CKA"] = (lambda layer: layer.x), linear_cka
        found["SVCCA"] = (lambda layer: components(layer.x)), canonical  # type: ignore[arg-type]
    else:
        left_out["linear CKA and SVCCA"] = "not all layers have activations"
    if why := _not_one_model(layers):
        left_out["cosine"] = why
    else:
        cores = [layer.core for layer in layers if layer.core is not None]
        signed = any(core.signed for core in cores)

        def dictionary(layer: Layer) -> Tensor:
            assert layer.core is not None
            return layer.core.dictionary.detach()

        found["nearest cosine"] = dictionary, lambda a, b: best_cosine(a, b, signed)
        if max(core.d_latent for core in cores) <= PAIRED:
            found["matched cosine"] = dictionary, lambda a, b: matched_cosine(a, b, signed)
        else:
            left_out["matched cosine"] = f"a dictionary has more than {PAIRED} latents"
    return found, left_out


def _same_stream(one: Layer, other: Layer) -> None:
    """Refuse dictionaries that were not grown from the same rows in the same order."""
    assert isinstance(one.core, ITDA)
    assert isinstance(other.core, ITDA)
    both = f"{one.path} and {other.path}"
    if one.origin.get("data") != other.origin.get("data"):
        raise MmsaeError(f"{both} were grown from different data, so their rows cannot be compared.")
    if one.rows != other.rows:
        raise MmsaeError(f"{both} saw {one.rows} and {other.rows} rows: grow them from equally many.")
    named = [not _numbered(core.row_ids) for core in (one.core, other.core)]
    if one.order is not None and other.order is not None and one.order != other.order:
        keys = sorted(key for key in {*one.order, *other.order} if one.order.get(key) != other.order.get(key))
        raise MmsaeError(f"{both} saw their rows in different orders ({', '.join(keys)} differ): grow them alike.")
    if named[0] != named[1] or (not any(named) and (one.order is None or other.order is None)):
        raise MmsaeError(f"{both} do not say which rows their latents were: {NAMED}.")
    place = {tuple(row): i for i, row in enumerate(other.core.row_ids.tolist())}
    common = [place[tuple(row)] for row in one.core.row_ids.tolist() if tuple(row) in place]
    if common != sorted(common):
        raise MmsaeError(f"{both} saw their rows in different orders: grow them with the same seed and sizes.")


def _numbered(ids: Tensor) -> bool:
    """Whether ids only count the rows of the training, which are shuffled, instead of naming them."""
    return bool((ids[:, 1] == -1).all() and (ids[1:, 0] > ids[:-1, 0]).all())


def _same_examples(one: Layer, other: Layer) -> None:
    """Refuse activations of different examples."""
    assert one.ids is not None
    assert other.ids is not None
    both = f"{one.path} and {other.path}"
    if one.measured_on != other.measured_on:
        raise MmsaeError(f"{both} hold activations of different data: extract both from the same examples.")
    if not torch.equal(one.ids, other.ids):
        raise MmsaeError(
            f"{both} hold activations of different rows, or in another order: extract both with the same positions."
        )


def _not_one_model(layers: list[Layer]) -> str:
    """Why directions of the dictionaries cannot be compared; empty if they can."""
    if any(layer.core is None for layer in layers):
        return "not all layers have a dictionary"
    if len({layer.core.spec.d_out for layer in layers}) > 1:  # type: ignore[union-attr]
        return "the dictionaries have different widths"
    models = [(layer.origin.get("source") or {}).get("weights") for layer in layers]
    if None in models or len(set(models)) > 1:
        return "the dictionaries are not known to be of the same model"
    return ""


def _heat(name: str, models: Sequence[Sequence[Layer]], mean: Tensor) -> Plot:
    (one, other), n_pairs = [_short([layer.name for layer in model]) for model in models[:2]], len(models)
    lines = [{"label": label, "x": other, "y": row} for label, row in zip(one, mean.tolist(), strict=True)]
    over = f", mean over {n_pairs * (n_pairs - 1) // 2} pairs of models" if len(models) > 2 else ""
    return Plot(f"{name} of layers{over}", "layer of the second model", "layer of the first model", lines, kind="heat")


def _short(names: list[str]) -> list[str]:
    """Names without what they have in common; by place where that leaves some alike."""
    if len(set(names)) < len(names):
        return [str(i) for i in range(len(names))]
    parts = [name.split(".") for name in names]
    told = [i for i in range(max(map(len, parts))) if len({tuple(part[i : i + 1]) for part in parts}) > 1]
    return [".".join(part[i] for i in told if i < len(part)) or ".".join(part) for part in parts]

"""The pairs of a split in memory: activations of each stream, and what is known of both sides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.cores import SAECore, SharedDictionary
from mmsae.errors import MmsaeError
from mmsae.sources import MODALITIES
from mmsae.spec import ACTS, Batch, in_float32

Block = tuple[str, Tensor, Tensor, Tensor, dict[str, Tensor]]


class Pairs(NamedTuple):
    """Pairs; row i of everything belongs to pair i.

    Attributes:
        acts: Stream to activations `[n, width]`.
        labels: Factor to the index of its value, int64 `[n]`; -1 is unknown.
        stated: Factor to whether the text says it, bool `[n]`; factors that are left out are said always.
        samples: Sample id of each pair `[n]`.
    """

    acts: dict[str, Tensor]
    labels: dict[str, np.ndarray]
    stated: dict[str, np.ndarray]
    samples: np.ndarray

    def known(self, factor: str, stream: str) -> np.ndarray:
        """Rows whose side in a stream tells a factor, bool `[n]`."""
        there = self.labels[factor] >= 0
        return there & self.stated[factor] if stream == "text" and factor in self.stated else there

    def features(self, factors: dict[str, int], stream: str) -> Tensor:
        """Truth as vectors: 1 for each value that the side in a stream has, or says, `[n, values of all factors]`."""
        parts = []
        for factor, n_values in factors.items():
            vector = torch.zeros(len(self.samples), n_values)
            rows = np.flatnonzero(self.known(factor, stream))
            vector[rows, self.labels[factor][rows]] = 1.0
            parts.append(vector)
        return torch.cat(parts, 1) if parts else torch.zeros(len(self.samples), 0)


def pairs_of(core: SAECore, data: Any, split: str, limit: int) -> Pairs:
    """The pairs of a split.

    Args:
        core: Says whether pairs are rows of several streams, or rows of one stream told apart by the column `stream`.
        data: The datamodule.
        split: Which.
        limit: At most so many.
    """
    streams = core.outputs if isinstance(core, SharedDictionary) else None
    found = _rows(data.rows(split), streams, limit)
    names = list(dict.fromkeys(name for name, *_ in found))
    if len(names) < 2:
        raise MmsaeError(
            "there are no pairs: give a source of two streams (--data.source=PairedEmbeddings, with union=true for a "
            "core of one stream)."
        )
    by_pair: dict[str, dict[int, tuple[Tensor, dict[str, int], int]]] = {name: {} for name in names}
    for name, x, pair, sample, labels in found:
        for i, key in enumerate(pair.tolist()):
            if key >= 0:
                own = {factor: int(values[i]) for factor, values in labels.items()}
                by_pair[name].setdefault(key, (x[i], own, int(sample[i])))
    common = [key for key in by_pair[names[0]] if all(key in own for own in by_pair.values())][:limit]
    first = [by_pair[names[0]][key] for key in common]
    factors = [factor for factor in data.value_names if first and factor in first[0][1]]
    samples = np.array([sample for *_, sample in first])
    said = data.stated(split) if hasattr(data, "stated") else {}
    return Pairs(
        {name: torch.stack([by_pair[name][key][0] for key in common]) for name in names},
        {factor: np.array([labels[factor] for _, labels, _ in first]) for factor in factors},
        {factor: np.asarray(values)[samples] for factor, values in said.items() if factor in factors},
        samples,
    )


def _rows(batches: Iterable[Batch], streams: list[str] | None, limit: int) -> list[Block]:
    """Stream, activations, pair ids, sample ids and labels, a block of rows of one stream each."""
    found: list[Block] = []
    n = 0
    named = {value: name for name, value in MODALITIES.items()}
    for batch in map(in_float32, batches):
        labels = {key.removeprefix("label."): v for key, v in batch.items() if key.startswith("label.")}
        pair: Tensor = batch["pair_id"] if "pair_id" in batch else batch["sample_id"]
        if streams is not None:
            for name in streams:
                found.append((name, batch[ACTS][name], pair, batch["sample_id"], labels))
            n += len(pair)
        elif "stream" in batch:
            x = next(iter(batch[ACTS].values()))
            for number in batch["stream"].unique().tolist():
                own = batch["stream"] == number
                name = named.get(int(batch["modality"][own][0]), f"stream {number + 1}")
                part = {factor: values[own] for factor, values in labels.items()}
                found.append((name, x[own], pair[own], batch["sample_id"][own], part))
            n += int((batch["stream"] == 0).sum())
        if n >= limit:
            break
    return found

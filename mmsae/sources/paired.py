"""Both towers of a model at once: one row per pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmsae.errors import MmsaeError
from mmsae.sources.base import _ONE_AT_A_TIME, MODALITIES, Source, _finite, fingerprint
from mmsae.sources.items import text_of
from mmsae.sources.two_towers import TwoTowers
from mmsae.spec import ACTS, Batch

UNION = "embedding"
"""The stream of both towers together."""


class PairedEmbeddings(Source):
    """The embeddings of a picture (or sound) and of its caption, as two streams of one row.

        source = PairedEmbeddings(SceneCLIP(["visual"]))
        source.spec.streams                      # {"image": 128, "text": 128}

    Rows carry `pair_id`: that of the item, or else its `sample_id`. Items need both contents.

    Args:
        model: A source of two towers: OpenCLIP, HFCLIP, CLAP, SceneCLIP. Its hook points are not read.
        unit: Give embeddings of length 1, as the model compares them; else as they are projected.
        union: Give two rows a pair instead, of one stream `embedding`, for dictionaries of one stream; the column
            `stream` (0 or 1) tells them apart.
    """

    modality = "other"

    def __init__(self, model: Source, unit: bool = False, union: bool = False) -> None:
        if not isinstance(model, TwoTowers):
            raise MmsaeError(f"{type(model).__name__} has not two towers: give OpenCLIP, HFCLIP, CLAP or SceneCLIP.")
        super().__init__([], device=str(model.device))
        self.inner, self.unit, self.union = model, unit, union
        self.names = model.towers
        self._replace: Mapping[str, Callable[[Tensor], Tensor]] = {}

    def load(self) -> nn.Module:
        """The model of the inner source."""
        return self.inner.model

    @property
    def model(self) -> nn.Module:
        """The model of the inner source."""
        return self.inner.model

    @property
    def points(self) -> list[Any]:
        """None: the embeddings are no output of a module in every model."""
        return []

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """What each tower reads, under its name."""
        return {name: self.inner.with_tower(name).tensors(items) for name in self.names}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """As any source; the column `pair_id` is there for every item."""
        batch = super().collate(items)
        return {**batch, "columns": {"pair_id": batch["sample_id"], **batch["columns"]}}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The embeddings by stream, `[B, embed_dim]` each."""
        rest = {key: batch[key] for key in ("sample_id", "columns")}
        found = {}
        for name in self.names:
            embedded = self.inner.with_tower(name).forward({**batch[name], **rest})
            embedded = normalize(embedded, dim=-1) if self.unit else embedded
            found[name] = self._replace[name](embedded) if name in self._replace else embedded
        return found

    def read(self, batch: dict[str, Any], gradients: bool = False) -> Batch:
        """One row per pair, with both streams, `pair_id` and the columns of the items."""
        if gradients:
            raise MmsaeError("PairedEmbeddings gives no gradients: set data.gradients=false.")
        with _ONE_AT_A_TIME, torch.no_grad():
            return self._paired(self.forward(batch), batch)

    def run(self, batch: dict[str, Any], also: Sequence[str] = ()) -> tuple[Batch, Any, dict[str, Tensor]]:
        """Rows, and the embeddings once more as what `forward` returned."""
        if also:
            raise MmsaeError("PairedEmbeddings reads embeddings only; use the inner source for hook points.")
        with _ONE_AT_A_TIME, torch.no_grad():
            output = self.forward(batch)
        return self._paired(output, batch), output, {}

    @contextmanager
    def spliced(
        self, batch: dict[str, Any], replace: Mapping[str, Callable[[Tensor], Tensor]], also: Sequence[str] = ()
    ) -> Iterator[dict[str, Tensor]]:
        """Replace embeddings while the model runs on a batch."""
        if self.union and set(replace) == {UNION}:
            replace = dict.fromkeys(self.names, replace[UNION])
        if also or not set(replace) <= set(self.names):
            raise MmsaeError(f"PairedEmbeddings has the streams {' and '.join(self.names)} and no hook points.")
        self._replace = replace
        try:
            yield {}
        finally:
            self._replace = {}

    def outcomes(self, output: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """`cosine` of each pair, and `matched` (0 or 1): is its own text the nearest of the batch?"""
        first, second = (normalize(output[name].float(), dim=-1) for name in self.names)
        similar = first @ second.T
        own = similar.diagonal()
        return {"cosine": own, "matched": (similar.amax(1) <= own).float()}

    def predictions(self, output: dict[str, Tensor], batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Which text of the batch belongs to each picture or sound, `[B, B]`; the loss of CLIP."""
        first, second = (normalize(output[name], dim=-1) for name in self.names)
        return self.inner.scale() * first @ second.T, torch.arange(len(first), device=first.device)

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The picture or sound, with its caption."""
        return self.inner.with_tower(self.names[0]).render(item)

    def render_stream(self, item: dict[str, Any], stream: str) -> dict[str, Any]:
        """The picture or sound; or the caption as it was written, not as it is tokenized."""
        if stream == "text":
            return {"kind": "text", "tokens": [text_of(item)]}
        return self.inner.with_tower(stream).render(item)

    def example_items(self) -> list[dict[str, Any]]:
        """Those of the inner source."""
        return self.inner.with_tower(self.names[0]).example_items()

    def check_points(self, patterns: Sequence[str]) -> None:
        """There are none."""
        raise MmsaeError("PairedEmbeddings reads embeddings only; use the inner source for hook points.")

    def describe(self) -> dict[str, Any]:
        """That of the inner source."""
        own = {"tower": " and ".join(self.names), "unit": self.unit, **({"union": True} if self.union else {})}
        return {**self.inner.describe(), **own}

    @property
    def identity(self) -> dict[str, Any]:
        """What a store has to know to be compared with another one."""
        own = {"weights": fingerprint(self.model), "modality": self.modality, "hook_points": list(self.names)}
        return {"class": type(self).__name__, **self.describe(), **own, "positions": self.positions}

    def _paired(self, output: dict[str, Tensor], batch: dict[str, Any]) -> Batch:
        device = next(iter(output.values())).device
        sample_id = batch["sample_id"].to(device)
        _finite(output, sample_id)
        nowhere = torch.full_like(sample_id, -1)
        where = {"position": torch.zeros_like(sample_id), "row": nowhere, "column": nowhere}
        kinds = {"kind": torch.zeros_like(sample_id), "modality": torch.full_like(sample_id, MODALITIES[self.modality])}
        columns = {name: values.to(device) for name, values in batch["columns"].items()}
        rows: Batch = {ACTS: dict(output), "sample_id": sample_id, **where, **kinds, **columns}
        return self._united(rows) if self.union else rows

    def _united(self, rows: Batch) -> Batch:
        """All rows of the first stream, then all of the other."""
        acts, n = list(rows[ACTS].values()), len(rows["sample_id"])
        if len({x.shape[1] for x in acts}) > 1:
            raise MmsaeError("union=true needs embeddings of one width.")
        joined = {name: torch.cat([v] * len(acts)) for name, v in rows.items() if name != ACTS}
        number = torch.arange(len(acts), device=acts[0].device).repeat_interleave(n)
        kinds = torch.tensor([MODALITIES[name] for name in self.names], device=number.device)
        return {**joined, ACTS: {UNION: torch.cat(acts)}, "stream": number, "modality": kinds[number]}

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """The stream of texts for some texts that belong to no pair, such as prompts, `[n, embed_dim]`."""
        other = self.inner.with_tower("text")
        items = [{"text": text, "sample_id": i} for i, text in enumerate(texts)]
        with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad():
            found = other.forward(other.collate(items))
        return normalize(found, dim=-1) if self.unit else found

    @property
    def prompts(self) -> Mapping[str, Sequence[str]]:
        """Name of a label to one text for each of its values."""
        return self.inner.prompts

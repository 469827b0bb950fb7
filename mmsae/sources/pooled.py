"""Both modalities of a multimodal model at once: a row per sample, the means of its picture's tokens and its words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmsae.errors import MmsaeError
from mmsae.hooks import HookPoint, capture, edit
from mmsae.sources.base import _ONE_AT_A_TIME, MODALITIES, Source, _finite, fingerprint
from mmsae.sources.lmm import VisionLanguage
from mmsae.sources.positions import pooled
from mmsae.spec import ACTS, Batch

Words = Literal["after", "ordinary"]
STREAMS = ("image", "text")


class PooledModalities(Source):
    """The mean over the image tokens and the mean over the words of a sample, as two streams of one row.

        source = PooledModalities(VisionLanguage("llava-hf/llava-1.5-7b-hf", ["model.language_model.layers.30"]))
        source.spec.streams                      # {"image": 4096, "text": 4096}

    What VL-SAE (arXiv 2510.21323) reads of a multimodal model. Rows carry `pair_id`: that of the item, or else its
    `sample_id`. The same hook point is read for training and shifted by an edit; published code reads the input of the
    layer and edits its output.

    Args:
        model: A multimodal model with one hook point in its language model.
        words: Which tokens are the words: all of them "after" the last image token, those of the template included
            (the paper's LLaVA); or the "ordinary" ones, wherever they stand, without delimiters (its Qwen2.5-VL).
    """

    modality = "other"

    def __init__(self, model: Source, words: Words = "after") -> None:
        if not isinstance(model, VisionLanguage):
            raise MmsaeError(f"{type(model).__name__} reads no pictures with words: give VisionLanguage.")
        if words not in ("after", "ordinary"):
            raise MmsaeError(f"words={words!r} is unknown; choose after or ordinary.")
        if model.sees or model.tokens != "all":
            where = f"tokens={model.tokens!r}" if model.tokens != "all" else f"the hook point {model.hook_points[0]!r}"
            raise MmsaeError(f"{where} leaves out the words: read all tokens of a layer of the language model.")
        super().__init__(list(model.hook_points), device=str(model.device))
        self.inner, self.words = model, words

    def load(self) -> nn.Module:
        """The model of the inner source."""
        return self.inner.model

    @property
    def model(self) -> nn.Module:
        """The model of the inner source."""
        return self.inner.model

    @property
    def points(self) -> list[HookPoint]:
        """The one point of the inner source."""
        if len(self.inner.points) != 1:
            names = ", ".join(point.name for point in self.inner.points)
            raise MmsaeError(f"PooledModalities pools one hook point, but there are {len(self.inner.points)}: {names}.")
        return self.inner.points

    @property
    def point(self) -> str:
        """Name of the hook point."""
        return self.points[0].name

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Those of the inner source."""
        return self.inner.tensors(items)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """As any source; the column `pair_id` is there for every item."""
        batch = super().collate(items)
        return {**batch, "columns": {"pair_id": batch["sample_id"], **batch["columns"]}}

    def forward(self, batch: dict[str, Any]) -> Any:
        """The output of the model."""
        return self.inner.forward(batch)

    def masks(self, ids: Tensor, attended: Tensor) -> dict[str, Tensor]:
        """Which positions each stream is the mean of, bool `[B, T]`.

        Args:
            ids: Tokens `[B, T]`, image tokens expanded.
            attended: Which of them are not padding `[B, T]`.
        """
        image = (ids == self.inner.image_id) & attended.bool()
        if self.words == "after":
            place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            last = place.masked_fill(~image, -1).amax(1, keepdim=True)
            return {"image": image, "text": (place > last) & (last >= 0) & attended.bool()}
        special = torch.tensor(sorted(self.inner.special), dtype=ids.dtype, device=ids.device)
        return {"image": image, "text": ~image & attended.bool() & ~torch.isin(ids, special)}

    def read(self, batch: dict[str, Any], gradients: bool = False) -> Batch:
        """One row per sample, with both streams, `pair_id` and the columns of the items."""
        if gradients:
            raise MmsaeError("PooledModalities gives no gradients: set data.gradients=false.")
        with _ONE_AT_A_TIME, torch.no_grad(), capture(self.model, self.points) as captured:
            self.forward(batch)
        return self._paired(captured[self.point], batch)

    def run(self, batch: dict[str, Any], also: Sequence[str] = ()) -> tuple[Batch, Any, dict[str, Tensor]]:
        """Rows, what `forward` returned, and the tensors at the further points."""
        points: list[HookPoint | str] = [*self.points, *also]
        with _ONE_AT_A_TIME, torch.no_grad(), capture(self.model, points, stop=False) as captured:
            output = self.forward(batch)
        further = {name: tensor for name, tensor in captured.items() if name != self.point}
        return self._paired(captured[self.point], batch), output, further

    @contextmanager
    def spliced(
        self, batch: dict[str, Any], replace: Mapping[str, Callable[[Tensor], Tensor]], also: Sequence[str] = ()
    ) -> Iterator[dict[str, Tensor]]:
        """Shift all positions of a stream so that its mean becomes what the function makes of it."""
        if also or not set(replace) <= set(STREAMS):
            raise MmsaeError(f"PooledModalities has the streams {' and '.join(STREAMS)} and no further hook points.")
        masks = self._masks(batch)

        def shift(x: Tensor) -> Tensor:
            x = x.clone()
            for name, change in replace.items():
                chosen = masks[name].to(x.device)
                mean = pooled(x, chosen)
                by = (change(mean) - mean).to(x.dtype)
                x += chosen[..., None] * by[:, None]
            return x

        with edit(self.model, {self.point: shift}):
            yield {}

    def outcomes(self, output: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Those of the inner source, on the assistant's words."""
        return self.inner.outcomes(output, batch)

    def predictions(self, output: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Those of the inner source."""
        return self.inner.predictions(output, batch)

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Those of the inner source."""
        return self.inner.kinds(batch, T)

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The picture beside its words."""
        return self.inner.render(item)

    def render_stream(self, item: dict[str, Any], stream: str) -> dict[str, Any]:
        """The picture alone, or the words alone."""
        shown = self.inner.render(item)
        if stream == "image":
            return {"kind": "image", "image": shown.get("image"), "text": shown.get("text", "")}
        return {"kind": "text", "tokens": shown["tokens"]}

    def example_items(self) -> list[dict[str, Any]]:
        """Those of the inner source."""
        return self.inner.example_items()

    def describe(self) -> dict[str, Any]:
        """That of the inner source, and which words."""
        return {**self.inner.describe(), "words": self.words}

    @property
    def identity(self) -> dict[str, Any]:
        """What a store has to know to be compared with another one."""
        own = {"weights": fingerprint(self.model), "modality": self.modality, "hook_points": [self.point]}
        return {"class": type(self).__name__, **self.describe(), **own, "positions": "mean"}

    def _masks(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        masks = self.masks(batch["input_ids"], batch["attention_mask"])
        for name, what in (("image", "no image token"), ("text", "no word for it")):
            if (lacking := ~masks[name].any(1)).any():
                which = int(batch["sample_id"][lacking.nonzero()[0, 0]])
                raise MmsaeError(f"item {which} has {what}: PooledModalities needs pictures with words in every item.")
        return masks

    def _paired(self, x: Tensor, batch: dict[str, Any]) -> Batch:
        masks = self._masks(batch)
        rows = {name: pooled(x, masks[name].to(x.device)) for name in STREAMS}
        sample_id = batch["sample_id"].to(x.device)
        _finite(rows, sample_id)
        nowhere = torch.full_like(sample_id, -1)
        where = dict.fromkeys(("position", "row", "column"), nowhere)
        kinds = {"kind": torch.zeros_like(sample_id), "modality": torch.full_like(sample_id, MODALITIES[self.modality])}
        columns = {name: values.to(x.device) for name, values in batch["columns"].items()}
        return {ACTS: rows, "sample_id": sample_id, **where, **kinds, **columns}

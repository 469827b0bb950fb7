"""What models of two towers have in common: a tower for each modality, one embedding space, zero-shot decisions."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from mmsae.errors import MmsaeError
from mmsae.sources.base import Source


class TwoTowers(Source):
    """A model with a tower for pictures or sounds and one for texts; `forward` gives the embedding of one of them.

    With `prompts` and labels the first tower decides zero-shot: that is its loss and its downstream measure.
    """

    towers: ClassVar[tuple[str, str]] = ("image", "text")
    tower: str
    prompts: Mapping[str, Sequence[str]]
    """Name of a label to one text for each of its values, in their order."""
    _other: Self | None = None

    def choose_tower(self, tower: str, prompts: Mapping[str, Sequence[str]] | None) -> None:
        """Set what the source reads, before `Source.__init__`."""
        if tower not in self.towers:
            raise MmsaeError(f"tower={tower!r} is unknown; choose {' or '.join(self.towers)}.")
        self.tower = self.modality = tower
        self.prompts = dict(prompts or {})
        self._prompts: dict[str, Tensor] = {}

    @abstractmethod
    def scale(self) -> Tensor:
        """What the model multiplies cosines by."""

    def with_tower(self, tower: str) -> Self:
        """The same model, for the inputs and the embeddings of another of its towers; its hook points stay behind."""
        if tower == self.tower:
            return self
        if self._other is None:
            model = self.model
            self._other = copy.copy(self)  # as for a data worker, without the weights
            self._other._model, self._other._points = model, self._points
            self._other.__dict__.pop("spec", None)
            self._other.tower = self._other.modality = tower
            self._other._other = self
        return self._other

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings of texts `[n, embed_dim]`, without gradients."""
        other = self.with_tower("text")
        items = [{"text": text, "sample_id": i} for i, text in enumerate(texts)]
        with torch.inference_mode(False), torch.no_grad():
            return normalize(other.forward(other.collate(items)).float(), dim=-1)

    @torch.no_grad()
    def generate(
        self, items: list[dict[str, Any]], prompts: Mapping[str, Sequence[str]] | None = None, **settings: Any
    ) -> list[dict[str, Any]]:
        """The zero-shot posterior of every label that has prompts.

        Args:
            items: For the first tower.
            prompts: Name of a label to one text for each value, instead of the source's own.
            settings: Not used.
        """
        own = prompts is None
        chosen = self.prompts if prompts is None else prompts
        if not chosen or self.tower == "text":
            raise MmsaeError(
                f"{type(self).__name__} decides between texts: set tower={self.towers[0]} and prompts of the source."
            )
        embedded = {label: self._embedded(label) if own else self.embed_texts(t) for label, t in chosen.items()}
        x = normalize(self.forward(self.collate(items)).float(), dim=-1)
        scale = self.scale().float().to(x)
        found = {label: (scale * x @ e.to(x).T).softmax(-1).cpu() for label, e in embedded.items()}
        return [{"posterior": {label: rows[i] for label, rows in found.items()}} for i in range(len(items))]

    def _embedded(self, label: str) -> Tensor:
        """Unit embeddings of the prompts of a label, made once."""
        if label not in self._prompts:
            self._prompts[label] = self.embed_texts(self.prompts[label])
        return self._prompts[label]

    def outcomes(self, output: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`accuracy_<factor>` (0 or 1): is the prompt nearest to the input the true one? NaN without a label."""
        return {
            f"accuracy_{factor}": (logits.argmax(1) == truth).float().where(truth >= 0, torch.nan)
            for factor, (logits, truth) in self.zero_shot(output, batch).items()
        }

    def predictions(self, output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Similarities to the prompts of all factors, one row for each input and labelled factor."""
        found = list(self.zero_shot(output, batch).values())
        if not found:
            known = ", ".join(self.prompts) or "no label"
            raise MmsaeError(
                f"{type(self).__name__} has a loss on items with labels that have prompts only (it has prompts for "
                f"{known}): set tower={self.towers[0]}, prompts, and a data set with labels."
            )
        widest = max(logits.shape[1] for logits, _ in found)
        padded = [pad(logits, (0, widest - logits.shape[1]), value=-1e4) for logits, _ in found]
        return torch.cat(padded), torch.cat([truth for _, truth in found])

    def zero_shot(self, output: Tensor, batch: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each labelled factor with prompts the logits of its prompts `[B, n_values]`, and the truth `[B]`."""
        if self.tower == "text":
            return {}
        found = {}
        for factor, texts in self.prompts.items():
            truth = batch["columns"].get(f"label.{factor}")
            if truth is None:
                continue
            if int(truth.max()) >= len(texts):
                raise MmsaeError(f"the label {factor}={int(truth.max())} has no prompt: there are {len(texts)}.")
            logits = self.scale() * normalize(output, dim=-1) @ self._embedded(factor).to(output).T
            found[factor] = (logits, truth.to(output.device))
        return found

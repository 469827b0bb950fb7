"""What a labelled data set gives to steer by: latents and directions for a value, and contexts to measure in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from tqdm.auto import tqdm

from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError, nearest
from mmsae.latents import LatentStore
from mmsae.sources import CausalLM, VisionLanguage
from mmsae.spec import ACTS, Batch, rows_of
from mmsae.steering.directions import difference_in_means, probe_direction
from mmsae.steering.edits import AddVector
from mmsae.steering.readouts import PosteriorReadout, Probe, Readout, deciding
from mmsae.steering.select import Selection, matched_random, mean_difference, quantiles
from mmsae.steering.select import nearest as nearest_rows
from mmsae.steering.sweep import Make
from mmsae.steering.word_readouts import AnswerReadout, ContinuationReadout

RELATED = 0.1
"""Labels with more normalised mutual information than this follow from one another, and so are no collateral."""
DIRECTION_ROWS = 8192


@dataclass
class Layer:
    """A dictionary and the activations of its hook point.

    Attributes:
        name: Its hook point.
        core: The dictionary.
        latents: Codes of the split that latents are chosen on.
        held_out: Codes of another split.
        x: Some activations of the first split `[n, d]`, and where each comes from among its rows.
        at: Rows of `x` in `latents`, int64 `[n]`.
        choices: Made already.
    """

    name: str
    core: SAECore
    latents: LatentStore
    held_out: LatentStore
    x: Tensor
    at: np.ndarray
    choices: dict[Any, tuple[Selection, Tensor]] = field(default_factory=dict)

    @cached_property
    def scale(self) -> Tensor:
        """Unit of strengths: the 99th percentile of each latent's codes."""
        return quantiles(self.latents)

    @cached_property
    def rows(self) -> Tensor:
        """Decoder rows."""
        own = getattr(self.core, "dictionaries", {})
        return own.get(self.name, self.core.dictionary).detach()

    def choose(
        self, label: str, value: int, n: int, seed: int, toward: Tensor | None = None
    ) -> tuple[Selection, Tensor]:
        """Latents for a value, and as many that fire about as often.

        Args:
            label: With values.
            value: Its number.
            n: How many.
            seed: Of the control.
            toward: Take the live latents whose decoder rows point most in this direction, `[d]`; None those that tell
                the value from the others.
        """
        key = (label, value, n, seed, toward is not None)
        if key in self.choices:
            return self.choices[key]
        if toward is None:
            selection = mean_difference(self.latents, self.latents.labels()[label] == value, n=n)
        else:
            selection = nearest_rows(self.rows * (self.scale > 0).to(self.rows)[:, None], toward.to(self.rows), n)
        live = self.scale[selection.ids] > 0
        if not live.all():
            raise MmsaeError(f"only {int(live.sum())} latents of {self.name} fire in the data, fewer than {n}.")
        self.choices[key] = selection, matched_random(self.latents, selection.ids, self.rows, 1, seed)[:, 0]
        return self.choices[key]

    def directions(self, label: str, value: int, like: Selection) -> dict[str, Make]:
        """Difference of means and probe; a strength of 1 moves as far as one of the chosen latents, on average."""
        positive = torch.as_tensor(self.latents.columns[f"label.{label}"][self.at] == value)
        length = float((self.scale[like.ids] * self.rows[like.ids].norm(dim=-1).cpu()).mean())
        found = {
            "difference of means": difference_in_means(self.x, positive),
            "probe": probe_direction(self.x, positive),
        }
        return {
            name: (lambda strength, v=v: AddVector(v, strength * length / float(v.norm())))  # type: ignore[misc]
            for name, v in found.items()
        }


def read_layers(data: Any, cores: Mapping[str, SAECore], split: str, max_rows: int) -> list[Layer]:
    """Codes and activations of all dictionaries, from one pass over a split and one over the test split.

    Args:
        data: Datamodule whose source reads all their hook points.
        cores: By their hook points.
        split: To choose latents on.
        max_rows: Activation rows of each split.
    """
    chosen, other = (_gathered(data, name, max_rows) for name in (split, "test"))
    n = sum(map(rows_of, chosen))
    at = np.sort(np.random.default_rng(0).permutation(n)[:DIRECTION_ROWS])
    layers = []
    for point, core in cores.items():
        parts = [[_named(batch, point, core) for batch in part] for part in (chosen, other)]
        x = torch.cat([core.inputs(batch).float() for batch in parts[0]])[torch.as_tensor(at)]
        stores = [LatentStore.build(core, part, max_rows, n) for part, n in zip(parts, (split, "test"), strict=True)]
        layers.append(Layer(point, core, stores[0], stores[1], x, at))
    return layers


def _named(batch: Batch, hook_point: str, core: SAECore) -> Batch:
    """The stream of a hook point under the name that a dictionary, perhaps of another library, has for it."""
    return {**batch, ACTS: {**batch[ACTS], core.spec.input: batch[ACTS][hook_point]}}


def _gathered(data: Any, split: str, max_rows: int) -> list[Batch]:
    found, n = [], 0
    for batch in tqdm(data.rows(split), desc=f"reading {split}", leave=False, disable=None):
        found.append(batch)
        n += rows_of(batch)
        if n >= max_rows:
            break
    return found


def unrelated(latents: LatentStore, label: str, known: Sequence[str]) -> list[str]:
    """Labels that do not follow from one."""
    labels = latents.labels()
    mine = labels[label]
    return [
        name
        for name in known
        if name != label and name in labels and normalized_mutual_info_score(mine, labels[name]) < RELATED
    ]


class Contexts:
    """Items of a test split, and what is measured in them for a value.

    Args:
        data: Datamodule with a source.
        label: What is steered.
        others: Labels that should not change.
        n: Contexts, of which half choose and half measure; for models that decide or answer, those whose value is
            another.
        seed: Of sampled continuations.
        words: Words that tell a value in texts, instead of those of the data; by value.
        n_samples: Continuations of each prompt.
        max_new_tokens: Tokens of each.
        n_probe: Training items for the probe, of models that do not decide.
    """

    def __init__(
        self,
        data: Any,
        label: str,
        others: Sequence[str],
        n: int = 100,
        seed: int = 0,
        words: Mapping[str, Sequence[str]] | None = None,
        n_samples: int = 2,
        max_new_tokens: int = 24,
        n_probe: int = 1000,
    ) -> None:
        self.data, self.label, self.others, self.n, self.seed = data, label, list(others), n, seed
        self.words = dict(words or {})
        self.n_samples, self.max_new_tokens, self.n_probe = n_samples, max_new_tokens, n_probe
        self.names = {name: list(values) for name, values in data.value_names.items()}
        if label not in self.names:
            raise MmsaeError(f"the data have no label {label!r}; nearest: {nearest(label, self.names)}.")

    def readout(self, value: int) -> Readout:
        """For a value of the label."""
        source = self.data.source
        if writes(source):
            return self._continuation(value)
        if isinstance(source, VisionLanguage):
            return self._answer(value)
        items = self._items(value)
        others = [name for name in self.others if name in self.decider[1]]
        return PosteriorReadout(self.decider[0], items, self.label, value, others, self.names[self.label])

    @cached_property
    def decider(self) -> tuple[Any, list[str]]:
        """What decides about labels, and about which."""
        source = self.data.source
        prompts = getattr(source, "prompts", None)
        if prompts:
            return deciding(source), list(prompts)
        if getattr(source, "task", None) == "classification":
            return deciding(source), ["class"]
        train = self.data.items("train")
        items = [train[i] for i in range(min(self.n_probe, len(train)))]
        labels = [self.label, *self.others]
        return Probe(source, items, labels), labels

    def toward(self, value: int) -> Tensor:
        """Output embedding of the words of a value, less the mean of all: what a latent that says them has to write."""
        if not writes(self.data.source):
            raise MmsaeError(f"{type(self.data.source).__name__} has no output words: choose latents by difference.")
        source = self.data.source
        table = source.model.get_output_embeddings().weight.detach().float().cpu()
        words = self.telling(self.label, value)
        ids = [source.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]
        return table[ids].mean(0) - table.mean(0)

    def _items(self, value: int | None) -> list[dict[str, Any]]:
        test = self.data.items("test")
        found = []
        for i in range(len(test)):
            item = test[i]
            if value is None or item.get("labels", {}).get(self.label, -1) not in (value, -1):
                found.append(item)
            if len(found) == self.n:
                return found
        if len(found) < 4:
            raise MmsaeError(
                f"the test split has {len(found)} items of another {self.label}; a bench needs at least 4."
            )
        return found

    def _continuation(self, value: int) -> Readout:
        items = self._items(None)
        prompts = [{"text": opening(str(item.get("text", ""))), "sample_id": item["sample_id"]} for item in items]
        facts = [
            self._contradictions(p["text"], item.get("labels", {})) for p, item in zip(prompts, items, strict=True)
        ]
        return ContinuationReadout(
            self.data.source, prompts, self.telling(self.label, value), facts, self.n_samples, self.max_new_tokens,
            seed=self.seed,
        )  # fmt: skip

    def telling(self, label: str, value: int) -> list[str]:
        """Words that tell a value."""
        name = self.names[label][value]
        said = getattr(self.data, "said", {}).get(label)
        return list(self.words.get(name) or (said[value] if said else (name,)))

    def _contradictions(self, text: str, labels: Mapping[str, int]) -> list[str]:
        """Words of other values than those that a prompt states."""
        found: list[str] = []
        for label in self.others:
            if label in labels and any(re.search(rf"\b{re.escape(w)}\b", text, re.I) for w in self._of(label, labels)):
                values = range(len(self.names[label]))
                found += [word for v in values if v != labels[label] for word in self.telling(label, v)]
        return found

    def _of(self, label: str, labels: Mapping[str, int]) -> list[str]:
        return self.telling(label, labels[label])

    def _answer(self, value: int) -> Readout:
        questions = getattr(self.data, "questions", {})
        if self.label not in questions:
            raise MmsaeError(
                f"nobody knows how to ask about {self.label!r}: the data need questions= for it; they have them for "
                f"{', '.join(questions) or 'no label'}."
            )
        question, answers = questions[self.label]
        others = [questions[name][0] for name in self.others if name in questions]
        return AnswerReadout(self.data.source, self._items(value), question, answers[value], others)


def writes(source: Any) -> bool:
    """Whether a model goes on with texts, which a judge can rate."""
    return isinstance(source, CausalLM)


def opening(text: str) -> str:
    """The first sentence of a text; its first half if it has only one."""
    first = re.match(r".*?[.!?](?=\s)", text, re.S)
    if first:
        return first[0]
    words = text.split()
    if len(words) < 2:
        raise MmsaeError(f"the text {text!r} is too short to begin with and go on from.")
    return " ".join(words[: len(words) // 2])

"""What steering is measured by: the effect that is wanted, and what should have stayed the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.errors import MmsaeError, checked

Steered = Callable[[], AbstractContextManager[None]]
"""Opens a context in which the model is steered."""
Decide = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]
"""From items to the posterior of each label, `[n, n_values]`."""


class Measured(NamedTuple):
    """One entry for each context, see `DoseResponse`."""

    effect: np.ndarray
    success: np.ndarray
    damage: np.ndarray
    changed: np.ndarray
    shown: list[str]


class Readout(ABC):
    """Some contexts, and what is measured in them.

    Attributes:
        groups: Which contexts belong together (the same document, picture, patient), int64 `[n]`.
    """

    groups: np.ndarray

    @abstractmethod
    def measure(self, steered: Steered = nullcontext) -> Measured:
        """Run the model on all contexts.

        Args:
            steered: Opens a context in which the model is steered; what is measured against the model as it is, is run
                outside it.
        """


class PosteriorReadout(Readout):
    """The probability that a model, or a probe on it, gives to a value; the other labels should keep theirs.

    Effect: `p(target)`. Damage: mean over the other labels of the divergence, in nats, from the posterior without
    steering to that with it. Changed: share of them of which another value is the likeliest now.

    Args:
        decide: From items to posteriors: `deciding(source)`, or a `Probe`.
        items: Contexts; their `sample_id` is their group.
        label: What is steered.
        target: Number of the value that is wanted.
        others: Labels that should not change.
        names: Names of the values, to show them.
        batch_size: Contexts at a time.
    """

    def __init__(
        self,
        decide: Decide,
        items: Sequence[dict[str, Any]],
        label: str,
        target: int,
        others: Sequence[str] = (),
        names: Sequence[str] | None = None,
        batch_size: int = 64,
    ) -> None:
        if not items:
            raise MmsaeError("a readout needs at least one context.")
        self.decide, self.items, self.label, self.target = decide, list(items), label, int(target)
        self.others, self.names, self.batch_size = list(others), names, checked("batch_size", batch_size, 1)
        self.groups = np.array([int(item["sample_id"]) for item in items])
        self.clean: dict[str, Tensor] | None = None

    def measure(self, steered: Steered = nullcontext) -> Measured:
        """See `Readout`."""
        if self.clean is None:
            self.clean = self._decided()
            self._check(self.clean)
        with steered():
            now = self._decided()
        mine = now[self.label].double()
        damage, changed = np.zeros(len(self.items)), np.full(len(self.items), np.nan)
        if self.others:
            apart = [divergence(self.clean[other], now[other]) for other in self.others]
            moved = [(self.clean[other].argmax(1) != now[other].argmax(1)).double() for other in self.others]
            damage, changed = (torch.stack(of).mean(0).numpy() for of in (apart, moved))
        likeliest = mine.argmax(1)
        shown = [str(int(i)) if self.names is None else self.names[int(i)] for i in likeliest[:8]]
        effect = mine[:, self.target].numpy()
        return Measured(effect, (likeliest == self.target).double().numpy(), damage, changed, shown)

    def _decided(self) -> dict[str, Tensor]:
        parts = [self.decide(self.items[i : i + self.batch_size]) for i in range(0, len(self.items), self.batch_size)]
        return {label: torch.cat([part[label] for part in parts]).cpu() for label in parts[0]}

    def _check(self, found: Mapping[str, Tensor]) -> None:
        for label in (self.label, *self.others):
            if label not in found:
                raise MmsaeError(f"nothing decides about the label {label!r}; there are {', '.join(found)}.")
        if not 0 <= self.target < found[self.label].shape[1]:
            raise MmsaeError(f"{self.label} has {found[self.label].shape[1]} values, so none of number {self.target}.")


def deciding(source: Any, **settings: Any) -> Decide:
    """The posteriors of a source that decides by itself: zero-shot, or a classifier."""

    def decide(items: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        found = [one["posterior"] for one in source.generate(items, **settings)]
        return {label: torch.stack([one[label] for one in found]) for label in found[0]}

    return decide


class Probe:
    """Logistic regressions on the output of a model, for models that decide nothing: mean over positions, standardised.

    Args:
        source: Whose output is read.
        items: With labels.
        labels: Which of them to learn.
        batch_size: Items at a time.
        regularisation: scikit-learn's `C`.
    """

    def __init__(
        self,
        source: Any,
        items: Sequence[dict[str, Any]],
        labels: Sequence[str],
        batch_size: int = 64,
        regularisation: float = 1.0,
    ) -> None:
        from sklearn.linear_model import LogisticRegression

        self.source, self.batch_size = source, checked("batch_size", batch_size, 1)
        x = torch.cat([self._read(list(items[i : i + batch_size])) for i in range(0, len(items), batch_size)])
        self.mean, self.spread = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
        self.probes = {}
        for label in labels:
            y = np.array([item.get("labels", {}).get(label, -1) for item in items])
            known = y >= 0
            if len(np.unique(y[known])) < 2:
                raise MmsaeError(f"a probe for {label!r} needs items with at least two of its values.")
            fitted = LogisticRegression(C=regularisation, max_iter=2000)
            fitted.fit(((x - self.mean) / self.spread).numpy()[known], y[known])
            self.probes[label] = fitted

    def __call__(self, items: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        """Posteriors of each label, 0 for values that no item had."""
        x = ((self._read(items) - self.mean) / self.spread).numpy()
        found = {}
        for label, probe in self.probes.items():
            full = torch.zeros(len(items), int(probe.classes_.max()) + 1, dtype=torch.float64)
            full[:, torch.as_tensor(probe.classes_)] = torch.from_numpy(probe.predict_proba(x)).double()
            found[label] = full
        return found

    @torch.no_grad()
    def _read(self, items: list[dict[str, Any]]) -> Tensor:
        output = self.source.forward(self.source.collate(items))
        if not isinstance(output, Tensor) or output.dim() not in (2, 3):
            raise MmsaeError(
                f"{type(self.source).__name__} returns no vectors for its items, so no probe can be fitted on them."
            )
        return (output if output.dim() == 2 else output.mean(1)).float().cpu()


def divergence(clean: Tensor, now: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats from posteriors to others, `[n]` from `[n, n_values]`."""
    p, q = clean.double().clamp_min(1e-12), now.double().clamp_min(1e-12)
    return (p * (p / q).log()).sum(-1).clamp_min(0)

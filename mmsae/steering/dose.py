"""Dose and response: what a strength achieves, what it costs, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mmsae.errors import MmsaeError, checked

FLOOR = 1e-3
"""Least value of a part of the score: a harmonic mean is 0 as soon as one part is."""


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


class Window(NamedTuple):
    """Strengths that are usable: neighbours of the best one with at least 0.8 of its score.

    Attributes:
        low: Smallest one, interpolated on a logarithmic scale.
        high: Largest one.
        octaves: `log2(high / low)`.
        closed: Whether the score falls off on both sides within the grid; else the window is at least so wide.
    """

    low: float
    high: float
    octaves: float
    closed: bool


def score(effect: np.ndarray | float, damage: np.ndarray | float) -> np.ndarray:
    """Harmonic mean of the effect (0 to 1) and of `exp(-damage)` (damage in nats), each at least 0.001."""
    kept = np.exp(-np.maximum(damage, 0))
    a, b = np.clip(effect, FLOOR, 1), np.clip(kept, FLOOR, 1)
    return 2 * a * b / (a + b)


def resamples(groups: np.ndarray, n: int = 1000, seed: int = 0) -> np.ndarray:
    """Weights of contexts in bootstrap resamples of their groups, rows that sum to 1, `[n, contexts]`."""
    ids, place = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=n)
    weights = drawn[:, place].astype(np.float64)
    return weights / weights.sum(1, keepdims=True)


def interval(values: np.ndarray, groups: np.ndarray, n: int = 1000, seed: int = 0) -> Interval:
    """Mean of one value for each context, and its bootstrap over groups."""
    drawn = resamples(groups, n, seed) @ values
    return Interval(float(values.mean()), *(float(q) for q in np.quantile(drawn, (0.025, 0.975))))


@dataclass
class DoseResponse:
    """Responses of some contexts to some strengths of one edit.

    Attributes:
        strengths: Ascending, `[A]`; 0 is no edit.
        effect: How much of what is wanted, 0 to 1, `[A, n]`.
        success: Whether it is what the model decides for, or writes, 0 to 1, `[A, n]`.
        damage: Nats by which what should stay the same has changed, `[A, n]`.
        changed: Share of the other decisions that are others now, `[A, n]`; NaN where there are none.
        groups: Which contexts belong together, for intervals, `[n]`.
        spread: Other latents whose mean changes by more than a standard deviation, for each strength; None: unknown.
        shown: A few answers or texts for each strength.
    """

    strengths: list[float]
    effect: np.ndarray
    success: np.ndarray
    damage: np.ndarray
    changed: np.ndarray
    groups: np.ndarray
    spread: list[int | None] = field(default_factory=list)
    shown: list[list[str]] = field(default_factory=list)

    def scores(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """Score of each strength over all or some contexts (bool `[n]`)."""
        chosen = np.ones(len(self.groups), bool) if chosen is None else chosen
        return score(self.effect[:, chosen].mean(1), self.damage[:, chosen].mean(1))

    def best(self, chosen: np.ndarray | None = None) -> int:
        """Which strength has the best score."""
        return int(np.argmax(self.scores(chosen)))

    def interval(self, at: int, chosen: np.ndarray | None = None, n: int = 1000, seed: int = 0) -> Interval:
        """Score at a strength, with its bootstrap over groups."""
        chosen = np.ones(len(self.groups), bool) if chosen is None else chosen
        drawn = self.resampled(at, resamples(self.groups[chosen], n, seed), chosen)
        return Interval(float(self.scores(chosen)[at]), *(float(q) for q in np.quantile(drawn, (0.025, 0.975))))

    def resampled(self, at: int, weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Scores of bootstrap resamples, `[len(weights)]`."""
        return score(weights @ self.effect[at, chosen], weights @ self.damage[at, chosen])

    def variation(self, at: int, chosen: np.ndarray | None = None) -> float:
        """Coefficient of variation of the effect over contexts; NaN without any effect."""
        effect = self.effect[at] if chosen is None else self.effect[at, chosen]
        return float(effect.std() / effect.mean()) if effect.mean() > 0 else float("nan")

    def window(self, share: float = 0.8, chosen: np.ndarray | None = None) -> Window:
        """Usable strengths around the best one.

        Args:
            share: Of the best score.
            chosen: Some contexts.
        """
        checked("share", share, 0, 1)
        strengths = np.asarray(self.strengths)
        positive = strengths > 0
        if positive.sum() < 2:
            raise MmsaeError("a window of strengths needs at least two strengths above 0.")
        x, y = np.log2(strengths[positive]), self.scores(chosen)[positive]
        top = int(np.argmax(y))
        least = share * y[top]

        def edge(step: int) -> tuple[float, bool]:
            i = top
            while 0 <= i + step < len(x):
                if y[i + step] < least:
                    return float(x[i] + (x[i + step] - x[i]) * (y[i] - least) / (y[i] - y[i + step])), True
                i += step
            return float(x[i]), False

        (low, below), (high, above) = edge(-1), edge(1)
        return Window(2**low, 2**high, high - low, below and above)

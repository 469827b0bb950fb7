"""How far a latent means what it is chosen for: near misses and neighbours (arXiv 2601.03047).

*When the Coffee Feature Activates on Coffins* reports that steering depends on layer, strength and context, and that
similar features are hard to tell apart. No procedure is public; these measures are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from mmsae.errors import MmsaeError
from mmsae.latents import LatentStore


class Confounded(NamedTuple):
    """How well a latent tells a value from others.

    Attributes:
        auroc: From all other samples.
        near: From samples of the near misses.
        misses: Numbers of these values.
    """

    auroc: float
    near: float
    misses: list[int]


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive sample has the larger value; ties count half."""
    if not len(positive) or not len(negative):
        return float("nan")
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def confounded(
    latents: LatentStore, latent: int, labels: np.ndarray, value: int, misses: Sequence[int] | None = None
) -> Confounded:
    """AUROC of a latent's strongest code in a sample, against all other values and against near misses.

    Args:
        latents: Codes of samples that the latent was not chosen by.
        latent: Its number.
        labels: Value of each sample, in the order of `latents.samples`; -1 where unknown.
        value: That the latent is for.
        misses: Values that look alike; by default the one whose samples make the latent strongest on average in the
            first half of the samples. Only the second half is measured.
    """
    if len(labels) != len(latents.samples[0]):
        raise MmsaeError(f"{len(labels)} labels do not fit {len(latents.samples[0])} samples.")
    pooled = latents.pool(latent, latent + 1)[:, 0]
    second = np.arange(len(labels)) % 2 == 1
    if misses is None:
        others = [v for v in np.unique(labels) if v >= 0 and v != value]
        strength = [pooled[(labels == v) & ~second].mean() for v in others]
        misses = [int(others[int(np.argmax(strength))])]
    positive = pooled[(labels == value) & second]
    rest = pooled[(labels != value) & (labels >= 0) & second]
    return Confounded(auroc(positive, rest), auroc(positive, pooled[np.isin(labels, misses) & second]), list(misses))


def confusion(latents: LatentStore, ids: Sequence[int], labels: np.ndarray) -> np.ndarray:
    """Mean strongest code of latent i in samples of value k, rows that sum to 1, `[len(ids), n_values]`.

    Args:
        latents: Codes of samples.
        ids: The latent chosen for each value, in their order.
        labels: Value of each sample; -1 where unknown.
    """
    pooled = np.stack([np.abs(latents.pool(i, i + 1)[:, 0]) for i in ids])
    means = np.stack([pooled[:, labels == k].mean(1) if (labels == k).any() else np.zeros(len(ids)) for k in
                      range(len(ids))], 1)  # fmt: skip
    return means / np.maximum(means.sum(1, keepdims=True), 1e-12)


def diagonal_mass(matrix: np.ndarray) -> float:
    """Mean of the diagonal of a confusion whose rows sum to 1; `1 / n_values` is chance."""
    return float(np.diag(matrix).mean())

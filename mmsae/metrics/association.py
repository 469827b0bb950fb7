"""Do the latents of the words go with the latents of the picture, when no latent is both?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGES = (0.5, 2.0, 8.0)
"""Weights of the identity in the covariances of standardised columns that are tried."""
STRONGEST = 0.95  # correlations above are taken for this


class Canonical(NamedTuple):
    """Pairs of directions, one in each set of columns, whose projections are correlated.

    Attributes:
        means: Of the columns of both sets.
        maps: From columns less their mean to projections of variance about 1.
        correlations: `[r]`, descending.
    """

    means: tuple[Tensor, Tensor]
    maps: tuple[Tensor, Tensor]
    correlations: Tensor

    def score(self, text: Tensor, image: Tensor) -> Tensor:
        """Logarithm of how much likelier both are as a pair than apart, were projections Gaussian, `[n]`."""
        p, q = ((x - mean) @ by for x, mean, by in zip((text, image), self.means, self.maps, strict=True))
        r = self.correlations
        together = (2 * r * p * q - r**2 * (p**2 + q**2)) / (1 - r**2) - (1 - r**2).log()
        return together.sum(1) / 2


def canonical(text: Tensor, image: Tensor, ridge: float, n_directions: int = 64) -> Canonical:
    """Canonical correlations of two sets of columns, regularised.

    Args:
        text: `[n, a]`.
        image: `[n, b]`.
        ridge: Weight of the identity in the covariances of standardised columns.
        n_directions: Most pairs of directions.
    """
    means, standard, white = [], [], []
    for x in (text, image):
        deviation = x.std(0)
        scale = torch.where(deviation > 1e-6, 1 / deviation, 0)  # what never changes says nothing
        means.append(x.mean(0))
        standard.append((x - means[-1]) * scale)
        eye = torch.eye(x.shape[1], dtype=x.dtype)
        values, vectors = torch.linalg.eigh(standard[-1].t() @ standard[-1] / len(x) + ridge * eye)
        white.append(scale[:, None] * (vectors * values.rsqrt()) @ vectors.t())
    cross = white[0].t() @ ((text - means[0]).t() @ (image - means[1]) / len(text)) @ white[1]
    u, s, v = torch.linalg.svd(cross, full_matrices=False)
    u, s, v = u[:, :n_directions], s[:n_directions].clamp_max(STRONGEST), v[:n_directions]
    return Canonical((means[0], means[1]), (white[0] @ u, white[1] @ v.t()), s)


def association(text: Tensor, image: Tensor, folds: int = 5, seed: int = 0) -> Tensor:
    """How well the latents of the words of each sample go with those of its picture.

    Learnt from the samples themselves, each scored by what was learnt from the others; samples whose words and picture
    do not belong together may be among them, as long as they do not mislead in the same way. The ridge is the one that
    tells given pairs best from pairs of other samples.

    Args:
        text: How often each latent fires on the words of a sample, `[n, a]`.
        image: On its picture, `[n, b]`.
        folds: Parts, each scored by what was learnt from the others.
        seed: Of the parts.

    Returns:
        `[n]`, the higher the better; 0 for all where there are fewer than two samples for each part, or no
        latents.
    """
    n = len(text)
    if n < 2 * folds or not text.shape[1] or not image.shape[1]:
        return torch.zeros(n)
    text, image = text.double(), image.double()
    fold = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % folds
    scores, others = torch.zeros(len(RIDGES), n), torch.zeros(len(RIDGES), n)
    for part in range(folds):
        own = (fold == part).nonzero()[:, 0]
        rest = fold != part
        for i, ridge in enumerate(RIDGES):
            found = canonical(text[rest], image[rest], ridge)
            scores[i, own] = found.score(text[own], image[own]).float()
            others[i, own] = found.score(text[own], image[own.roll(1)]).float()
    told = torch.searchsorted(others.sort(1).values, scores).double().mean(1)  # AUROC of given pairs, times n
    return scores[int(told.argmax())]

"""Which latents to steer with, how strongly, and which others to compare them with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import false_discovery_control, ttest_ind
from torch import Tensor

from mmsae.errors import MmsaeError, checked
from mmsae.latents import LatentStore

CHUNK = 1024


@dataclass(frozen=True)
class Selection:
    """Some latents, best first.

    Attributes:
        ids: int64 `[n]`.
        score: What they were chosen by, `[n]`.
        pvalue: Adjusted for the choice among all latents (Benjamini and Hochberg); None where nothing was tested.
    """

    ids: Tensor
    score: Tensor
    pvalue: Tensor | None = None


def quantiles(latents: LatentStore, q: float = 0.99) -> Tensor:
    """Quantile of the magnitudes of each latent's codes that are not 0, `[d_latent]`: the unit of strengths; 0 if none.

    The maximum, which AxBench uses, rests on a single row.
    """
    checked("q", q, 0, 1)
    found = torch.zeros(latents.d_latent)
    for i in np.flatnonzero(latents.firings):
        found[i] = float(np.quantile(np.abs(latents.of_latent(int(i))[1]), q))
    return found


def means(latents: LatentStore, rows: np.ndarray | None = None) -> Tensor:
    """Mean code of each latent `[d_latent]`, over all rows or over those chosen by a bool mask `[n_rows]`."""
    chosen = latents.codes if rows is None else latents.codes.tocsr()[np.flatnonzero(rows)]
    return torch.as_tensor(np.asarray(chosen.mean(0))[0], dtype=torch.float32)


def mean_difference(
    latents: LatentStore, positive: np.ndarray, negative: np.ndarray | None = None, n: int = 1
) -> Selection:
    """Latents whose strongest code in a sample is larger for some samples than for others, by standard deviations.

    Args:
        latents: Codes of a data set.
        positive: bool `[n_samples]`, in the order of `latents.samples`.
        negative: Those to compare with; by default all others.
        n: How many to give.
    """
    positive, negative = _groups(latents, positive, negative)
    score, pvalue = np.empty(latents.d_latent), np.empty(latents.d_latent)
    for first in range(0, latents.d_latent, CHUNK):
        last = min(first + CHUNK, latents.d_latent)
        pooled = latents.pool(first, last).astype(np.float64)
        # what varies by less than a thousandth is noise of the arithmetic: such latents fire at every start token
        least = 1e-3 * np.abs(pooled).max(0)
        a, b = pooled[positive], pooled[negative]
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Precision loss")
            test = ttest_ind(a, b, equal_var=False)
        spread = np.maximum(np.sqrt((a.var(0) + b.var(0)) / 2), np.maximum(least, 1e-12))
        score[first:last] = (a.mean(0) - b.mean(0)) / spread
        pvalue[first:last] = np.where(pooled.std(0) > least, np.nan_to_num(test.pvalue, nan=1.0), 1.0)
    return _best(score, pvalue, n)


def frequency_difference(
    latents: LatentStore, positive: np.ndarray, negative: np.ndarray | None = None, n: int = 1, min_effect: float = 0.0
) -> Selection:
    """Latents that fire in a larger share of some samples than of others.

    Args:
        latents: Codes of a data set.
        positive: bool `[n_samples]`, in the order of `latents.samples`.
        negative: Those to compare with; by default all others.
        n: How many to give at most.
        min_effect: Smallest difference of shares.
    """
    positive, negative = _groups(latents, positive, negative)
    difference, pvalue = np.empty(latents.d_latent), np.empty(latents.d_latent)
    for first in range(0, latents.d_latent, CHUNK):
        last = min(first + CHUNK, latents.d_latent)
        fired = (latents.pool(first, last) != 0).astype(np.float64)
        a, b = fired[positive], fired[negative]
        difference[first:last] = a.mean(0) - b.mean(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            pvalue[first:last] = np.nan_to_num(ttest_ind(a, b, equal_var=False).pvalue, nan=1.0)
    found = _best(difference, pvalue, n)
    kept = found.score >= min_effect
    assert found.pvalue is not None
    return Selection(found.ids[kept], found.score[kept], found.pvalue[kept])


def nearest(rows: Tensor, vector: Tensor, n: int = 1) -> Selection:
    """Latents whose decoder row points most in the direction of a vector, by cosine.

    Args:
        rows: Decoder rows `[d_latent, d]`.
        vector: `[d]`: the embedding of a text, a difference of means, a probe.
        n: How many to give.
    """
    cosine = torch.nn.functional.cosine_similarity(rows.float(), vector.float()[None], dim=-1)
    score, ids = cosine.topk(min(n, len(cosine)))
    return Selection(ids, score)


def matched_random(
    latents: LatentStore, ids: Sequence[int] | Tensor, rows: Tensor, n: int = 1, seed: int = 0
) -> Tensor:
    """For each latent `n` others that fire about as often and have decoder rows about as long: the control of a choice.

    Args:
        latents: Codes of a data set.
        ids: The chosen latents.
        rows: Decoder rows `[d_latent, d]`.
        n: Controls for each.
        seed: Of the choice among the nearest twenty.

    Returns:
        int64 `[len(ids), n]`; no chosen latent is among them.
    """
    chosen = torch.as_tensor(ids).reshape(-1).long()
    frequency = torch.as_tensor(latents.density, dtype=torch.float64).clamp_min(1e-9).log()
    length = rows.double().norm(dim=-1).clamp_min(1e-9).log().cpu()
    live = torch.as_tensor(latents.firings > 0)
    live[chosen] = False
    others = live.nonzero()[:, 0]
    if len(others) < n:
        raise MmsaeError(f"only {len(others)} other latents fire, too few for {n} controls.")
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in chosen.tolist():
        apart = (frequency[others] - frequency[i]).abs() + (length[others] - length[i]).abs()
        near = others[apart.argsort()[: max(20, n)]]
        found.append(near[torch.randperm(len(near), generator=draw)[:n]])
    return torch.stack(found)


def _groups(latents: LatentStore, positive: np.ndarray, negative: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    positive = np.asarray(positive, dtype=bool)
    negative = ~positive if negative is None else np.asarray(negative, dtype=bool)
    n = len(latents.samples[0])
    if positive.shape != (n,) or negative.shape != (n,):
        raise MmsaeError(
            f"groups of {len(positive)} and {len(negative)} samples do not fit the {n} samples of the data."
        )
    if positive.sum() < 2 or negative.sum() < 2:
        raise MmsaeError(
            f"a comparison needs at least two samples on each side, not {positive.sum()} and {negative.sum()}."
        )
    return positive, negative


def _best(score: np.ndarray, pvalue: np.ndarray, n: int) -> Selection:
    adjusted = false_discovery_control(pvalue)
    order = np.argsort(-score, kind="stable")[:n]
    return Selection(*(torch.as_tensor(a[order].copy()) for a in (np.arange(len(score)), score, adjusted)))

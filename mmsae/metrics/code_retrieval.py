"""Do codes of one stream find their partner, or their class, in the other? And how far apart are the streams?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from scipy import sparse
from torch import Tensor

Rows: TypeAlias = Any
"""SciPy sparse codes, or a NumPy array or tensor of dense embeddings as a baseline, `[n, d]`."""

SAME = 1e-9
"""Cosines that differ by no more are a tie: sums in another order are not a rank."""

CHUNK = 1024
"""Rows compared at a time, to bound the memory."""


def retrieval(queries: Rows, gallery: Rows, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k and mean reciprocal rank of each query's own partner, by cosine.

    Ties count half, so codes that are all alike, or all 0, do not look good. Chance of R@1 is 1 / n.

    Args:
        queries: `[n, d]`.
        gallery: `[n, d]`; row i is the partner of query i.
        ks: Ranks up to which a partner counts as found.

    Returns:
        `r@K` for each k, and `mrr`.
    """
    ranks = []
    for first, similar in _cosines(queries, gallery):
        own = similar[np.arange(len(similar)), np.arange(first, first + len(similar))][:, None]
        higher = (similar > own + SAME).sum(1)
        equal = (np.abs(similar - own) <= SAME).sum(1)
        ranks.append(1 + higher + (equal - 1) / 2)
    rank = np.concatenate(ranks)
    return {**{f"r@{k}": float((rank <= k).mean()) for k in ks}, "mrr": float((1 / rank).mean())}


def zero_shot(codes: Rows, prompts: Rows, labels: np.ndarray) -> float:
    """Accuracy of naming for each row the class whose prompt is nearest by cosine; of n classes that tie, 1/n counts.

    Args:
        codes: `[n, d]`.
        prompts: One for each class, `[n_classes, d]`.
        labels: Class of each row `[n]`.
    """
    right = []
    for first, similar in _cosines(codes, prompts):
        best = similar >= similar.max(1, keepdims=True) - SAME
        own = best[np.arange(len(similar)), labels[first : first + len(similar)]]
        right.append(own / best.sum(1))
    return float(np.concatenate(right).mean())


def modality_gap(one: Rows, other: Rows) -> float:
    """Distance between the mean unit row of each stream, in [0, 2]: of embeddings before, of codes after."""
    means = [np.asarray(rows.mean(0)).reshape(-1) for rows in (_unit(one), _unit(other))]
    return float(np.linalg.norm(means[0] - means[1]))


def pair_cosine(one: Rows, other: Rows) -> float:
    """Mean cosine of the two sides of a pair."""
    a, b = _unit(one), _unit(other)
    return float((a.multiply(b) if sparse.issparse(a) else a * b).sum() / a.shape[0])


def _cosines(one: Rows, other: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """Number of the first row, and cosines of some rows with all others, `[rows, n_other]`."""
    a, b = _unit(one), _unit(other)
    for first in range(0, a.shape[0], CHUNK):
        similar = a[first : first + CHUNK] @ b.T
        yield first, similar.toarray() if sparse.issparse(similar) else similar


def _unit(rows: Rows) -> Any:
    """Rows of norm 1 in float64; rows of zeros stay."""
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu().numpy()
    if sparse.issparse(rows):
        rows = sparse.csr_matrix(rows, dtype=np.float64)
        norms = np.sqrt(rows.multiply(rows).sum(1).A1)
        return sparse.diags(1 / np.where(norms > 0, norms, 1)) @ rows
    rows = np.asarray(rows, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)

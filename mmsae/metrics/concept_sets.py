"""Concept sets of a latent, its strongest samples in each stream, and how alike they are (arXiv 2510.21323)."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from torch import Tensor


def top_rows(codes: sparse.spmatrix, n: int = 10) -> np.ndarray:
    """Rows on which each latent is strongest, int64 `[d_latent, n]`, strongest first; -1 where it fires less often.

    Args:
        codes: `[n_rows, d_latent]`.
        n: Rows per latent.
    """
    columns = sparse.csc_matrix(codes)
    found = np.full((columns.shape[1], n), -1, dtype=np.int64)
    for latent in range(columns.shape[1]):
        own = slice(columns.indptr[latent], columns.indptr[latent + 1])
        values, rows = columns.data[own], columns.indices[own]
        best = rows[np.argsort(-values, kind="stable")[: min(n, int((values > 0).sum()))]]
        found[latent, : len(best)] = best
    return found


def set_means(codes: sparse.spmatrix, features: Tensor, n: int = 10, complete: bool = True) -> np.ndarray:
    """Mean feature of each latent's set, not normalised before, float64 `[d_latent, d]`; NaN where the set is empty.

    Args:
        codes: `[n_rows, d_latent]`.
        features: Of the same rows, by another encoder or of known factors, `[n_rows, d]`.
        n: Samples in a set.
        complete: Leave out latents that fire on fewer than `n` rows, as the sets of the paper have n members.
    """
    rows, values = top_rows(codes, n), features.detach().double().cpu().numpy()
    there = rows >= 0
    if complete:
        there &= there.all(1, keepdims=True)
    sums = (values[np.maximum(rows, 0)] * there[..., None]).sum(1)
    with np.errstate(invalid="ignore"):
        return sums / there.sum(1)[:, None]


def intra_similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over latents of the cosine between the set of one stream and that of the other; higher is better.

    Args:
        one: `set_means` of one stream, `[n_latents, d]`; latents without a set in either stream are left out.
        other: Of the other stream.
    """
    a, b = _both(one, other)
    return float((a * b).sum(1).mean()) if len(a) else float("nan")


def inter_similarity(one: np.ndarray, other: np.ndarray, symmetric: bool = False) -> float:
    """Mean over latents i < j of the cosine between i's set in one stream and j's in the other; lower is better.

    Args:
        one: `set_means` of one stream, `[n_latents, d]`.
        other: Of the other stream.
        symmetric: Average over all i != j, so that neither the streams nor the order of latents matters.
    """
    a, b = _both(one, other)
    n = len(a)
    if n < 2:
        return float("nan")
    if symmetric:
        return float((a.sum(0) @ b.sum(0) - (a * b).sum()) / (n * (n - 1)))
    before = a.cumsum(0) - a  # of j, the sum of all i < j
    return float((before * b).sum() / (n * (n - 1) / 2))


def _both(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows of the latents that both sides have."""
    norms = [np.linalg.norm(means, axis=1) for means in (one, other)]
    kept = np.isfinite(norms[0]) & np.isfinite(norms[1]) & (norms[0] > 0) & (norms[1] > 0)
    a, b = (means[kept] / norm[kept, None] for means, norm in zip((one, other), norms, strict=True))
    return a, b

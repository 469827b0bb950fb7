"""Are the samples on which a latent fires alike in the eyes of another model? In O(n d), without n^2 similarities."""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from mmsae.errors import MmsaeError


def monosemanticity(codes: sparse.spmatrix, embeddings: Tensor) -> np.ndarray:
    """MS of each latent (arXiv 2504.02821): mean cosine of two samples, weighted by the product of their activations.

    Activations are scaled to [0, 1] by the least and the greatest of each latent over all samples.

    Args:
        codes: `[n, d_latent]`.
        embeddings: Of the same samples by another encoder, `[n, d]`; taken to norm 1.

    Returns:
        float64 `[d_latent]` in [-1, 1]; NaN for latents that are constant or fire on one sample alone.
    """
    e = _units(embeddings, codes.shape[0])
    a = sparse.csc_matrix(codes, dtype=np.float64)
    n = a.shape[0]
    low, high = a.min(0).toarray()[0], a.max(0).toarray()[0]
    spread = np.where(high > low, high - low, np.nan)
    square = np.asarray(a.multiply(a).sum(0))[0]
    plain = np.asarray(a.sum(0))[0]
    total = (plain - n * low) / spread
    squares = (square - 2 * low * plain + n * low**2) / spread**2
    sums = (a.T @ e - np.outer(low, e.sum(0))) / spread[:, None]  # [d_latent, d]
    return _ratio((sums**2).sum(1) - squares, total**2 - squares, total**2)


def multimodal_monosemanticity(
    one: sparse.spmatrix,
    one_embeddings: Tensor,
    other: sparse.spmatrix | None = None,
    other_embeddings: Tensor | None = None,
) -> np.ndarray:
    """MMS of each latent (arXiv 2601.20028): mean cosine of samples r and s, weighted by `|a_r b_s|`.

    Args:
        one: Codes of one stream `[n, d_latent]`.
        one_embeddings: Of the same samples by another multimodal encoder `[n, d]`; taken to norm 1.
        other: Codes of the other stream `[m, d_latent]`; None compares the first with itself, without r = s.
        other_embeddings: Of its samples, `[m, d]`.

    Returns:
        float64 `[d_latent]` in [-1, 1]; 0 where the latent does not fire on both sides.
    """
    if (other is None) != (other_embeddings is None):
        raise MmsaeError("multimodal_monosemanticity needs the other stream's codes and embeddings both, or neither.")
    a, e = abs(sparse.csc_matrix(one, dtype=np.float64)), _units(one_embeddings, one.shape[0])
    sums, total = a.T @ e, np.asarray(a.sum(0))[0]
    if other is None or other_embeddings is None:
        squares = np.asarray(a.multiply(a).sum(0))[0]
        found = _ratio((sums**2).sum(1) - squares, total**2 - squares, total**2)
    else:
        b, f = abs(sparse.csc_matrix(other, dtype=np.float64)), _units(other_embeddings, other.shape[0])
        mass = total * np.asarray(b.sum(0))[0]
        found = _ratio((sums * (b.T @ f)).sum(1), mass, mass)
    return np.nan_to_num(found)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """NaN where what is left of the denominator is rounding."""
    some = denominator > 1e-12 * np.nan_to_num(scale)
    return np.where(some, numerator / np.where(some, denominator, 1), np.nan)


def _units(embeddings: Tensor, n: int) -> np.ndarray:
    if len(embeddings) != n:
        raise MmsaeError(f"there are codes of {n} samples, but {len(embeddings)} embeddings.")
    return torch.nn.functional.normalize(embeddings.double(), dim=-1).cpu().numpy()

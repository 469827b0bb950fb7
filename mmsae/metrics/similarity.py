"""How alike are two layers, or two models, on the same rows?"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CHUNK = 1024  # dictionary rows compared at a time


def jaccard(one: Tensor, other: Tensor) -> float:
    """Shared share of two dictionaries of activations, `|A and B| / |A or B|` (arXiv 2505.17769).

    Args:
        one: Row ids of the first dictionary `[n, 2]`, such as `ITDA.row_ids`; no id twice.
        other: Row ids of the second `[m, 2]`, grown from the same rows in the same order.
    """
    n = len(one) + len(other)
    union = len(torch.cat([one.cpu(), other.cpu()]).unique(dim=0))
    return (n - union) / union if union else 1.0


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of activations of the same rows (arXiv 1905.00414).

    Args:
        x: `[n, d]`.
        y: `[n, e]`.
    """
    x, y = _centred(x), _centred(y)
    return float((x.T @ y).pow(2).sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def svcca(x: Tensor, y: Tensor, kept: float = 0.99) -> float:
    """Mean canonical correlation of the leading principal components of both sides (SVCCA, arXiv 1706.05806).

    Args:
        x: `[n, d]`.
        y: `[n, e]`.
        kept: Share of the variance that the components hold.
    """
    return canonical(components(x, kept), components(y, kept))


def components(x: Tensor, kept: float = 0.99) -> Tensor:
    """Orthonormal scores `[n, r]` of the rows on the leading principal components, for `canonical`."""
    left, sizes, _ = torch.linalg.svd(_centred(x), full_matrices=False)
    shares = sizes.pow(2).cumsum(0) / sizes.pow(2).sum()
    return left[:, : int((shares < kept).sum()) + 1]


def canonical(one: Tensor, other: Tensor) -> float:
    """Mean canonical correlation of two sets of `components` of the same rows."""
    return float(torch.linalg.svdvals(one.T @ other).mean())


def best_cosine(one: Tensor, other: Tensor, signed: bool = False) -> float:
    """Mean over the latents of both dictionaries of the cosine with the nearest latent of the other.

    Args:
        one: `[n, d]`; rows of zeros are left out.
        other: `[m, d]`, of the same model and stream, without which directions cannot be compared.
        signed: Whether opposite directions are the same latent.
    """
    one, other = _units(one), _units(other)
    rows, columns = one.new_zeros(len(one)), other.new_full((len(other),), -1.0)
    for begin in range(0, len(one), CHUNK):
        cosines = one[begin : begin + CHUNK] @ other.T
        cosines = cosines.abs() if signed else cosines
        rows[begin : begin + CHUNK] = cosines.max(1).values
        columns = torch.maximum(columns, cosines.max(0).values)
    return float((rows.mean() + columns.mean()) / 2)


def matched_cosine(one: Tensor, other: Tensor, signed: bool = False) -> float:
    """Mean cosine of the latents of two dictionaries paired off one to one, as well as possible (Hungarian method).

    Cubic in the number of latents: two seconds for four thousand random rows.

    Args:
        one: `[n, d]`; rows of zeros are left out.
        other: `[m, d]`, of the same model and stream; of the larger dictionary some latents stay without a partner.
        signed: Whether opposite directions are the same latent.
    """
    cosines = _units(one) @ _units(other).T
    cosines = cosines.abs() if signed else cosines
    rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    return float(cosines[torch.from_numpy(rows), torch.from_numpy(columns)].mean())


def layer_matching(similarity: Tensor) -> float:
    """Share of layers of both models whose most similar layer of the other model is the same layer.

    Args:
        similarity: Of each layer of one model with each of the other, `[n_layers, n_layers]`.
    """
    own = torch.arange(len(similarity), device=similarity.device)
    hits = torch.cat([similarity.argmax(0) == own, similarity.argmax(1) == own])
    return float(hits.float().mean())


def _units(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=-1, keepdim=True)
    return (rows / norms.clamp_min(1e-30))[norms[:, 0] > 0]


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)

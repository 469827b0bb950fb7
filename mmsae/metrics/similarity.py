"""How alike are two layers, or two models, on the same rows?"""

from __future__ import annotations

import torch
from torch import Tensor


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
    bases = []
    for side in (_centred(x), _centred(y)):
        left, sizes, _ = torch.linalg.svd(side, full_matrices=False)
        shares = sizes.pow(2).cumsum(0) / sizes.pow(2).sum()
        bases.append(left[:, : int((shares < kept).sum()) + 1])
    return float(torch.linalg.svdvals(bases[0].T @ bases[1]).mean())


def layer_matching(similarity: Tensor) -> float:
    """Share of layers of both models whose most similar layer of the other model is the same layer.

    Args:
        similarity: Of each layer of one model with each of the other, `[n_layers, n_layers]`.
    """
    own = torch.arange(len(similarity), device=similarity.device)
    hits = torch.cat([similarity.argmax(0) == own, similarity.argmax(1) == own])
    return float(hits.float().mean())


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)

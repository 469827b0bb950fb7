"""Which latents fire: exact selections from a matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest entries of each row.

    Selection goes by index, never by a threshold, so that ties in low precision cannot raise the L0.

    Args:
        scores: `[..., d_latent]`.
        k: Entries kept per row.

    Returns:
        values `[..., k]`, indices `[..., k]` int64, unordered.
    """
    return scores.topk(k, dim=-1, sorted=False)


def batch_topk(scores: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The `budget` largest entries of the whole matrix, as a pair list padded with zeros.

    The best candidates of each row are taken first and the global cut is made among them. That is exact unless a row
    keeps all of its candidates; then the number of candidates is doubled and the cut repeated.

    Args:
        scores: `[..., d_latent]`.
        budget: Entries kept in total.

    Returns:
        values `[..., n]` (0 where not kept), indices `[..., n]` int64, with n the number of candidates per row.
    """
    flat = scores.reshape(-1, scores.shape[-1])
    n_rows, d_latent = flat.shape
    budget = min(budget, flat.numel())
    width = min(d_latent, 4 * -(-budget // max(n_rows, 1)))
    while True:
        values, indices = flat.topk(width, dim=-1, sorted=True)
        chosen = values.flatten().topk(budget, sorted=False).indices
        kept = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
        kept[chosen] = True
        kept = kept.view(values.shape)
        if width == d_latent or not bool(kept[:, -1].any()):
            break
        width = min(d_latent, 2 * width)
    shape = (*scores.shape[:-1], width)
    return (values * kept).view(shape), indices.view(shape)

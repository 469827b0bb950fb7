"""From a pair list of codes back to activations, without a dense `[batch, d_latent]` in either direction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sparse_decode(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    """`sum_j values[..., j] * dictionary[indices[..., j]]`.

    Both gradients (of the values and of the dictionary) are exact. Runs in the precision of the dictionary.

    Args:
        values: `[..., n]`.
        indices: `[..., n]` int64.
        dictionary: `[d_latent, d_out]`.

    Returns:
        `[..., d_out]`.
    """
    n = indices.shape[-1]
    out = F.embedding_bag(
        indices.reshape(-1, n),
        dictionary,
        mode="sum",
        per_sample_weights=values.reshape(-1, n).to(dictionary.dtype),
    )
    return out.view(*indices.shape[:-1], dictionary.shape[1])


def sparse_decode_groups(values: Tensor, indices: Tensor, dictionary: Tensor, ends: Tensor) -> Tensor:
    """Decode each group of consecutive latents by itself, at the price of one decode.

    Args:
        values: `[rows, n]`.
        indices: `[rows, n]` int64.
        dictionary: `[d_latent, d_out]`.
        ends: End (exclusive) of each group, ascending int64 `[n_groups]`; the last is `d_latent`.

    Returns:
        `[rows, n_groups, d_out]`; its sum over the groups is `sparse_decode`.
    """
    n_rows, n = indices.shape
    indices, order = indices.sort(dim=-1)
    values = values.gather(-1, order)
    below = torch.searchsorted(indices, ends.expand(n_rows, -1).contiguous())  # pairs of the row before each end
    starts = torch.cat([below.new_zeros(n_rows, 1), below[:, :-1]], dim=1)
    offsets = starts + torch.arange(n_rows, device=indices.device)[:, None] * n
    out = F.embedding_bag(
        indices.reshape(-1),
        dictionary,
        offsets.reshape(-1),
        mode="sum",
        per_sample_weights=values.reshape(-1).to(dictionary.dtype),
    )
    return out.view(n_rows, len(ends), dictionary.shape[1])

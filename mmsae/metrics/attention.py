"""Which heads and source positions a latent reads, of dictionaries on the concatenated heads (arXiv 2406.17759).

The activation is `z`, the heads' values mixed by their attention pattern, side by side: the input of the output
projection (`...attn.c_proj:input`, `...self_attn.o_proj:input`). A pre-activation is linear in it, so it can be divided
among heads, and with the pattern held fixed among source positions, without a rest (direct feature attribution).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmsae.cores.linear import LinearCore
from mmsae.errors import MmsaeError, checked


def blocks(x: Tensor, n_heads: int) -> Tensor:
    """`[..., n_heads, d_head]`, a view of vectors `[..., n_heads * d_head]`."""
    checked("n_heads", n_heads, 1)
    if x.shape[-1] % n_heads:
        raise MmsaeError(f"n_heads={n_heads} does not divide the width {x.shape[-1]}: give the heads of the model.")
    return x.unflatten(-1, (n_heads, -1))


def head_share(dictionary: Tensor, n_heads: int) -> Tensor:
    """Share of each head in what a latent writes, by norms: `||w_i,h|| / sum_h' ||w_i,h'||`.

    Args:
        dictionary: Decoder rows `[d_latent, n_heads * d_head]`.
        n_heads: Query heads.

    Returns:
        `[d_latent, n_heads]`; rows sum to 1, those of latents that write nothing are 0.
    """
    norms = blocks(dictionary, n_heads).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)


def encoder_rows(core: LinearCore, latents: Tensor) -> tuple[Tensor, Tensor]:
    """What attributions of a latent's pre-activation need: encoder rows `[n, d_in]`, and the part without input `[n]`.

    Args:
        core: A dictionary with a linear encoder.
        latents: Which ones, `[n]`.
    """
    rows, constant = core.W_enc[latents], core.b_enc[latents]
    return rows, constant - rows @ core.b_dec if core.subtracts_b_dec else constant


def by_head(z: Tensor, rows: Tensor, n_heads: int) -> Tensor:
    """Each head's part of pre-activations; their sum and the constant of `encoder_rows` are the pre-activation.

    Args:
        z: `[..., n_heads * d_head]`.
        rows: Encoder rows `[n, n_heads * d_head]`.
        n_heads: Query heads.

    Returns:
        `[..., n, n_heads]`.
    """
    return torch.einsum("...hd,nhd->...nh", blocks(z, n_heads), blocks(rows, n_heads))


def by_source(pattern: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Each head's and source position's part of pre-activations, the attention pattern held fixed.

    Summed over source positions it is `by_head`.

    Args:
        pattern: Attention weights `[..., n_heads, T, S]`.
        values: `[..., n_value_heads, S, d_head]`; fewer heads than the pattern has with grouped queries.
        rows: Encoder rows `[n, n_heads * d_head]`.

    Returns:
        `[..., T, n, n_heads, S]`.
    """
    n_heads = pattern.shape[-3]
    values = repeat_values(values, n_heads)
    seen = torch.einsum("...hsd,nhd->...nhs", values, blocks(rows, n_heads))
    return torch.einsum("...hts,...nhs->...tnhs", pattern, seen)


def repeat_values(values: Tensor, n_heads: int) -> Tensor:
    """Values of grouped heads `[..., n_value_heads, S, d_head]`, once per query head: `[..., n_heads, S, d_head]`."""
    groups, rest = divmod(n_heads, values.shape[-3])
    if rest:
        raise MmsaeError(f"{n_heads} query heads cannot share {values.shape[-3]} value heads equally.")
    return values.repeat_interleave(groups, dim=-3)


def logit_effect(directions: Tensor, w_o: Tensor, w_u: Tensor) -> Tensor:
    """What latents add to the logits by the residual stream alone: no later layer, the final norm left out.

    Args:
        directions: Decoder rows `[n, n_heads * d_head]`.
        w_o: Output projection `[n_heads * d_head, d_model]`.
        w_u: Unembedding `[d_model, vocabulary]`.

    Returns:
        `[n, vocabulary]`, for a code of 1.
    """
    return directions @ w_o @ w_u

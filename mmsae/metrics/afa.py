"""Approximate feature activation: what the norm of an activation says about its code (arXiv 2503.24277)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmsae.errors import MmsaeError

if TYPE_CHECKING:  # the core of the same name uses this file
    from mmsae.cores.base import SAECore

CHUNK = 1024  # latents compared at a time


class AFA(NamedTuple):
    """For each row.

    Attributes:
        norm: Of the activation, `[n]`.
        estimate: Norm of the code weighted by decoder norms, joined with the norm of the decoder bias, `[n]`. Equals
            that of the reconstruction where the active decoder rows and the bias are orthogonal.
        epsilon: Least coherence of decoder rows that could explain the difference of the squares, `[n]`.
        error: Squared error of the reconstruction over the squared norm of the activation, `[n]`.
    """

    norm: Tensor
    estimate: Tensor
    epsilon: Tensor
    error: Tensor


@torch.no_grad()
def afa(core: SAECore, x: Tensor) -> AFA:
    """Compare the norms of activations with those of their codes.

    A point above the diagonal of `norm` and `estimate` has a code larger than the activation: its latents point against
    each other; one below leaves norm unexplained.

    Args:
        core: A trained dictionary of one stream with a linear decoder.
        x: `[n, d_in]`, as the dictionary takes them.
    """
    if not core.linear_decode or core.spec.d_in != core.spec.d_out:
        raise MmsaeError(f"AFA compares norms of input and code; {type(core).__name__} does not map one to the other.")
    codes = core.encode(x)
    norms = core.dictionary.norm(dim=-1)
    if codes.indices is not None:
        norms = norms.index_select(0, codes.indices.flatten()).view_as(codes.values)
    reconstruction = core.decode(codes)
    assert isinstance(reconstruction, Tensor)
    offset = core.decode(type(codes)(codes.values[:1] * 0, None if codes.indices is None else codes.indices[:1],
                                     core.d_latent))  # fmt: skip
    assert isinstance(offset, Tensor)
    estimate = ((codes.values * norms).pow(2).sum(-1) + offset.pow(2).sum()).sqrt()
    norm = x.norm(dim=-1)
    gap = (norm.pow(2) - estimate.pow(2)).abs()
    epsilon = gap / ((core.d_latent - 1) * estimate.pow(2)).clamp_min(1e-30)
    error = (x - reconstruction).pow(2).sum(-1) / norm.pow(2).clamp_min(1e-30)
    return AFA(norm, estimate, epsilon, error)


@torch.no_grad()
def coherence(dictionary: Tensor) -> float:
    """Largest absolute cosine of two rows of a dictionary `[d_latent, d]`.

    With unit rows and codes z of s active latents, `| ||z W||^2 - ||z||^2 |` is at most `coherence (s - 1) ||z||^2`.
    """
    rows = dictionary / dictionary.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    largest = 0.0
    for begin in range(0, len(rows), CHUNK):
        cosines = rows[begin : begin + CHUNK] @ rows.T
        cosines.diagonal(begin).zero_()
        largest = max(largest, float(cosines.abs().max()))
    return largest

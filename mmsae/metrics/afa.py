"""Approximate feature activation: what the norm of an activation says about its code (arXiv 2503.24277)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores import SAECore, SharedDictionary
from mmsae.errors import MmsaeError
from mmsae.spec import TARGET, Batch

CHUNK = 1024  # latents looked at at a time


class AFA(NamedTuple):
    """For each row of one stream.

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


class DecoderNorms(NamedTuple):
    """Of one stream.

    Attributes:
        rows: Norm of what each latent writes, `[d_latent]`.
        bias: Norm of what is written when no latent fires.
    """

    rows: Tensor
    bias: Tensor


def refusal(core: SAECore) -> str:
    """Why the norms of a dictionary's codes and activations cannot be compared; empty if they can."""
    name = type(core).__name__
    if TARGET in core.spec.streams:
        return f"AFA compares norms of input and code; {name} with a target does not map one to the other."
    if not core.linear_decode:
        return f"AFA needs latents that each add one vector; those of {name} also act in products."
    return ""


@torch.no_grad()
def decoder_norms(core: SAECore) -> dict[str, DecoderNorms]:
    """Norms of the decoder rows and of the bias of each stream, read off a linear `decode`."""
    if why := refusal(core):
        raise MmsaeError(why)
    device = core.rows_seen.device
    silent = Codes(torch.zeros(1, 1, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device), core.d_latent)
    if isinstance(core, SharedDictionary):
        return {
            stream: DecoderNorms(rows.norm(dim=-1), core.decode_stream(stream, silent).norm())
            for stream, rows in core.dictionaries.items()
        }
    bias = core.by_stream(core.decode(silent))
    parts: dict[str, list[Tensor]] = {stream: [] for stream in bias}
    for latents in torch.arange(core.d_latent, device=device).split(CHUNK):
        alone = Codes(torch.ones(len(latents), 1, device=device), latents[:, None], core.d_latent)
        for stream, written in core.by_stream(core.decode(alone)).items():
            parts[stream].append((written - bias[stream]).norm(dim=-1))
    return {stream: DecoderNorms(torch.cat(parts[stream]), bias[stream].norm()) for stream in bias}


@torch.no_grad()
def afa(
    core: SAECore,
    x: Tensor | dict[str, Tensor],
    batch: Batch | None = None,
    norms: dict[str, DecoderNorms] | None = None,
) -> dict[str, AFA]:
    """Compare the norms of activations with those of their codes, in each stream that the dictionary writes.

    A point above the diagonal of `norm` and `estimate` has a code larger than the activation: its latents point against
    each other; one below leaves norm unexplained.

    Args:
        core: A trained dictionary with a linear decoder.
        x: `[n, d_in]`, as the dictionary takes them; a dict by stream if it reads several.
        batch: For cores with `needs`.
        norms: Of `decoder_norms`, when many batches are measured.
    """
    norms = norms or decoder_norms(core)
    codes = core.encode(x, batch)
    found = {}
    for number, (stream, reconstruction) in enumerate(core.by_stream(core.decode(codes)).items()):
        rows, bias = norms[stream]
        own_codes = codes[number] if isinstance(core, SharedDictionary) else codes
        own = x[stream] if isinstance(x, dict) else x
        weights = rows if own_codes.indices is None else rows[own_codes.indices]
        estimate = ((own_codes.values * weights).pow(2).sum(-1) + bias.pow(2)).sqrt()
        norm = own.norm(dim=-1)
        gap = (norm.pow(2) - estimate.pow(2)).abs()
        others = max(int((rows > 0).sum()) - 1, 1)  # places that ITDA did not need are no vectors
        epsilon = gap / (others * estimate.pow(2)).clamp_min(1e-30)
        error = (own - reconstruction).pow(2).sum(-1) / norm.pow(2).clamp_min(1e-30)
        found[stream] = AFA(norm, estimate, epsilon, error)
    return found


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

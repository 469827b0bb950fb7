"""Samples of text and image tokens about known concepts: some pairs match, some do not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.errors import checked

TEXT, IMAGE = 0, 1


class MixedTokens(NamedTuple):
    """Tokens of samples, sample after sample.

    Attributes:
        x: Activations `[n * tokens, d]`.
        token_type: 0 text, 1 image, int64 `[n * tokens]`.
        sample: Which sample a token is of, int64 `[n * tokens]`.
        matched: Whether words and picture of a sample speak of the same concepts, bool `[n]`.
        concepts: Which concepts are on in each token, bool `[n * tokens, n_concepts]`.
    """

    x: Tensor
    token_type: Tensor
    sample: Tensor
    matched: Tensor
    concepts: Tensor


def mixed_tokens(
    n: int,
    seed: int,
    matched: float = 0.5,
    n_concepts: int = 40,
    d: int = 64,
    n_text: int = 6,
    n_image: int = 8,
    per_sample: int = 3,
    twist: float = 0.5,
    gap: float = 0.5,
    noise: float = 0.05,
    draw: int = 0,
) -> MixedTokens:
    """Samples whose words and pictures share their concepts, or have them drawn independently.

    A concept has a direction in each modality, `n(a + twist * n(noise))` with `a` of both; a token holds at least one
    concept of its sample, any further one with probability 0.25, and an offset of its modality of norm `gap`.

    Args:
        n: Samples.
        seed: Of the concepts.
        matched: Share of samples whose picture belongs to their words.
        n_concepts: Concepts in all.
        d: Width.
        n_text: Text tokens of a sample.
        n_image: Image tokens of a sample.
        per_sample: Concepts of a sample.
        twist: How far a concept's directions in the two modalities lie apart; 0 is not at all.
        gap: Norm of the offset of each modality.
        noise: Standard deviation of the noise of each dimension.
        draw: Another number draws other samples of the same concepts.
    """
    g = torch.Generator().manual_seed(seed)
    base = _unit(torch.randn(n_concepts, d, generator=g))
    directions = [_unit(base + twist * _unit(torch.randn(n_concepts, d, generator=g))) for _ in (TEXT, IMAGE)]
    offsets = gap * _unit(torch.randn(2, d, generator=g))

    g = torch.Generator().manual_seed(1_000_003 * (draw + 1) + seed)
    fits = torch.rand(checked("n", n, 1), generator=g) < matched
    told = _subsets(n, n_concepts, per_sample, g)
    seen = torch.where(fits[:, None], told, _subsets(n, n_concepts, per_sample, g))
    parts, concepts = [], []
    for kind, chosen, count in ((TEXT, told, n_text), (IMAGE, seen, n_image)):
        first = torch.randint(per_sample, (n, count, 1), generator=g)
        held = torch.rand(n, count, per_sample, generator=g) < 0.25
        held.scatter_(2, first, True)
        weight = held * (0.5 + torch.rand(held.shape, generator=g))
        on = torch.zeros(n, count, n_concepts).scatter_(2, chosen[:, None].expand_as(weight), weight)
        parts.append(on @ directions[kind] + offsets[kind] + noise * torch.randn(n, count, d, generator=g))
        concepts.append(on > 0)
    tokens = n_text + n_image
    token_type = torch.tensor([TEXT] * n_text + [IMAGE] * n_image).repeat(n)
    sample = torch.arange(n).repeat_interleave(tokens)
    return MixedTokens(
        torch.cat(parts, 1).flatten(0, 1), token_type, sample, fits, torch.cat(concepts, 1).flatten(0, 1)
    )


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def _subsets(n: int, n_concepts: int, size: int, g: torch.Generator) -> Tensor:
    """Distinct concepts of each sample, int64 `[n, size]`."""
    return torch.rand(n, n_concepts, generator=g).topk(size).indices

"""Paired embeddings made of concepts that are known: image and text of the same few concepts, with a gap in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.errors import MmsaeError, checked
from mmsae.spec import ACTS, Batch


class PairedDraw(NamedTuple):
    """Rows of a world of pairs.

    Attributes:
        x: Unit embeddings `[n, d]` by stream; row i of all streams describes the same concepts.
        concepts: Weight of every concept in each pair, `[n, n_concepts]`; 0 where it is off.
    """

    x: dict[str, Tensor]
    concepts: Tensor

    @property
    def batch(self) -> Batch:
        """As a core gets them."""
        return {ACTS: self.x, "pair_id": torch.arange(len(self.concepts))}

    def shuffled(self, seed: int) -> PairedDraw:
        """The control: the same rows, but each stream in an order of its own. `concepts` stay those of the first."""
        g = torch.Generator().manual_seed(seed)
        first, *others = self.x
        mixed = {stream: self.x[stream][torch.randperm(len(self.concepts), generator=g)] for stream in others}
        return PairedDraw({first: self.x[first], **mixed}, self.concepts)


@dataclass(frozen=True)
class PairedWorld:
    """`x = unit(weights @ directions / sqrt(n_active) + offset + noise)` in each stream, of the same weights.

    Attributes:
        directions: Unit rows of the concepts `[n_concepts, d]` by stream.
        offsets: What all rows of a stream have in common, `[d]`: the gap between the modalities.
        n_active: Concepts of a pair; weights U[.5, 1.5].
        noise: Standard deviation of the noise of each dimension.
    """

    directions: dict[str, Tensor]
    offsets: dict[str, Tensor]
    n_active: int = 3
    noise: float = 0.05

    def draw(self, n: int, seed: int) -> PairedDraw:
        """`n` pairs; the same seed gives the same pairs."""
        g = torch.Generator().manual_seed(seed)
        n_concepts = len(next(iter(self.directions.values())))
        chosen = torch.rand(checked("n", n, 1), n_concepts, generator=g).argsort(-1)[:, : self.n_active]
        weights = 0.5 + torch.rand(n, self.n_active, generator=g)
        concepts = torch.zeros(n, n_concepts).scatter_(1, chosen, weights)
        x = {}
        for stream, directions in self.directions.items():
            noise = self.noise * torch.randn(n, directions.shape[1], generator=g)
            x[stream] = normalize(concepts @ directions / self.n_active**0.5 + self.offsets[stream] + noise, dim=-1)
        return PairedDraw(x, concepts)


PRESETS = {"easy": (0.5, 0.3), "hard": (1.0, 0.6)}
"""How far a concept's directions in a stream are from those in common, and the norm of the offsets."""


def paired_concepts(
    seed: int,
    preset: Literal["easy", "hard"] = "easy",
    streams: Sequence[str] = ("image", "text"),
    n_concepts: int = 32,
    d: int = 32,
) -> PairedWorld:
    """A world of pairs from a seed.

    Args:
        seed: Of its directions and offsets.
        preset: "easy": the directions of a concept have a cosine of about .8 between streams, offsets a norm of .3;
            "hard": .5 and .6.
        streams: Their names.
        n_concepts: Concepts that all streams know.
        d: Width of every stream.
    """
    if preset not in PRESETS:
        raise MmsaeError(f"preset={preset!r} is not one of {', '.join(PRESETS)}.")
    spread, gap = PRESETS[preset]
    g = torch.Generator().manual_seed(seed)

    def units(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, generator=g), dim=-1)

    common = units(n_concepts, d)
    directions = {stream: normalize(common + spread * units(n_concepts, d), dim=-1) for stream in streams}
    return PairedWorld(directions, {stream: gap * units(d) for stream in streams})

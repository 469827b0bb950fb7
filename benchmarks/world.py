"""Activations with known features, and what a dictionary trained on them is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

if TYPE_CHECKING:
    from contenders import Contender

CHUNK = 4096
"""Rows handled at a time, to bound the memory."""


class World(NamedTuple):
    """`x = sum of a few features, each times a number in [.5, 1.5], + noise`; the features are random unit vectors.

    Attributes:
        d_in: Width of the activations.
        n_features: Number of true features.
        l0: Mean number of features in a row.
        noise: Standard deviation of the noise in each dimension.
    """

    d_in: int
    n_features: int
    l0: int
    noise: float = 0.02

    def features(self) -> Tensor:
        """The true features, `[n_features, d_in]`."""
        generator = torch.Generator().manual_seed(0)
        return normalize(torch.randn(self.n_features, self.d_in, generator=generator), dim=-1)

    def rows(self, n: int, seed: int) -> Tensor:
        """`[n, d_in]` activations."""
        generator = torch.Generator().manual_seed(seed)
        features, out = self.features(), torch.empty(n, self.d_in)
        for block in out.split(CHUNK):
            shape = (len(block), 2 * self.l0)  # twice as many candidates as features wanted: a coin decides on each
            candidates = torch.randint(self.n_features, shape, generator=generator)
            on = torch.rand(shape, generator=generator) < 0.5
            strength = on * (0.5 + torch.rand(shape, generator=generator))
            noise = self.noise * torch.randn(block.shape, generator=generator)
            block.copy_(noise.add_(embedding_bag(candidates, features, per_sample_weights=strength, mode="sum")))
        return out

    def write(self, path: Path, n: int) -> None:
        """Write `n` rows that every contender maps into its memory."""
        np.save(path, self.rows(n, seed=1).numpy())


def read(path: Path, device: str) -> Tensor:
    """The rows written by `World.write`, present in memory."""
    rows = torch.from_numpy(np.load(path, mmap_mode="c"))
    rows.sum()  # touches every page, so that no contender pays for reading the disk
    return rows.to(device)


class Quality(NamedTuple):
    """A trained dictionary on held-out rows.

    Attributes:
        fvu: Fraction of variance unexplained.
        l0: Mean number of active latents.
        dead: Share of latents that never fire.
        recovered: Share of true features that some decoder row points along, with |cosine| > .9.
        cosine: Mean over true features of the largest |cosine|.
    """

    fvu: float
    l0: float
    dead: float
    recovered: float
    cosine: float


@torch.inference_mode()
def quality(contender: Contender, world: World, n_rows: int = 65536) -> Quality:
    """Measure on rows that nobody trained on."""
    held_out = world.rows(n_rows, seed=2).to(contender.task.device)
    error, firings = 0.0, torch.zeros((), device=held_out.device)
    for x in held_out.split(CHUNK):
        codes = contender.encode(x)
        error += float((x - contender.decode(codes).float()).pow(2).sum())
        firings = firings + contender.firings(codes)
    rows = normalize(contender.dictionary().float(), dim=-1)
    best = (world.features().to(rows) @ rows.T).abs().amax(-1)
    return Quality(
        fvu=error / float((held_out - held_out.mean(0)).pow(2).sum()),
        l0=float(firings.sum()) / n_rows,
        dead=float((firings == 0).float().mean()),
        recovered=float((best > 0.9).float().mean()),
        cosine=float(best.mean()),
    )

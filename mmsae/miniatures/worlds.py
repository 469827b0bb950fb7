"""Activations made of features that are known: worlds in which a dictionary can be right or wrong.

Each function below builds a world from a seed; `WORLDS` names those that `recipes/compare_cores.py` compares cores on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.errors import MmsaeError, checked

Sampler = Callable[[int, torch.Generator], Tensor]


class Draw(NamedTuple):
    """Rows of a world.

    Attributes:
        x: Activations `[n, d]`; where the world has several streams, they stand side by side.
        coefficients: What every feature adds to each row, in units of its direction, `[n, n_features]`; 0 where off.
    """

    x: Tensor
    coefficients: Tensor

    @property
    def on(self) -> Tensor:
        """Which features are on, bool `[n, n_features]`."""
        return self.coefficients != 0


@dataclass(frozen=True)
class World:
    """`x = coefficients @ features + bindings + dense part + noise + offset`, all of it known.

    Attributes:
        features: Unit rows `[n_features, d]`.
        coefficients: Draws `[n, n_features]` from a generator.
        noise: Standard deviation of the noise of each dimension.
        offset: Added to every row, `[d]`; None is nothing.
        bipolar: Whether coefficients have either sign.
        parents: Index of each feature's parent, -1 for none, int64 `[n_features]`; None where nothing is nested.
        bound: Pairs `[n_pairs, 2]` whose product adds a direction of its own, and those unit directions `[n_pairs, d]`.
        control: Pairs that are on together as well, but add nothing, `[n_pairs, 2]`.
        dense: Directions `[n_dense, d]` that are on in every row with a Gaussian coefficient; they are no features.
        streams: Widths of the streams that stand side by side in `x`.
    """

    features: Tensor
    coefficients: Sampler
    noise: float = 0.0
    offset: Tensor | None = None
    bipolar: bool = False
    parents: Tensor | None = None
    bound: tuple[Tensor, Tensor] | None = None
    control: Tensor | None = None
    dense: Tensor | None = None
    streams: dict[str, int] = field(default_factory=dict)

    def draw(self, n: int, seed: int) -> Draw:
        """`n` rows; the same seed gives the same rows."""
        g = torch.Generator().manual_seed(seed)
        coefficients = self.coefficients(checked("n", n, 1), g)
        x = coefficients @ self.features
        if self.bound is not None:
            pairs, directions = self.bound
            x = x + 2 * (coefficients[:, pairs[:, 0]] * coefficients[:, pairs[:, 1]]) @ directions
        if self.dense is not None:
            x = x + torch.randn(n, len(self.dense), generator=g) @ self.dense
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=g)
        return Draw(x if self.offset is None else x + self.offset, coefficients)

    def rows(self, n: int, seed: int) -> Tensor:
        """The activations alone, `[n, d]`."""
        return self.draw(n, seed).x

    def by_stream(self, x: Tensor) -> dict[str, Tensor]:
        """Activations `[n, d]` by stream; the only one is called `x`."""
        widths = self.streams or {"x": self.features.shape[1]}
        return dict(zip(widths, x.split(list(widths.values()), -1), strict=True))

    @property
    def l0(self) -> float:
        """Features that are on in a row, on average over 20,000 rows."""
        return float(self.draw(20_000, seed=12345).on.float().sum(1).mean())

    @property
    def k(self) -> int:
        """`l0` rounded up: a smaller budget could not hold a parent and its child."""
        return math.ceil(self.l0 - 0.05)  # what sampling may add


def low_coherence(n: int, d: int, seed: int, steps: int = 300) -> Tensor:
    """`n` unit rows in `d` dimensions, pushed apart by Adam on the fourth power of their cosines."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=0.05)
    for _ in range(steps):
        unit = rows / rows.norm(dim=1, keepdim=True)
        loss = (unit @ unit.T - torch.eye(n)).pow(4).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (rows / rows.norm(dim=1, keepdim=True)).detach()


def orthonormal(n: int, d: int, seed: int) -> Tensor:
    """`n` orthonormal rows in `d` dimensions, in a random frame."""
    if n > d:
        raise MmsaeError(f"{n} features cannot be orthonormal in {d} dimensions: choose d of at least {n}.")
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0][:n]


def independent(p: Tensor) -> Sampler:
    """Features that are on with probabilities `p` `[n_features]`, whatever the others do; coefficients U[.5, 1.5]."""

    def sample(n: int, g: torch.Generator) -> Tensor:
        on = torch.rand(n, len(p), generator=g) < p
        return on * (0.5 + torch.rand(n, len(p), generator=g))

    return sample


# ---- independent features


def flat(n: int, d: int, s: float, seed: int, noise: float = 0.02) -> World:
    """Low-coherence features, each on with probability s / n."""
    return World(low_coherence(n, d, seed), independent(torch.full((n,), s / n)), noise, torch.zeros(d))


def zipf(n: int, d: int, s: float, seed: int, noise: float = 0.02, offset: float = 0.3) -> World:
    """As `flat`, but feature i with probability in proportion to 1 / (i + 3), at most a half, and an offset."""
    p = 1 / (torch.arange(n) + 3.0)
    for _ in range(50):  # capped probabilities still sum to s
        free = p < 0.5
        p = torch.where(free, p * ((s - 0.5 * (~free).sum()) / p[free].sum()), 0.5).clamp_max(0.5)
    shift = offset * torch.randn(d, generator=torch.Generator().manual_seed(seed + 50))
    return World(low_coherence(n, d, seed), independent(p), noise, shift)


def decades(n: int, d: int, seed: int, highest: float = 0.3, n_decades: float = 4.0, noise: float = 0.02) -> World:
    """Independent features whose frequencies fall geometrically from `highest` over `n_decades` powers of ten."""
    p = highest * 10 ** (-n_decades * torch.arange(n) / (n - 1))
    return World(low_coherence(n, d, seed), independent(p), noise)


def outliers(n: int, d: int, s: float, seed: int, offset: float = 5.0, noise: float = 0.02) -> World:
    """As `flat`, behind what activations of transformers have: a mean far from 0, and two coordinates that dominate.

    The mean has norm `offset`; the outliers are two of the coordinates, with standard deviations 3 and 2 in every row.
    """
    mean = torch.randn(d, generator=torch.Generator().manual_seed(seed + 50))
    mean[:2] *= 10  # the coordinates that vary most are far from 0, too
    dense = torch.zeros(2, d)
    dense[0, 0], dense[1, 1] = 3.0, 2.0
    world = flat(n, d, s, seed, noise)
    return replace(world, offset=offset * mean / mean.norm(), dense=dense)


# ---- features that know each other


def groups(
    n_groups: int, size: int, d: int, seed: int, p_group: float = 0.25, p: float = 1 / 3, noise: float = 0.02
) -> World:
    """Correlated features: each group is on by itself, and within it each feature with probability `p`."""
    n_features = n_groups * size

    def sample(n: int, g: torch.Generator) -> Tensor:
        group = torch.rand(n, n_groups, generator=g) < p_group
        on = (torch.rand(n, n_features, generator=g) < p) & group.repeat_interleave(size, 1)
        return on * (0.5 + torch.rand(n, n_features, generator=g))

    return World(low_coherence(n_features, d, seed), sample, noise)


def tree(seed: int, epsilon: tuple[float, float] = (0.3, 0.0895), d: int = 20) -> World:
    """Eleven exclusive parents, three of which have three exclusive children, orthogonal to them (after 2506.03093).

    Parents resemble each other by `epsilon[0]`, siblings by `epsilon[1]`: only where its parent is on does a child
    stand out (conditional orthogonality). Features 0-10 are the parents, 11 + 3 i .. 13 + 3 i the children of i.
    """
    q = orthonormal(20, d, seed)
    families = [list(range(11)), *([11 + 3 * i, 12 + 3 * i, 13 + 3 * i] for i in range(3))]
    rows = q.clone()
    for family, e in zip(families, (epsilon[0], *[epsilon[1]] * 3), strict=True):
        others = q[family].sum(0, keepdim=True) - q[family]
        rows[family] = (1 - e) * q[family] + e / (len(family) - 1) * others
    rows /= rows.norm(dim=-1, keepdim=True)
    p_top = torch.tensor([0.2] * 3 + [0.05] * 8)

    def sample(n: int, g: torch.Generator) -> Tensor:
        on = torch.zeros(n, 20, dtype=torch.bool)
        top = torch.multinomial(p_top, n, replacement=True, generator=g)
        on[torch.arange(n), top] = True
        child = torch.multinomial(torch.tensor([0.2, 0.2, 0.2, 0.4]), n, replacement=True, generator=g)  # 3: none
        has = (top < 3) & (child < 3)
        on[has.nonzero()[:, 0], (11 + 3 * top + child)[has]] = True
        return on * (1.5 + 0.25 * torch.randn(n, 20, generator=g))

    parents = torch.full((20,), -1)
    parents[11:] = torch.arange(3).repeat_interleave(3)
    return World(rows, sample, parents=parents)


def absorb(seed: int, d: int = 48) -> World:
    """32 orthonormal features, four of them with exclusive children, which invite a dictionary to absorb the parents.

    Features 0-3 are parents (p = 0.15), 4 + 4 i .. 7 + 4 i the children of parent i (0.2 each, none 0.2), and the last
    12 are flat (p = 0.05).
    """

    def sample(n: int, g: torch.Generator) -> Tensor:
        on = torch.zeros(n, 32, dtype=torch.bool)
        on[:, :4] = torch.rand(n, 4, generator=g) < 0.15
        choice = torch.randint(0, 5, (n, 4), generator=g)  # 4: no child
        for parent in range(4):
            for child in range(4):
                on[:, 4 + 4 * parent + child] = on[:, parent] & (choice[:, parent] == child)
        on[:, 20:] = torch.rand(n, 12, generator=g) < 0.05
        return on * (1 + 0.1 * torch.randn(n, 32, generator=g)).clamp_min(0.3)

    parents = torch.full((32,), -1)
    parents[4:20] = torch.arange(4).repeat_interleave(4)
    return World(orthonormal(32, d, seed), sample, parents=parents)


def bipolar(n: int, d: int, s: float, seed: int, noise: float = 0.02) -> World:
    """As `flat`, but either sign of a coefficient is as likely: a concept and its opposite."""

    def sample(rows: int, g: torch.Generator) -> Tensor:
        on = torch.rand(rows, n, generator=g) < s / n
        sign = 2 * torch.randint(0, 2, on.shape, generator=g) - 1
        return (on * sign) * (0.5 + torch.rand(on.shape, generator=g))

    return World(low_coherence(n, d, seed), sample, noise, bipolar=True)


def bind(seed: int, n: int = 24, d: int = 32, noise: float = 0.02) -> World:
    """Four pairs of features that add a direction of their own when both are on, in proportion to their product.

    Features 0-7 are the bound pairs; 8-15 are four pairs that merely co-occur, three times as often; all are on by
    themselves as well.
    """
    directions = low_coherence(n + 4, d, seed)
    bound, control = torch.arange(8).view(4, 2), torch.arange(8, 16).view(4, 2)

    def sample(rows: int, g: torch.Generator) -> Tensor:
        on = torch.rand(rows, n, generator=g) < 0.06
        for pairs, p in ((bound, 0.03), (control, 0.10)):
            together = torch.rand(rows, 4, generator=g) < p
            for number, pair in enumerate(pairs):
                on[:, pair] |= together[:, [number]]
        return on * (0.5 + torch.rand(rows, n, generator=g))

    return World(directions[:n], sample, noise, bound=(bound, directions[n:]), control=control)


def modalities(shared: int, private: int, d: int, seed: int, s: float = 3.2, noise: float = 0.02) -> World:
    """Two streams, `image` and `text`, of width `d` each, with features that both have and features of one alone.

    The first `shared` features are in both streams with equal norms, the next `private` in the images, the last
    `private` in the texts.
    """
    n = shared + 2 * private
    image, text = low_coherence(n, d, seed), low_coherence(n, d, seed + 1000)
    text[shared : shared + private] = 0
    image[shared + private :] = 0
    both = torch.cat([image, text], -1)
    features = both / both.norm(dim=-1, keepdim=True)
    return World(features, independent(torch.full((n,), s / n)), noise, streams={"image": d, "text": d})


# ---- by name

WORLDS: dict[str, Callable[[int], World]] = {
    "zipf": lambda seed: zipf(48, 32, s=3.0, seed=seed),
    "decades": lambda seed: decades(48, 32, seed),
    "outliers": lambda seed: outliers(48, 32, s=3.0, seed=seed),
    "groups": lambda seed: groups(8, 6, 32, seed),
    "tree": tree,
    "absorb": absorb,
    "bipolar": lambda seed: bipolar(32, 24, s=3.0, seed=seed),
    "bind": bind,
    "modalities": lambda seed: modalities(16, 8, 24, seed),
}
"""The worlds of the comparison: name to what makes one from a seed."""

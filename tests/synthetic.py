"""Data with known features, and a plain trainer, for the acceptance tests of cores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores import SAECore
from mmsae.spec import ACTS


class Flat(NamedTuple):
    """Independent features: `rows(n, seed)` draws activations `[n, d]`.

    Attributes:
        features: Unit rows `[n_features, d]`.
        p: Probability of each feature.
        noise: Standard deviation of the noise.
        offset: Added to every row.
    """

    features: Tensor
    p: Tensor
    noise: float
    offset: Tensor

    def rows(self, n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        on = torch.rand(n, len(self.p), generator=g) < self.p
        x = (on * (0.5 + torch.rand(n, len(self.p), generator=g))) @ self.features
        return x + self.noise * torch.randn(x.shape, generator=g) + self.offset


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


def flat(n: int, d: int, s: float, seed: int, noise: float = 0.02) -> Flat:
    """Low-coherence features, each on with probability s / n."""
    return Flat(low_coherence(n, d, seed), torch.full((n,), s / n), noise, torch.zeros(d))


def zipf(n: int, d: int, s: float, seed: int, noise: float = 0.02, offset: float = 0.3) -> Flat:
    """As `flat`, but feature i with probability in proportion to 1 / (i + 3), at most a half, and an offset."""
    p = 1 / (torch.arange(n) + 3.0)
    for _ in range(50):  # capped probabilities still sum to s
        free = p < 0.5
        p = torch.where(free, p * ((s - 0.5 * (~free).sum()) / p[free].sum()), 0.5).clamp_max(0.5)
    shift = offset * torch.randn(d, generator=torch.Generator().manual_seed(seed + 50))
    return Flat(low_coherence(n, d, seed), p, noise, shift)


class Absorb(NamedTuple):
    """Parents with exclusive children: `rows(n, seed)` gives activations `[n, d]` and which features are on.

    Features 0-3 are parents (p = 0.15), 4 + 4 i .. 7 + 4 i the children of parent i (0.2 each, none 0.2), and the last
    12 are flat (p = 0.05).
    """

    features: Tensor

    def rows(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        on = torch.zeros(n, 32, dtype=torch.bool)
        on[:, :4] = torch.rand(n, 4, generator=g) < 0.15
        choice = torch.randint(0, 5, (n, 4), generator=g)  # 4: no child
        for parent in range(4):
            for child in range(4):
                on[:, 4 + 4 * parent + child] = on[:, parent] & (choice[:, parent] == child)
        on[:, 20:] = torch.rand(n, 12, generator=g) < 0.05
        return (on * (1 + 0.1 * torch.randn(n, 32, generator=g)).clamp_min(0.3)) @ self.features, on


def absorb(seed: int, d: int = 48) -> Absorb:
    """32 orthonormal features in `d` dimensions."""
    q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]
    return Absorb(q[:32])


def batch_of(x: Tensor) -> dict[str, Any]:
    """A batch of the only stream."""
    return {ACTS: {"x": x}}


def train(
    core: SAECore,
    pool: Tensor,
    steps: int,
    batch_size: int,
    seed: int,
    lr: float = 3e-3,
    target_l0: float | None = None,
    coefficient: str = "",
    each: Callable[[int], None] | None = None,
    batches: Callable[[Tensor], dict[str, Any]] = batch_of,
) -> SAECore:
    """Train with the recipe of the acceptance tests: 100 steps of warm-up, a fifth of decay, clipping at 1.

    Args:
        core: Trained in place.
        pool: Rows, drawn with replacement.
        steps: Optimizer steps.
        batch_size: Rows per step.
        seed: Of the draws.
        lr: Learning rate of Adam.
        target_l0: A controller moves `coefficient` by 1 % a step until the running L0 is this.
        coefficient: Attribute with the price of sparsity.
        each: Called with the number of each step, after it.
        batches: Makes a batch of rows of the pool, which may hold several streams side by side.
    """
    core.train()
    core.start(batches(pool[:8192]))
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(core.parameter_groups(), lr=lr)
    l0 = None
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 100, (steps - step + 1) / (0.2 * steps))
        batch = batches(pool[torch.randint(0, len(pool), (batch_size,), generator=g)])
        losses = core.losses(batch)
        optimizer.zero_grad()
        torch.stack(list(losses.terms.values())).sum().backward()
        core.before_step()
        torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        core.after_step(step, losses.codes.detach())
        core.count(losses.codes.firings(), batch_size)
        if target_l0 is not None:
            now = float(losses.codes.l0().float().mean())
            l0 = now if l0 is None else 0.9 * l0 + 0.1 * now
            if 100 < step <= 0.8 * steps:
                setattr(core, coefficient, getattr(core, coefficient) * (1.01 if l0 > target_l0 else 0.99))
        if each is not None:
            each(step)
    return core


class Scores(NamedTuple):
    """Of a core on held-out rows."""

    fvu: float
    l0: float
    dead: float
    shrink: float
    found: float


@torch.no_grad()
def scores(core: SAECore, x: Tensor, features: Tensor, at: float = 0.9, mode: str = "eval") -> Scores:
    """FVU, L0, share of latents firing in fewer than 1e-4 of the rows, signal kept, share of features found."""
    core = copy.deepcopy(core).train(mode == "train")
    codes: Codes = core.encode(x)
    out = core.decode(codes)
    assert isinstance(out, Tensor)
    fvu = (x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    kept = ((out - x.mean(0)) * (x - x.mean(0))).sum() / (x - x.mean(0)).pow(2).sum()
    dead = (codes.firings() / len(x) < 1e-4).float().mean()
    return Scores(float(fvu), float(codes.l0().float().mean()), float(dead), float(kept),
                  float((best_cosines(core, features) > at).float().mean()))  # fmt: skip


def best_cosines(core: SAECore, features: Tensor) -> Tensor:
    """Of each true feature with its best latent."""
    rows = core.dictionary / core.dictionary.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    return (features @ rows.T).max(dim=1).values

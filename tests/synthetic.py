"""A plain trainer and scores for the acceptance tests of cores; the data are `mmsae.miniatures.worlds`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores import SAECore
from mmsae.metrics import ground_truth
from mmsae.miniatures.worlds import absorb, bind, bipolar, flat, low_coherence, tree, zipf
from mmsae.spec import ACTS

__all__ = [
    "Scores", "absorb", "batch_of", "best_cosines", "bind", "bipolar", "flat", "low_coherence", "scores", "train",
    "tree", "zipf",
]  # fmt: skip


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
    return ground_truth.best_cosines(core.dictionary, features)

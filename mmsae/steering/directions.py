"""Directions that need no dictionary: what every steering with latents has to be compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmsae.errors import MmsaeError


def difference_in_means(x: Tensor, positive: Tensor) -> Tensor:
    """Mean of some activations less the mean of the others, `[d]` (DiffMean of AxBench, arXiv 2501.17148).

    Args:
        x: Activations `[n, d]`.
        positive: bool `[n]`.
    """
    x, positive = _both(x, positive)
    return x[positive].mean(0) - x[~positive].mean(0)


def probe_direction(x: Tensor, positive: Tensor, regularisation: float = 1.0) -> Tensor:
    """Weights of a logistic regression on standardised activations, in raw units, `[d]`, of length 1.

    Args:
        x: Activations `[n, d]`.
        positive: bool `[n]`.
        regularisation: scikit-learn's `C`.
    """
    from sklearn.linear_model import LogisticRegression

    x, positive = _both(x, positive)
    spread = x.std(0).clamp_min(1e-6)
    probe = LogisticRegression(C=regularisation, max_iter=1000)
    probe.fit(((x - x.mean(0)) / spread).cpu().numpy(), positive.cpu().numpy().astype(np.int64))
    weights = torch.as_tensor(probe.coef_[0], dtype=torch.float32, device=x.device) / spread
    return weights / weights.norm()


def random_direction(d: int, norm: float = 1.0, seed: int = 0) -> Tensor:
    """A random direction `[d]` of a norm: the control of any other one."""
    vector = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return norm * vector / vector.norm()


def _both(x: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    x, positive = torch.as_tensor(x).float(), torch.as_tensor(positive).bool()
    if x.dim() != 2 or positive.shape != x.shape[:1]:
        raise MmsaeError(f"activations {tuple(x.shape)} and labels {tuple(positive.shape)} do not fit together.")
    if positive.all() or not positive.any():
        raise MmsaeError("a direction needs activations with the concept and without it; one side is empty.")
    return x, positive

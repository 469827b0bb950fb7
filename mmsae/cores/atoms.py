"""Atoms: a threshold SAE under the atomic inner product, and what tells whether its atoms are unique."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.jump_relu import JumpReLU
from mmsae.errors import MmsaeError, checked
from mmsae.spec import TARGET, ActivationSpec, Batch

ROWS = 4096  # rows refitted at a time


class Atoms(JumpReLU):
    """JumpReLU that starts with atoms measured by the atomic inner product (threshold SAE, arXiv 2509.20784).

    `<u, v>_S = u.T S v / (|u|_S |v|_S)` with `S = E[x x.T]^-1` undoes the anisotropy of the activations, under which
    atoms look far more alike than they are. The encoder starts as `W_dec S`, such that each atom codes itself by 1;
    a threshold then finds the right atoms if they are incoherent (`threshold_interval`), though not their exact
    coefficients (`refit` does). Presumes activations scaled to a mean squared norm of `d_in`
    (`--model.normalise=scale`, or `whiten`, where S is near the identity).

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents; None is four times the width.
        sparsity_coefficient: Price: per active latent ("step"), per unit of saturated code ("tanh"), or of the
            relative distance from `target_l0`, squared ("target_l0").
        sparsity_loss: What is paid for, as in JumpReLU.
        target_l0: Wanted L0, for "target_l0".
        threshold: Initial threshold, in units of the root mean square of the pre-activations.
        bandwidth: Width of the straight-through window, in the same unit.
        dead_after: Rows without firing after which a latent counts as dead.
        ridge: Added to the second moment, as a share of its mean eigenvalue.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int | None = None,
        sparsity_coefficient: float = 1.0,
        sparsity_loss: Literal["step", "tanh", "target_l0"] = "step",
        target_l0: float = 32.0,
        threshold: float = 0.01,
        bandwidth: float = 0.05,
        dead_after: int = 10_000_000,
        ridge: float = 1e-3,
    ) -> None:
        d_latent = 4 * ActivationSpec.of(spec).d_in if d_latent is None else d_latent
        super().__init__(
            spec, d_latent, sparsity_coefficient, sparsity_loss, target_l0, threshold, bandwidth, dead_after
        )
        if TARGET in self.spec.streams:
            raise MmsaeError("Atoms measures its decoder rows in the space it reads and cannot be a transcoder.")
        self.ridge = checked("ridge", ridge, 0)

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """The encoder as the dual of the decoder under the atomic inner product; then threshold and window."""
        metric = atomic_metric(self.inputs(batch), self.ridge)
        self.W_enc.copy_(atomic_encoder(self.W_dec.double(), metric))
        super().start(batch)


def atomic_metric(x: Tensor, ridge: float = 1e-3) -> Tensor:
    """`S = E[x x.T]^-1`, about the origin, not about the mean.

    Args:
        x: Activations `[n, d]`.
        ridge: Added to the second moment, as a share of its mean eigenvalue.

    Returns:
        `[d, d]`, float64.
    """
    x = x.double()
    moment = x.T @ x / len(x)
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.inv(moment + ridge * moment.diagonal().mean().clamp_min(1e-30) * eye)


def atomic_encoder(atoms: Tensor, metric: Tensor) -> Tensor:
    """Encoder rows `[m, d]` under which each of the atoms `[m, d]` codes itself by 1."""
    rows = atoms @ metric
    return rows / (rows * atoms).sum(-1, keepdim=True)


def atomic_cosines(atoms: Tensor, metric: Tensor | None = None) -> Tensor:
    """Cosines of all pairs of atoms `[m, d]` under the metric (None: Euclidean), `[m, m]`."""
    rows = atoms if metric is None else atoms @ metric
    norms = (rows * atoms).sum(-1).clamp_min(1e-30).sqrt()
    return (rows @ atoms.T) / norms[:, None] / norms


def coherence(cosines: Tensor) -> float:
    """Largest magnitude among the cosines `[m, m]` of different atoms."""
    return float(_pairs(cosines).max())


def isometry_bound(coherence: float, n_active: int) -> float:
    """Bound `(K - 1) * coherence` on the restricted isometry constant for K active atoms."""
    return (n_active - 1) * coherence


def unique_up_to(coherence: float) -> int:
    """Most active atoms K with `coherence < 1 / (2 K - 1)`: that sparse, a code is unique and found by L1 too."""
    if coherence <= 0:
        raise MmsaeError("coherence=0 bounds nothing: orthogonal atoms are unique at any sparsity.")
    n_active = int((1 / coherence + 1) / 2)
    return n_active if coherence * (2 * n_active - 1) < 1 else n_active - 1


def threshold_interval(smallest: float, largest: float, coherence: float, n_active: int) -> tuple[float, float] | None:
    """Thresholds that find exactly the active atoms, or None if the theorem promises none.

    Args:
        smallest: Least coefficient.
        largest: Greatest coefficient.
        coherence: Of the atoms.
        n_active: Most atoms active at once.
    """
    low, high = coherence * n_active * largest, smallest - coherence * (n_active - 1) * largest
    return (low, high) if low < high else None


def stability(l0: Tensor, cosines: Tensor) -> float:
    """The largest share q at which codes are unique: `mu_q < 1 / (2 K_q - 1)`, on a grid of a thousandth.

    Args:
        l0: Active atoms of each row `[n]`; K_q is their q-quantile, and at most 1 is always unique.
        cosines: Of all pairs of atoms `[m, m]`; mu_q is the q-quantile of their magnitudes.
    """
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    active, alike = (_quantiles(t.double().flatten(), q) for t in (l0, _pairs(cosines)))
    fine = (active <= 1) | (alike < 1 / (2 * active - 1).clamp_min(1))
    return float(q[fine].max()) if fine.any() else 0.0


def _quantiles(values: Tensor, q: Tensor) -> Tensor:
    values = values.sort().values  # torch.quantile refuses more than 16 million
    return values[(q.to(values.device) * (len(values) - 1)).round().long()].cpu()


def _pairs(cosines: Tensor) -> Tensor:
    m = len(cosines)
    return cosines.abs()[torch.ones(m, m, dtype=torch.bool, device=cosines.device).triu(1)]


@torch.no_grad()
def refit(codes: Codes, x: Tensor, dictionary: Tensor) -> Codes:
    """Least-squares coefficients on the support that was found, which a threshold alone leaves inexact.

    Args:
        codes: What fired.
        x: Activations less `b_dec`, `[n, d]`.
        dictionary: `[d_latent, d]`.

    Returns:
        A pair list of the same support, in the dtype of the codes; coefficients may turn out negative.
    """
    codes = codes.sparse()
    assert codes.indices is not None
    parts = []
    for values, indices, rows in zip(*(t.split(ROWS) for t in (codes.values, codes.indices, x)), strict=True):
        on = (values != 0).double()
        atoms = dictionary.double()[indices] * on[..., None]  # [n, k, d]
        gram = atoms @ atoms.mT
        scale = gram.diagonal(dim1=-2, dim2=-1)
        # a place that is off gets the identity; twins among the atoms must not make the system singular
        system = gram + torch.diag_embed((1 - on) + 1e-14 * scale)
        parts.append(torch.linalg.solve(system, (atoms @ rows.double()[..., None]))[..., 0] * on)
    fitted = torch.cat(parts) if parts else codes.values.double()
    return Codes(fitted.to(codes.values.dtype), codes.indices, codes.d_latent, codes.extra)

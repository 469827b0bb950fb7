"""Archetypal SAE: latents are mixtures of points of the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import dense_linear
from mmsae.spec import TARGET, ActivationSpec, Batch

ROWS = 4096  # rows assigned to centroids at a time


class Archetypal(TopK):
    """TopK whose decoder rows are convex mixtures of points of the data, for stable dictionaries (arXiv 2502.12892).

    `decoder_rows = exp(scale) (mixture @ points + offset)`: points are centroids of the activations and stay, rows of
    `mixture` are non-negative and sum to 1, rows of `offset` are short. With `delta` 0 this is A-SAE, with a
    little room RA-SAE, whose dictionaries agree better between seeds than TopK's where latents are plentiful. Every
    step costs `d_latent * n_points * d` on top.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Latents kept per activation.
        n_points: Points, at least `d_latent`; None is twice as many.
        delta: Largest norm of an offset, as a share of the mean norm of the points; 0 keeps to mixtures.
        aux_coefficient: Weight of AuxK; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
        seed: Of the centroids, which dictionaries that are to be compared must share.
    """

    points: Tensor
    reach: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        n_points: int | None = None,
        delta: float = 1.0,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
        seed: int = 0,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        self.decoder_norm = "free"
        self.n_points = 2 * d_latent if n_points is None else n_points
        if self.n_points < d_latent:
            raise MmsaeError(f"n_points={n_points} is less than d_latent={d_latent}: take at least as many points.")
        self.delta = checked("delta", delta, 0)
        self.seed = seed
        rows = torch.randn(self.n_points, self.spec.d_out)
        rows[:d_latent] = self.W_dec.detach()
        del self.W_dec  # a mixture takes its place: `decoder_rows`
        self.register_buffer("points", rows / rows.norm(dim=-1, keepdim=True))
        self.register_buffer("reach", torch.tensor(float(delta)))
        self.mixture = nn.Parameter(torch.eye(d_latent, self.n_points))
        self.offset = nn.Parameter(torch.zeros(d_latent, self.spec.d_out))
        self.scale = nn.Parameter(torch.zeros(()))

    @property
    def decoder_rows(self) -> Tensor:
        """Mixtures and their offsets `[d_latent, d_out]`, made anew each time."""
        return self.scale.exp() * (dense_linear(self.mixture, self.points.t()) + self.offset)

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """Points at centroids of the sample, less `b_dec`; the encoder along the first of them."""
        super().start(batch)
        target = self.target(batch).float()
        if len(target) < self.n_points:
            raise MmsaeError(
                f"n_points={self.n_points} needs as many rows, but the sample has {len(target)}: raise "
                "model.sample_rows, or lower n_points."
            )
        self.points.copy_(centroids(target, self.n_points, self.seed) - self.b_dec)
        self.reach.copy_(self.delta * self.points.norm(dim=-1).mean())
        if TARGET not in self.spec.streams:
            rows = self.dictionary
            self.W_enc.copy_(rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Mixtures are mixtures again, and offsets within reach."""
        self.mixture.relu_()
        total = self.mixture.sum(-1, keepdim=True)
        # a row that lost everything starts again from its own point
        self.mixture.copy_(torch.where(total > 1e-8, self.mixture / total.clamp_min(1e-8), torch.eye(
            *self.mixture.shape, device=total.device)))  # fmt: skip
        norms = self.offset.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        self.offset.mul_((self.reach / norms).clamp_max(1))

    def written(self) -> tuple[Tensor, ...]:
        """Points and offsets move into raw units, codes keep theirs."""
        return self.points, self.offset


def centroids(x: Tensor, n: int, seed: int = 0, n_iterations: int = 10) -> Tensor:
    """Centres of k-means on rows `[n_rows, d]`, by Lloyd's iteration from `n` of the rows, `[n, d]`."""
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
    centres = x[chosen.to(x.device)]
    for _ in range(n_iterations):
        nearest = torch.cat([torch.cdist(part, centres).argmin(-1) for part in x.split(ROWS)])
        counts = torch.bincount(nearest, minlength=n)
        totals = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(counts[:, None] > 0, totals / counts[:, None].clamp_min(1), centres)
    return centres

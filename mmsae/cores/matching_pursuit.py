"""MP-SAE: matching pursuit unrolled as the encoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmsae.codes import Codes, merge_repeats
from mmsae.cores.base import Affine, Losses, SAECore, squared_error, variance
from mmsae.cores.linear import keep_norms, to_unit
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import dense_linear, linear_topk, sparse_decode
from mmsae.kernels.cpu import rows_per_chunk
from mmsae.spec import TARGET, ActivationSpec, Batch

GRAM_LATENTS = 16384  # beyond this the products of all pairs of latents take more than a gigabyte


class MatchingPursuit(SAECore):
    """Explains an activation latent by latent, each time by the one that fits best what is left (arXiv 2506.03093).

    There is no encoder: the dictionary is correlated with the residual, so that children which are orthogonal to their
    parent only once the parent is known are found, and so is the sparsity at inference: `encode(x, steps=8)` or
    `encode(x, tolerance=0.1)` takes any, and more steps never reconstruct worse. A latent chosen again adds to its
    code.

    Presumes centred activations, since it has no bias of its own (`--model.normalise=center`), and reconstructs what
    it reads. Gradients flow through values and residuals, not through the choice.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Steps, so that at most k latents fire.
        tolerance: A row stops early once its residual has at most this norm, in the units the core is trained in.
        aux_coefficient: Weight of the share of the residual that one more step among dead latents leaves unexplained;
            0 switches it off.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
        repeats: Whether a row goes on after a latent that it has chosen before; SAELens ends it with that step.
    """

    b_dec: Tensor
    metric: Tensor
    stop: Tensor
    variance: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        tolerance: float = 0.0,
        aux_coefficient: float = 1 / 32,
        dead_after: int = 10_000_000,
        repeats: bool = True,
    ) -> None:
        super().__init__(spec, d_latent)
        self.repeats = repeats
        if TARGET in self.spec.streams:
            raise MmsaeError("MatchingPursuit explains what it reads and cannot be a transcoder: choose TopK.")
        self.spec = ActivationSpec({self.spec.input: self.spec.d_in})
        self.k = checked("k", k, 1)
        self.tolerance = checked("tolerance", tolerance, 0)
        self.aux_coefficient = checked("aux_coefficient", aux_coefficient, 0)
        self.dead_after = checked("dead_after", dead_after, 1)
        rows = torch.randn(d_latent, self.spec.d_out)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=-1, keepdim=True))
        self.register_buffer("b_dec", torch.zeros(self.spec.d_out))  # nothing until a mean is folded in
        self.register_buffer("metric", torch.eye(self.spec.d_in))  # rows @ metric are unit, also after a fold
        self.register_buffer("stop", torch.tensor(float(tolerance)))
        self.register_buffer("variance", torch.ones(()))

    @property
    def dictionary(self) -> Tensor:
        """Decoder rows `[d_latent, d_out]`."""
        return self.W_dec

    def encode(
        self,
        x: Tensor | dict[str, Tensor],
        batch: Batch | None = None,
        steps: int | None = None,
        tolerance: float | None = None,
    ) -> Codes:
        """Codes by pursuit.

        Args:
            x: `[..., d_in]`.
            batch: Not needed.
            steps: In place of `k`.
            tolerance: In place of that of the constructor; in a folded core, in the units of the raw activations
                (in whitened units where a whitening was folded).
        """
        if isinstance(x, dict):
            x = x[self.spec.input]
        steps = self.k if steps is None else checked("steps", steps, 1)
        stop = self.stop if tolerance is None else checked("tolerance", tolerance, 0)
        residual = x.reshape(-1, x.shape[-1]).to(self.W_dec.dtype) - self.b_dec
        atoms: Tensor = self.W_dec
        if not self.training:  # only a fold makes it other than the identity
            with torch.autocast(x.device.type, enabled=False):
                residual, atoms = residual @ self.metric, atoms @ self.metric
        indices = self._choose(residual.detach(), atoms.detach(), steps)
        # the pursuit again, along the latents chosen: its gradients touch no other
        ones = residual.new_ones(indices.numel(), 1)
        chosen = sparse_decode(ones, indices.view(-1, 1), atoms).view(*indices.shape, -1)  # [n, steps, d]
        ended = torch.zeros_like(indices, dtype=torch.bool)
        if not self.repeats:
            again = (indices[:, :, None] == indices[:, None, :]).tril(-1).any(-1)
            ended = again.cumsum(1) > again  # behind the step that repeats a latent
        taken = []
        for row, over in zip(chosen.unbind(1), ended.unbind(1), strict=True):
            value = (residual * row).sum(-1)
            value = value.relu() * (residual.detach().norm(dim=-1) > stop) * ~over
            residual = residual - value[:, None] * row
            taken.append(value)
        values = merge_repeats(torch.stack(taken, -1), indices)
        shape = (*x.shape[:-1], steps)
        return Codes(values.view(shape), indices.view(shape), self.d_latent)

    @torch.no_grad()
    def _choose(self, residual: Tensor, atoms: Tensor, steps: int) -> Tensor:
        """The latent of each step, int64 `[n, steps]`."""
        n = len(residual)
        indices = torch.empty(n, steps, dtype=torch.int64, device=residual.device)
        if self.d_latent > min(GRAM_LATENTS, n * steps):  # products of all pairs would cost more than they spare
            for step in range(steps):
                values, best = linear_topk(residual, atoms, None, 1)
                indices[:, step] = best[:, 0]
                residual = residual - values.relu() * atoms[best[:, 0]]
            return indices
        with torch.autocast(residual.device.type, enabled=False):
            products = atoms @ atoms.t()
            rows = rows_per_chunk(atoms)
            for begin in range(0, n, rows):
                correlation = residual[begin : begin + rows] @ atoms.t()
                for step in range(steps):
                    values, best = correlation.max(-1)
                    indices[begin : begin + rows, step] = best
                    correlation -= values.relu()[:, None] * products[best]
        return indices

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction `[..., d_out]`."""
        if codes.indices is None:
            return dense_linear(codes.values, self.W_dec.t()) + self.b_dec
        return sparse_decode(codes.values, codes.indices, self.W_dec) + self.b_dec

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """The variance that the main term is divided by."""
        self.variance.copy_(variance(self.inputs(batch).float()).clamp_min(1e-12))

    def losses(self, batch: Batch) -> Losses:
        """Fraction of variance unexplained, and the revival of dead latents once there are any."""
        x = self.inputs(batch)
        codes = self.encode(x)
        reconstruction = self.decode(codes)
        terms = {"reconstruction": squared_error(x, reconstruction) / self.variance}
        if self.aux_coefficient and self.training:
            terms["aux"] = self.aux_coefficient * self._revival((x - reconstruction).detach())
        return Losses(terms, codes, reconstruction)

    def _revival(self, residual: Tensor) -> Tensor:
        """Share of the residual that its best dead latent leaves unexplained (0 if none is dead)."""
        dead = self.dead_latents(self.dead_after)
        size = residual.pow(2).sum(-1).mean()
        if len(dead) == 0:
            return torch.zeros_like(size)
        rows = self.W_dec.index_select(0, dead)
        values, indices = linear_topk(residual, rows, None, 1)
        left = squared_error(residual, sparse_decode(values.relu(), indices, rows))
        some = size > 1e-12 * self.variance  # where all is explained, what rounding left must not be divided
        return torch.where(some, left / torch.where(some, size, 1.0), 0.0)

    @torch.no_grad()
    def before_step(self) -> None:
        """Remove the part of the gradient that would only change the norm of the rows."""
        keep_norms(self.W_dec)

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Back to unit rows: a pursuit takes away exactly what it finds only along these."""
        to_unit(self.W_dec)

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation: a number changes the unit of the codes, a matrix how residuals are measured."""
        source = affine[self.spec.input]
        self.b_dec.copy_(source.writing(self.b_dec) + source.mean.double())
        if source.scale.ndim == 0:
            self.stop.div_(source.scale)
        else:
            self.W_dec.copy_(source.writing(self.W_dec))
            self.metric.copy_(source.scale.double() @ self.metric.double())

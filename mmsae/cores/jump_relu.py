"""JumpReLU with straight-through gradients for its thresholds."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmsae.codes import Codes
from mmsae.cores.base import Losses, squared_error
from mmsae.cores.linear import LinearCore
from mmsae.errors import checked
from mmsae.kernels import dense_linear, linear_above
from mmsae.spec import ActivationSpec, Batch

ROWS = 128  # rows treated at a time: few enough to stay in the cache between the passes


class _Jump(torch.autograd.Function):
    """`pre * 1[pre > threshold]`, and how many of a row's entries jump; with the straight-through gradients of both.

    With the rectangle K of a width around the threshold, d code / d threshold = -(threshold / width) K and
    d count / d threshold = -(1 / width) K, on pre-activations just below the threshold as well.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold, width)
        codes, counts = torch.empty_like(pre), pre.new_empty(len(pre))
        for rows in _parts(len(pre)):
            above = pre[rows] > _of(threshold, rows)
            codes[rows] = torch.where(above, pre[rows], 0.0)  # not a product: padding is minus infinity
            counts[rows] = above.sum(-1).to(pre.dtype)
        return codes, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        by_codes, by_counts = grads
        pre, threshold, width = ctx.saved_tensors
        by_pre, by_threshold = torch.empty_like(pre), torch.zeros_like(threshold)
        for rows in _parts(len(pre)):
            height, span, x = _of(threshold, rows), _of(width, rows), pre[rows]
            torch.mul(by_codes[rows], x > height, out=by_pre[rows])
            near = (x - height).abs_() < span / 2
            part = (by_codes[rows] * height).add_(by_counts[rows, None]).div_(-span).mul_(near)
            if threshold.ndim == 1:
                by_threshold += part.sum(0)
            else:
                by_threshold[rows] = part
        return by_pre, by_threshold, None


def _parts(n_rows: int) -> list[slice]:
    return [slice(begin, begin + ROWS) for begin in range(0, n_rows, ROWS)]


def _of(per_latent: Tensor, rows: slice) -> Tensor:
    """A value per latent, or per entry when it has rows."""
    return per_latent if per_latent.ndim == 1 else per_latent[rows]


class JumpReLU(LinearCore):
    """Keeps pre-activations above a learnt threshold per latent, and pays for their number (arXiv 2407.14435).

    Presumes activations scaled to a mean squared norm of `d_in` (`--model.normalise=center_scale`).

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        sparsity_coefficient: Price: per active latent ("step"), per unit of saturated code ("tanh"), or of the
            relative distance from `target_l0`, squared ("target_l0").
        sparsity_loss: What is paid for: `sum 1[pre > threshold]`, `sum tanh(4 z ||w||)` with a pre-activation term for
            dead latents, or `(L0 / target_l0 - 1)^2`.
        target_l0: Wanted L0, for "target_l0".
        threshold: Initial threshold, in units of the root mean square of the pre-activations.
        bandwidth: Width of the straight-through window, in the same unit.
        dead_after: Rows without firing after which a latent counts as dead.
    """

    centres_input: ClassVar[bool] = False
    selects_per_latent: ClassVar[bool] = True

    unit: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        sparsity_coefficient: float = 1.0,
        sparsity_loss: Literal["step", "tanh", "target_l0"] = "step",
        target_l0: float = 32.0,
        threshold: float = 0.01,
        bandwidth: float = 0.05,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(spec, d_latent, "unit" if sparsity_loss != "tanh" else "free")
        self.sparsity_coefficient = checked("sparsity_coefficient", sparsity_coefficient, 0)
        self.sparsity_loss = sparsity_loss
        self.target_l0 = checked("target_l0", target_l0, 1e-6, d_latent)
        self.threshold = checked("threshold", threshold, 0)
        self.bandwidth = checked("bandwidth", bandwidth, 1e-9)
        self.dead_after = checked("dead_after", dead_after, 1)
        self.theta = nn.Parameter(torch.full((d_latent,), float(threshold)))
        self.register_buffer("unit", torch.ones(d_latent))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The thresholds apart, never decayed."""
        rest = [p for name, p in self.named_parameters() if name != "theta"]
        return [{"params": rest}, {"params": [self.theta], "weight_decay": 0.0}]

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """Threshold and window in units of the pre-activations."""
        pre = self.pre_activations(self.inputs(batch)[:4096])
        self.unit.fill_(pre.pow(2).mean().sqrt())
        self.theta.copy_(self.threshold * self.unit)

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """What exceeds its threshold; a pair list unless too many do in training.

        Pairs are those that fire or lie in the window below. `extra["l0"]` is the L0, which has a gradient, too.
        """
        theta, width = self.theta.view(-1), self.bandwidth * self.unit
        x, table, bias, centre = self.encoder(x)
        found = linear_above(x, table, bias, (theta - width / 2).detach(), centre, padding=-torch.inf)
        if found is None:
            pre, indices = self.pre_activations(x), None
        else:
            pre, indices = found
            theta, width = (t.index_select(0, indices.flatten()).view(-1, pre.shape[-1]) for t in (theta, width))
        values, l0 = _Jump.apply(pre.view(-1, pre.shape[-1]), theta, width)
        codes = Codes(values.view_as(pre), indices, self.d_latent, {"l0": l0.view(pre.shape[:-1])})
        return codes if self.training else codes.sparse()

    def losses(self, batch: Batch) -> Losses:
        """Squared error and the price of firing."""
        x, target = self.inputs(batch), self.target(batch)
        codes = self.encode(x)
        reconstruction = self.decode(codes)
        terms = {"reconstruction": squared_error(target, reconstruction)}
        if self.sparsity_loss == "tanh":
            norms = self.W_dec.norm(dim=-1)
            if codes.indices is not None:
                norms = norms.index_select(0, codes.indices.flatten()).view_as(codes.values)
            terms["sparsity"] = self.sparsity_coefficient * (4 * codes.values * norms).tanh().sum(-1).mean()
            terms["aux"] = self._revival(x)
        else:
            l0 = codes.extra["l0"]
            price = l0.mean() if self.sparsity_loss == "step" else (l0.mean() / self.target_l0 - 1).pow(2)
            terms["sparsity"] = self.sparsity_coefficient * price
        return Losses(terms, codes, reconstruction)

    def _revival(self, x: Tensor) -> Tensor:
        """Pulls dead latents back to their thresholds; the small constant is SAELens's."""
        dead = self.dead_latents(self.dead_after)
        x, table, bias, _ = self.encoder(x)
        pre = dense_linear(x, table.index_select(0, dead), bias.index_select(0, dead))
        norms = self.W_dec.index_select(0, dead).norm(dim=-1)
        return 3e-6 * ((self.theta.index_select(0, dead) - pre).relu() * norms).sum(-1).mean()

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Unit rows, thresholds not below 0."""
        super().after_step(step, codes)
        self.theta.clamp_min_(0)

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Codes, thresholds and windows times `factor`."""
        super().rescale(factor)
        self.theta.mul_(factor)
        self.unit.mul_(factor)

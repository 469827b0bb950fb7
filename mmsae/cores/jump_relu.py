"""JumpReLU with straight-through gradients for its thresholds."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import Losses
from mmsae.cores.linear import LinearCore
from mmsae.errors import checked
from mmsae.spec import ActivationSpec, Batch


def _window(pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
    """Rectangle kernel K((pre - threshold) / bandwidth)."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


class _Jump(torch.autograd.Function):
    """`pre * 1[pre > threshold]`; d/d threshold = -(threshold / bandwidth) K."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, bandwidth)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        pre, threshold, bandwidth = ctx.saved_tensors
        by_threshold = -(threshold / bandwidth) * _window(pre, threshold, bandwidth) * grad
        return grad * (pre > threshold), by_threshold.reshape(-1, threshold.numel()).sum(0), None


class _Step(torch.autograd.Function):
    """`1[pre > threshold]`; d/d threshold = -(1 / bandwidth) K, on pre-activations just below it as well."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, bandwidth)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        pre, threshold, bandwidth = ctx.saved_tensors
        by_threshold = -(1 / bandwidth) * _window(pre, threshold, bandwidth) * grad
        return None, by_threshold.reshape(-1, threshold.numel()).sum(0), None


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
        pre = self.pre_activations(self.inputs(batch)[:32768])
        self.unit.fill_(pre.pow(2).mean().sqrt())
        self.theta.copy_(self.threshold * self.unit)

    def select(self, pre: Tensor) -> Codes:
        """Dense in training, where the window needs all pre-activations; a pair list otherwise."""
        codes = Codes(_Jump.apply(pre, self.theta, self.bandwidth * self.unit), None, self.d_latent)
        return codes if self.training else codes.sparse()

    def losses(self, batch: Batch) -> Losses:
        """Squared error and the price of firing."""
        pre = self.pre_activations(self.inputs(batch))
        window = self.bandwidth * self.unit
        codes = Codes(_Jump.apply(pre, self.theta, window), None, self.d_latent)
        reconstruction = self.decode(codes)
        error = (self.target(batch) - reconstruction).pow(2).sum(-1).mean()
        if self.sparsity_loss == "tanh":
            norms = self.W_dec.norm(dim=-1)
            price = (4 * codes.values * norms).tanh().sum(-1).mean()
            dead = self.rows_since_fired >= self.dead_after
            # pulls dead latents back to their thresholds; the small constant is SAELens's
            revive = 3e-6 * ((self.theta - pre).relu() * norms * dead).sum(-1).mean()
            terms = {"reconstruction": error, "sparsity": self.sparsity_coefficient * price, "aux": revive}
            return Losses(terms, codes, reconstruction)
        l0 = _Step.apply(pre, self.theta, window).sum(-1).mean()
        price = l0 if self.sparsity_loss == "step" else (l0 / self.target_l0 - 1).pow(2)
        terms = {"reconstruction": error, "sparsity": self.sparsity_coefficient * price}
        return Losses(terms, codes, reconstruction)

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

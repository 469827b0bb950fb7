"""How much each latent contributes to a number that a model computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError, checked
from mmsae.hooks import edit, resolve
from mmsae.layout import from_positions, to_positions
from mmsae.steering.intervene import modules_of


@dataclass
class Attribution:
    """Effects on the number, to first order: what it would lose if the latents took their values of the baseline.

    Attributes:
        effects: A pair list `[B, T, n]` of the latents that are active in the input or in the baseline.
        error: Effect of what the dictionary does not explain, `[B, T]`.
        value: The number itself.
        baseline: The number with the activation of the baseline.
    """

    effects: Codes
    error: Tensor
    value: float
    baseline: float

    def by_latent(self) -> Tensor:
        """Effects summed over examples and positions, `[d_latent]`."""
        assert self.effects.indices is not None
        total = self.effects.values.new_zeros(self.effects.d_latent)
        return total.index_add_(0, self.effects.indices.reshape(-1), self.effects.values.reshape(-1))

    def top(self, n: int = 10) -> tuple[Tensor, Tensor]:
        """The latents of largest effect in either direction, int64 `[n]`, and their effects."""
        total = self.by_latent()
        ids = total.abs().topk(min(n, len(total))).indices
        return ids, total[ids]


def attribute(
    model: Any,
    dictionary: SAECore,
    hook_point: str,
    metric: Callable[[], Tensor],
    method: Literal["gradient", "integrated"] = "gradient",
    steps: int = 10,
    counterfactual: Tensor | None = None,
    channels_last: bool = False,
) -> Attribution:
    """Attribute a number to the latents of one hook point, all latents and positions at once.

    "gradient" takes one forward and backward pass, `(z - z_0) * ∂m/∂z`. "integrated" averages the gradient over `steps`
    points between the input and the baseline, beginning at the input, as the public code of arXiv 2403.19647
    (*Sparse Feature Circuits*) does: exact where the model between hook point and number is linear, and closer to the
    effect of an ablation where it is not.

    Args:
        model: As for `steer`.
        dictionary: Of this hook point, with a linear decoder.
        hook_point: Exactly one module.
        metric: Calls the model and returns the number (a 0-dim tensor, or one number for each example, which are
            summed): a logit, a difference of logits, a similarity, an error.
        method: See above.
        steps: Points of "integrated".
        counterfactual: Activation of another input, in the model's own shape, that is the baseline; None takes codes
            of 0 and the same error.
        channels_last: Feature maps are `[B, H, W, C]`.

    Raises:
        MmsaeError: The metric does not depend on the hook point, or the decoder is not linear.
    """
    if not dictionary.linear_decode:
        raise MmsaeError(f"{type(dictionary).__name__} has no linear decoder: attribute by ablating latents instead.")
    checked("steps", steps, 1)
    modules, _ = modules_of(model)
    points = resolve(modules, [hook_point])
    if len(points) != 1:
        raise MmsaeError(f"{hook_point!r} matches {len(points)} modules; attribute to one at a time.")
    name = points[0].name
    seen: dict[str, Tensor] = {}

    def look(tensor: Tensor) -> Tensor:
        seen.setdefault("x", tensor.detach().clone())
        return tensor

    with torch.no_grad(), edit(modules, {name: look}):
        value = metric().sum()
    shape = seen["x"].shape
    x = _positions(seen["x"], channels_last)
    with torch.no_grad():
        dictionary.to(x.device)
        codes = dictionary.encode(x).sparse()
        explained = dictionary.decode(codes)
        if not isinstance(explained, Tensor):
            raise MmsaeError("a dictionary of several streams cannot be attributed to at one hook point.")
        rows = dictionary.dictionary.to(x.dtype)
        assert codes.indices is not None
        if counterfactual is None:
            others = Codes(codes.values[..., :0], codes.indices[..., :0], codes.d_latent)
            base = x - (explained - dictionary.decode(others))  # type: ignore[operator]
            error_gap = torch.zeros_like(x)
        else:
            if counterfactual.shape != shape:
                raise MmsaeError(
                    f"the counterfactual has the shape {tuple(counterfactual.shape)}, the activation {tuple(shape)}."
                )
            base = _positions(counterfactual.to(x.device), channels_last)
            others = dictionary.encode(base).sparse()
            error_gap = (x - explained) - (base - dictionary.decode(others))  # type: ignore[operator]

    def run(at: Tensor) -> tuple[Tensor, Tensor]:
        given: dict[str, Tensor] = {}

        def put(tensor: Tensor) -> Tensor:
            if "x" in given:  # of several calls the first one is attributed to
                return tensor
            given["x"] = at.detach().to(tensor.dtype).requires_grad_()
            return from_positions(given["x"], shape, channels_last).clone()

        with torch.inference_mode(False), torch.enable_grad(), edit(modules, {name: put}):
            number = metric().sum()
        if not number.requires_grad:
            raise MmsaeError(f"the metric does not depend on {name!r}; choose a hook point before it.")
        slope = torch.autograd.grad(number, given["x"])[0]
        return number.detach(), slope.to(x.dtype)

    points_between = 1 if method == "gradient" else steps
    slope = torch.zeros_like(x)
    for i in range(points_between):
        slope += run(x + i / points_between * (base - x))[1] / points_between
    with torch.no_grad():
        lowest = run(base)[0]
        assert others.indices is not None
        ours = codes.values * _dots(slope, rows, codes.indices)
        theirs = -others.values * _dots(slope, rows, others.indices)
        effects = Codes(
            torch.cat([ours, theirs.to(ours)], -1), torch.cat([codes.indices, others.indices], -1), codes.d_latent
        )
        return Attribution(effects, (slope * error_gap).sum(-1), float(value), float(lowest))


def _positions(tensor: Tensor, channels_last: bool) -> Tensor:
    x, _ = to_positions(tensor, channels_last)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dots(slope: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """`⟨slope, row⟩` of the latents of a pair list, `[B, T, n]`; example by example, to bound the memory."""
    return torch.stack([torch.einsum("td,tnd->tn", s, rows[i]) for s, i in zip(slope, indices, strict=True)])

"""Products and losses that are dense by nature, without needless passes over large arrays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmsae.kernels.precision import linear, outer, selection_dtype

ROWS = 256  # rows of a batch treated at a time: few enough to stay in the cache between the passes


def dense_linear(x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ table.T + bias`: multiplied in the precision of autocast where it is on, given in that of the table.

    Args:
        x: `[..., d]`.
        table: `[m, d]`, of the same dtype.
        bias: `[m]`.

    Returns:
        `[..., m]`.
    """
    out = _Linear.apply(x.reshape(-1, x.shape[-1]), table, bias, selection_dtype(table))
    return out.view(*x.shape[:-1], len(table))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            ctx.dtype = dtype
            x, low = x.to(dtype), table.to(dtype).contiguous()
            ctx.save_for_backward(x, table)
            return linear(x, low, None if bias is None else bias.to(dtype)).to(table.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, table = ctx.saved_tensors
        by_x = by_table = by_bias = None
        with torch.autocast(x.device.type, enabled=False):
            low = grad.to(ctx.dtype)
            if ctx.needs_input_grad[0]:
                by_x = linear(low, table.to(ctx.dtype).t().contiguous()).to(table.dtype)
            if ctx.needs_input_grad[1]:
                by_table = outer(low, x).to(table.dtype)
            if ctx.needs_input_grad[2]:
                by_bias = grad.sum(0)
        return by_x, by_table, by_bias, None


class _NestedError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        n_rows, n_groups, _ = groups.shape
        by_groups = torch.empty_like(groups)
        last = torch.empty_like(target)
        total = groups.new_zeros((), dtype=torch.float64)
        for begin in range(0, n_rows, ROWS):
            part = slice(begin, begin + ROWS)
            nested = groups[part].cumsum(1) + bias
            last[part] = nested[:, -1]
            nested -= target[part, None]
            total += nested.pow(2).sum()
            # a group is in every prefix from its own on
            nested *= 2 / (n_rows * n_groups)
            by_groups[part] = nested.flip(1).cumsum(1).flip(1)
        ctx.save_for_backward(by_groups)
        ctx.mark_non_differentiable(last)
        return (total / (n_rows * n_groups)).to(groups.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (by_groups,) = ctx.saved_tensors
        by_groups.mul_(grads[0])  # in place, so that a graph serves one backward pass
        return by_groups, by_groups[:, 0].sum(0), None  # the bias is in every prefix, as the first group is


def nested_error(groups: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of the reconstructions from nested prefixes, in one pass that also makes the gradient.

    Args:
        groups: What each group of latents contributes, `[n_rows, n_groups, d]`; prefix p is the sum of the first p.
        bias: Added to each prefix, `[d]`.
        target: `[n_rows, d]`.

    Returns:
        The squared error summed over d and averaged over rows and prefixes, and the whole reconstruction `[n_rows, d]`,
        through which no gradient flows.
    """
    return _NestedError.apply(groups, bias, target)  # type: ignore[return-value]

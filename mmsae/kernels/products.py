"""Products with sparse codes and their exact gradients, without a dense `[batch, d_latent]` in either direction."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmsae.kernels import cpu, reference
from mmsae.kernels.pairs import Pairs


def bodies(device: torch.device) -> ModuleType:
    """The primitives of a device: `csr_matmul`, `pair_dots`, `select`."""
    if device.type == "cpu":
        return cpu
    if device.type == "cuda":
        from mmsae.kernels import gpu  # Triton is loaded with the first CUDA tensor

        return gpu
    return reference


def sum_by_latent(values: Tensor, x: Tensor, pairs: Pairs) -> Tensor:
    """For each latent the sum of `values[j] * x[row of j]` over its pairs: the gradient of a dictionary.

    Args:
        values: `[n_pairs]`.
        x: `[n_rows, d]`.
        pairs: Where the values stand.

    Returns:
        `[n_latents, d]`.
    """
    sorted_pairs = pairs.by_latent
    return bodies(x.device).csr_matmul(
        sorted_pairs.offsets, sorted_pairs.rows, values.index_select(0, sorted_pairs.order), x
    )


def dots(x: Tensor, table: Tensor, pairs: Pairs) -> Tensor:
    """`<x[row of j], table[latent of j]>` for each pair, `[n_pairs]`; no autograd."""
    sorted_pairs = pairs.by_latent  # in this order each row of the table is read once
    found = bodies(x.device).pair_dots(sorted_pairs.rows, sorted_pairs.latents, x, table)
    return torch.empty_like(found).index_copy_(0, sorted_pairs.order, found)


class _Sum(torch.autograd.Function):
    """`out[row] = sum of values[j] * table[latent of j]`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, table: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(values, table)
        ctx.pairs = pairs
        return bodies(table.device).csr_matmul(pairs.offsets, pairs.latents, values, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        values, table = ctx.saved_tensors
        by_values = dots(grad, table, ctx.pairs).to(values.dtype) if ctx.needs_input_grad[0] else None
        by_table = sum_by_latent(values, grad, ctx.pairs) if ctx.needs_input_grad[1] else None
        return by_values, by_table, None


class _Encode(torch.autograd.Function):
    """`out[j] = <x[row] - centre, table[latent]> + bias[latent]`, which the forward pass may know already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centre: Tensor | None, table: Tensor, bias: Tensor | None, pairs: Pairs, known: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, centre, table)
        ctx.pairs = pairs
        return known

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, centre, table = ctx.saved_tensors
        needs_x, needs_centre, needs_table, needs_bias = ctx.needs_input_grad[:4]
        by_x = by_centre = by_table = by_bias = None
        if needs_bias or (needs_centre and not needs_x):
            sorted_pairs = ctx.pairs.by_latent
            by_bias = torch.segment_reduce(  # deterministic on every device, as adding by index is not
                grad.index_select(0, sorted_pairs.order), "sum", offsets=sorted_pairs.offsets, initial=0.0, unsafe=True
            )
        if needs_x:
            by_x = bodies(x.device).csr_matmul(ctx.pairs.offsets, ctx.pairs.latents, grad, table)
        if needs_centre:  # summed over the batch it is a matrix times a vector, not a product per row
            by_centre = -(by_bias @ table) if by_x is None else -by_x.sum(0)
        if needs_table:
            by_table = sum_by_latent(grad, x if centre is None else x - centre, ctx.pairs)
        return by_x, by_centre, by_table, by_bias if needs_bias else None, None, None


def encode_pairs(
    x: Tensor,
    table: Tensor,
    bias: Tensor | None,
    pairs: Pairs,
    centre: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Pre-activations of chosen pairs, with gradients that touch no other latent.

    Args:
        x: `[n_rows, d]`.
        table: Encoder rows `[n_latents, d]`.
        bias: `[n_latents]`.
        pairs: Which pre-activations.
        centre: Subtracted from x, `[d]`.
        known: The result `[n_pairs]`, where it has been computed before.

    Returns:
        `[n_pairs]`.
    """
    if known is None:
        with torch.no_grad():
            known = dots(x if centre is None else x - centre, table, pairs)
            if bias is not None:
                known = known + bias.index_select(0, pairs.latents)
    return _Encode.apply(x, centre, table, bias, pairs, known)


def sparse_decode(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    """`sum_j values[..., j] * dictionary[indices[..., j]]`.

    Both gradients (of the values and of the dictionary) are exact. Runs in the precision of the dictionary.

    Args:
        values: `[..., n]`.
        indices: `[..., n]` int64.
        dictionary: `[d_latent, d_out]`.

    Returns:
        `[..., d_out]`.
    """
    pairs = Pairs.of(indices, len(dictionary))
    out = _Sum.apply(pairs.flat(values).to(dictionary.dtype), dictionary, pairs)
    return out.view(*indices.shape[:-1], dictionary.shape[1])


def sparse_decode_groups(values: Tensor, indices: Tensor, dictionary: Tensor, ends: Tensor) -> Tensor:
    """Decode each group of consecutive latents by itself, at the price of one decode.

    Args:
        values: `[rows, n]`.
        indices: `[rows, n]` int64.
        dictionary: `[d_latent, d_out]`.
        ends: End (exclusive) of each group, ascending int64 `[n_groups]`; the last is `d_latent`.

    Returns:
        `[rows, n_groups, d_out]`; its sum over the groups is `sparse_decode`.
    """
    pairs = Pairs.of(indices, len(dictionary))
    n_bags = pairs.n_rows * len(ends)
    bags, order = (pairs.rows * len(ends) + torch.bucketize(pairs.latents, ends, right=True)).sort(stable=True)
    offsets = torch.searchsorted(bags, torch.arange(n_bags + 1, device=bags.device))
    grouped = Pairs(offsets, pairs.latents.index_select(0, order), bags, len(dictionary))
    out = _Sum.apply(pairs.flat(values).index_select(0, order).to(dictionary.dtype), dictionary, grouped)
    return out.view(pairs.n_rows, len(ends), dictionary.shape[1])

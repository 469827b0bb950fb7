"""The primitives in plain PyTorch, for devices without a body of their own, and to test the others against."""

from __future__ import annotations

import torch
from torch import Tensor


def csr_matmul(offsets: Tensor, columns: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """A sparse matrix `[n, m]` times `table` `[m, d]`: see `mmsae.kernels.cpu.csr_matmul`."""
    n = len(offsets) - 1
    rows = torch.arange(n, device=offsets.device).repeat_interleave(offsets.diff(), output_size=len(columns))
    out = table.new_zeros(n, table.shape[1])
    return out.index_add_(0, rows, values[:, None].to(table.dtype) * table[columns])


def pair_dots(rows: Tensor, columns: Tensor, x: Tensor, table: Tensor) -> Tensor:
    """`<x[rows[j]], table[columns[j]]>`: see `mmsae.kernels.cpu.pair_dots`."""
    return (x[rows] * table[columns].to(x.dtype)).sum(-1)


def select(
    x: Tensor, table: Tensor, bias: Tensor | None, k: int, dtype: torch.dtype, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The k largest of `x @ table.T + bias` in each row: see `mmsae.kernels.cpu.select`."""
    bias = None if bias is None else bias.to(dtype)
    pre = torch.nn.functional.linear(x.to(dtype), table.to(dtype), bias)
    indices = (pre.abs() if signed else pre).topk(k, dim=-1, sorted=False).indices
    return indices, pre.gather(-1, indices).to(torch.promote_types(dtype, torch.float32))

"""The primitives on a CPU: no autograd, no dense `[n, m]` beyond a chunk of rows that stays in the cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.kernels.precision import linear

CHUNK_BYTES = 8 << 20  # pre-activations held at a time: about what a core's caches take
GROUP = 16  # columns whose maximum is looked at first


def csr_matmul(offsets: Tensor, columns: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """A sparse matrix `[n, m]` times `table` `[m, d]`.

    Args:
        offsets: Where the entries of each row begin, and the end, int64 `[n + 1]`.
        columns: int64 `[p]`.
        values: `[p]`.
        table: `[m, d]`.

    Returns:
        `[n, d]`.
    """
    if len(columns) == 0:
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return F.embedding_bag(
        columns,
        table.contiguous(),
        offsets,
        mode="sum",
        per_sample_weights=values.to(table.dtype),
        include_last_offset=True,
    )


def pair_dots(rows: Tensor, columns: Tensor, x: Tensor, table: Tensor) -> Tensor:
    """`<x[rows[j]], table[columns[j]]>` for each pair; fastest when the pairs are sorted by column.

    Args:
        rows: int64 `[p]`.
        columns: int64 `[p]`.
        x: `[n, d]`.
        table: `[m, d]`.

    Returns:
        `[p]`.
    """
    if len(columns) == 0:
        return x.new_zeros(0)
    # the gradient of embedding_bag's weights is just this, without gathering `[p, d]`; offsets are not looked at
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), table.to(x.dtype).contiguous(), columns, rows[:1], rows, 0
    )


def rows_per_chunk(table: Tensor) -> int:
    """Rows whose pre-activations are held at a time, in the precision of `table` `[m, d]`; fewer multiply slowly."""
    return max(256, CHUNK_BYTES // (len(table) * table.element_size()))


def select(
    x: Tensor, table: Tensor, bias: Tensor | None, k: int, dtype: torch.dtype, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The k largest of `x @ table.T + bias` in each row, the product being made in `dtype`.

    Floats that are positive order like the integers of their bits. Maxima of groups of columns are partitioned first:
    the k largest entries lie in the k groups with the largest maxima. Entries that are not positive may be taken in
    any order, since they code nothing.

    Args:
        x: `[n, d]`.
        table: `[m, d]`.
        bias: `[m]`.
        k: Entries per row.
        dtype: Of the product.
        signed: Whether entries are compared by magnitude.

    Returns:
        indices int64 `[n, k]`, unordered, and their scores `[n, k]`, float32 at least.
    """
    table = table.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    rows = rows_per_chunk(table)
    wide = torch.promote_types(dtype, torch.float32)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    scores = torch.empty(len(x), k, dtype=wide)
    for begin in range(0, len(x), rows):
        chunk = slice(begin, begin + rows)
        pre = linear(x[chunk].to(dtype), table, bias)
        indices[chunk] = _topk(pre, k, signed)
        scores[chunk] = pre.gather(-1, indices[chunk])
    return indices, scores


def _topk(pre: Tensor, k: int, signed: bool) -> Tensor:
    """Indices of the k largest of each row of `pre` `[n, m]`."""
    n, m = pre.shape
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}.get(pre.dtype)
    group = next((size for size in (GROUP, 8, 4) if m % size == 0 and m // size > k), None)
    if bits is None or group is None:
        return (pre.abs() if signed else pre).topk(k, dim=-1, sorted=False).indices
    keys = pre.view(bits)
    if signed:
        keys = keys & torch.iinfo(bits).max
    n_groups = m // group
    keys = keys.view(n, group, n_groups)
    best = largest(keys.amax(1), k)
    members = keys.gather(2, best[:, None, :].expand(n, group, k)).view(n, -1)
    place = largest(members, k)
    return place.div(k, rounding_mode="floor").mul_(n_groups).add_(best.gather(1, place % k))


def above(
    x: Tensor, table: Tensor, bias: Tensor | None, lower: Tensor, dtype: torch.dtype, densest: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The entries of `x @ table.T + bias` above `lower`, the product being made in `dtype`.

    Args:
        x: `[n, d]`.
        table: `[m, d]`.
        bias: `[m]`.
        lower: `[m]`.
        dtype: Of the product.
        densest: Share of entries in the first chunk of rows above which None is returned.

    Returns:
        rows int64 `[p]`, ascending, columns int64 `[p]`, and the entries `[p]`, float32 at least.
    """
    m = len(table)
    table, lower = table.to(dtype), lower.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    step = rows_per_chunk(table)
    places, entries = [torch.empty(0, dtype=torch.int64)], [x.new_empty(0, dtype=dtype)]
    for begin in range(0, len(x), step):
        pre = linear(x[begin : begin + step].to(dtype), table, bias)
        found = _nonzero(pre > lower)
        if begin == 0 and len(found) > densest * pre.numel():
            return None
        places.append(found + begin * m)
        entries.append(pre.view(-1).index_select(0, found))
    flat = torch.cat(places)
    wide = torch.promote_types(dtype, torch.float32)
    return flat // m, flat % m, torch.cat(entries).to(wide)


def _nonzero(mask: Tensor) -> Tensor:
    """Flat places of the true entries, int64; looks at eight entries at a time, most being false."""
    flags = mask.view(-1)
    if len(flags) % 8:
        return flags.nonzero()[:, 0]
    words = torch.from_numpy(np.flatnonzero(flags.view(torch.int64).numpy()))
    hits = flags.view(-1, 8).index_select(0, words).nonzero()
    return words.index_select(0, hits[:, 0]).mul_(8).add_(hits[:, 1])


def largest(keys: Tensor, k: int) -> Tensor:
    """Places of the k largest integers of each row, unordered, int64 `[n, k]`; ties go to the later column.

    Args:
        keys: int16 or int32 `[n, width]`.
        k: Places per row.
    """
    n, width = keys.shape
    wide, shift = (torch.int32, 16) if keys.dtype == torch.int16 and width <= 1 << 16 else (torch.int64, 32)
    ordered = keys.to(wide).mul_(1 << shift).add_(torch.arange(width, dtype=wide))
    rows = ordered.numpy()  # numpy partitions with vector instructions, several times as fast as torch.topk
    n_threads = torch.get_num_threads()
    if n_threads == 1 or n < 64:
        rows.partition(width - k, axis=-1)
    else:
        step = -(-n // n_threads)
        parts = [rows[begin : begin + step] for begin in range(0, n, step)]
        list(_pool(n_threads).map(lambda part: part.partition(width - k, axis=-1), parts))
    return (ordered[:, width - k :] & ((1 << shift) - 1)).long()


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads)

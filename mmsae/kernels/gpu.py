"""The sparse primitives on a GPU: Triton bodies without autograd, deterministic, none of which waits for the device.

Launch shapes follow from the shapes of the arguments alone, so that a step of fixed shape fits a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

SLAB = 256  # columns of a table per program: 32 lanes x 16 bytes of bf16
SEGMENT = 256  # pairs of a long row summed by a program of their own: about 10 us of work
CHUNK_BYTES = 32 << 20  # pre-activations alive at a time: they stay in the L2 cache of a large GPU (50 MB)
MIN_ROWS = 256  # per chunk: below the flops per byte of the GPU (H200: 180) the product would wait for the table
GROUP = 16  # columns per group of the first stage of a selection
LAUNCH = {"enable_fp_fusion": True}  # multiply-adds in one rounding: left unset, Triton 3.9 warns and 3.10 stops it


@triton.jit
def _add_pairs(
    columns: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    first: int,
    last: int,
    gap: int,
    skipped: int,
    d: int,
    cols: tl.tensor,
    ACC: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Sum of pairs `first` to `last`, without the `skipped` ones from `gap` on, still spread over `[PAIRS, BLOCK]`."""
    acc = tl.zeros([PAIRS, BLOCK], dtype=ACC)
    for start in tl.range(first, last - skipped, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        inside = pairs < last - skipped
        pairs += tl.where(pairs >= gap, skipped, 0)
        value = tl.load(values + pairs, mask=inside, other=0).to(ACC)
        column = tl.load(columns + pairs, mask=inside, other=0).to(tl.int64)
        wanted = (value != 0)[:, None] & (cols < d)[None, :]  # padding costs no read of the table
        acc += value[:, None] * tl.load(table + column[:, None] * d + cols[None, :], mask=wanted, other=0).to(ACC)
    return acc


@triton.jit
def _whole_segments(
    row_ends: tl.tensor,
    columns: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    partial: tl.tensor,
    d: int,
    ACC: tl.constexpr,
    PAIRS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sums of the aligned segments that lie within one row; the others are left unwritten."""
    segment = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = segment * SEGMENT
    last = first + SEGMENT
    if tl.load(row_ends + segment) >= last:
        acc = _add_pairs(columns, values, table, first, last, last, 0, d, cols, ACC, PAIRS, BLOCK)
        tl.store(partial + segment * d + cols, tl.sum(acc, 0), mask=cols < d)


@triton.jit
def _rows(
    offsets: tl.tensor,
    columns: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    partial: tl.tensor,
    out: tl.tensor,
    d: int,
    ACC: tl.constexpr,
    PAIRS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: the pairs at its ends, and the partial sums of the whole segments between."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    begin, end = (first + SEGMENT - 1) // SEGMENT, last // SEGMENT
    skipped = tl.maximum(end - begin, 0) * SEGMENT
    acc = _add_pairs(columns, values, table, first, last, begin * SEGMENT, skipped, d, cols, ACC, PAIRS, BLOCK)
    for start in tl.range(begin, end, PAIRS):
        segments = start + tl.arange(0, PAIRS)
        wanted = (segments < end)[:, None] & (cols < d)[None, :]
        acc += tl.load(partial + segments[:, None] * d + cols[None, :], mask=wanted, other=0)
    tl.store(out + row * d + cols, tl.sum(acc, 0).to(out.dtype.element_ty), mask=cols < d)


def csr_matmul(offsets: Tensor, columns: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """A sparse matrix times a table: row r is the sum of `values[j] * table[columns[j]]` over its pairs j.

    One program per row and slab of columns; rows run fastest, so that a slab of the table is read again from the
    cache. A row may be long (a latent that fires everywhere): pairs are cut into aligned segments, those that lie
    within one row are summed first, all in parallel, and the program of the row adds these sums to what is left at
    its two ends, always in the same order.

    Args:
        offsets: Ends of the rows among the pairs, int64 `[n + 1]`; pairs outside of them are ignored.
        columns: int64 `[p]`.
        values: `[p]`; a pair of value 0 adds nothing, whatever the table holds.
        table: `[m, d]`.

    Returns:
        `[n, d]` in the dtype of the table, summed in fp32 (fp64 for an fp64 table); 0 for an empty row.
    """
    offsets, columns, values, table = (t.contiguous() for t in (offsets, columns, values, table))
    n, p, d = len(offsets) - 1, len(columns), table.shape[1]
    if not n * p * d:
        return table.new_zeros(n, d)
    wide = table.dtype == torch.float64
    acc = tl.float64 if wide else tl.float32
    block = min(SLAB, triton.next_power_of_2(d))
    slabs = triton.cdiv(d, block)
    starts = torch.arange(0, p // SEGMENT * SEGMENT, SEGMENT, device=offsets.device)
    partial = table.new_empty(len(starts), d, dtype=torch.float64 if wide else torch.float32)
    out = table.new_empty(n, d)
    with torch.cuda.device_of(table):
        if len(starts):
            row_ends = offsets[torch.searchsorted(offsets, starts, right=True).clamp_(max=n)]
            _whole_segments[len(starts), slabs](
                row_ends, columns, values, table, partial, d, acc, 16, SEGMENT, block, num_warps=4, **LAUNCH
            )
        # a warp holds 4 pairs: many short rows run side by side, longer ones get more reads in flight
        pairs = min(16, max(4, triton.next_power_of_2(triton.cdiv(p, n))))
        _rows[n, slabs](
            offsets, columns, values, table, partial, out, d, acc, pairs, SEGMENT, block, num_warps=pairs // 4, **LAUNCH
        )
    return out


@triton.jit
def _dots(
    rows: tl.tensor,
    columns: tl.tensor,
    x: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    p: int,
    d: int,
    ACC: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    pairs = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pairs < p
    left = x + tl.load(rows + pairs, mask=inside, other=0).to(tl.int64)[:, None] * d
    right = table + tl.load(columns + pairs, mask=inside, other=0).to(tl.int64)[:, None] * d
    acc = tl.zeros([PAIRS, BLOCK], dtype=ACC)
    for start in tl.range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        wanted = inside[:, None] & (cols < d)
        a = tl.load(left + cols, mask=wanted, other=0).to(ACC)
        acc += a * tl.load(right + cols, mask=wanted, other=0).to(ACC)
    tl.store(out + pairs, tl.sum(acc, 1), mask=inside)


def pair_dots(rows: Tensor, columns: Tensor, x: Tensor, table: Tensor) -> Tensor:
    """The scalar product `<x[rows[j]], table[columns[j]]>` of every pair j.

    Args:
        rows: int64 `[p]`; pairs sorted by row or by column find the repeated side in the cache.
        columns: int64 `[p]`.
        x: `[n, d]`.
        table: `[m, d]`.

    Returns:
        fp32 `[p]`; fp64 when x or the table is.
    """
    rows, columns, x, table = (t.contiguous() for t in (rows, columns, x, table))
    wide = torch.float64 in (x.dtype, table.dtype)
    p, d = len(rows), x.shape[1]
    out = x.new_empty(p, dtype=torch.float64 if wide else torch.float32)
    if p:
        acc, block = tl.float64 if wide else tl.float32, min(SLAB, triton.next_power_of_2(d))
        with torch.cuda.device_of(x):
            _dots[(triton.cdiv(p, 16),)](rows, columns, x, table, out, p, d, acc, 16, block, num_warps=4, **LAUNCH)
    return out


@triton.jit
def _keys(scores: tl.tensor, KEY: tl.constexpr, TOP: tl.constexpr, SIGNED: tl.constexpr) -> tl.tensor:
    """Integers that order like the scores (like their magnitude if SIGNED); NaN is largest, no score is lowest."""
    bits = scores.to(KEY, bitcast=True)
    shift: tl.constexpr = KEY.primitive_bitwidth - 1
    if SIGNED:
        bits = tl.where(bits == 0, ~TOP, bits).to(KEY)  # +0 becomes -0, and leaves the lowest key to the padding
        keys = ((bits << 1) | ((bits >> shift) & 1)) ^ ~TOP  # the sign moves to the lowest bit
    else:
        wide = scores.to(tl.float32)
        keys = tl.where(wide != wide, TOP, bits ^ ((bits >> shift) & TOP))
    return keys.to(KEY)


def _scores_of(keys: Tensor, dtype: torch.dtype, signed: bool) -> Tensor:
    """The scores, fp32, that `_keys` was given in `dtype`."""
    top, shift = torch.iinfo(keys.dtype).max, 8 * dtype.itemsize - 1
    bits = ((keys ^ ~top) >> 1 & top) | (keys << shift) if signed else keys ^ (keys >> shift & top)
    return bits.view(dtype).float()


@triton.jit
def _group_maxima(
    scores: tl.tensor,
    maxima: tl.tensor,
    m: int,
    n_groups: int,
    KEY: tl.constexpr,
    TOP: tl.constexpr,
    SIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full([BLOCK], ~TOP, dtype=KEY)
    for i in tl.static_range(GROUP):
        cols = groups + i * n_groups
        inside = (groups < n_groups) & (cols < m)
        keys = _keys(tl.load(scores + row * m + cols, mask=inside, other=0), KEY, TOP, SIGNED)
        best = tl.maximum(best, tl.where(inside, keys, ~TOP).to(KEY))
    tl.store(maxima + row * n_groups + groups, best, mask=groups < n_groups)


@triton.jit
def _members(
    scores: tl.tensor,
    groups: tl.tensor,
    keys: tl.tensor,
    m: int,
    n_groups: int,
    k: int,
    KEY: tl.constexpr,
    TOP: tl.constexpr,
    SIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(groups + row * k + places // GROUP, mask=places < k * GROUP, other=m)
    cols = group + (places % GROUP) * n_groups
    inside = cols < m
    found = _keys(tl.load(scores + row * m + cols, mask=inside, other=0), KEY, TOP, SIGNED)
    tl.store(keys + row * k * GROUP + places, tl.where(inside, found, ~TOP).to(KEY), mask=places < k * GROUP)


def _best_in_groups(scores: Tensor, k: int, n_groups: int, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of a chunk as (groups, places among their members, keys), each `[rows, k]`.

    Group g holds columns g, g + n_groups, ... The k largest entries lie in the k groups with the largest maxima.
    """
    rows, m = scores.shape
    short = scores.dtype.itemsize == 2
    key, kind = (tl.int16, torch.int16) if short else (tl.int32, torch.int32)
    top = torch.iinfo(kind).max
    maxima = scores.new_empty(rows, n_groups, dtype=kind)
    _group_maxima[rows, triton.cdiv(n_groups, 512)](
        scores, maxima, m, n_groups, key, top, signed, GROUP, 512, num_warps=2, **LAUNCH
    )
    groups = maxima.topk(k, sorted=False).indices
    members = scores.new_empty(rows, k * GROUP, dtype=kind)
    _members[rows, triton.cdiv(k * GROUP, 256)](
        scores, groups, members, m, n_groups, k, key, top, signed, GROUP, 256, num_warps=4, **LAUNCH
    )
    keys, places = members.topk(k, sorted=False)
    return groups, places, keys


def _plain_topk(scores: Tensor, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    indices = (scores.abs() if signed else scores).topk(k, sorted=False).indices
    return indices, scores.gather(1, indices)


def _score_chunks(x: Tensor, table: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    """`x @ table.T + bias` by chunks of rows, one after another in the same buffer."""
    m = len(table)
    rows = max(CHUNK_BYTES // (m * x.dtype.itemsize) // 128 * 128, MIN_ROWS)  # cuBLAS tiles are 128 rows high
    buffer = x.new_empty(min(rows, len(x)), m)
    for part in x.split(rows):
        chunk = buffer[: len(part)]
        if bias is None:
            yield torch.mm(part, table.T, out=chunk)
        else:
            yield torch.addmm(bias, part, table.T, out=chunk)


@torch.no_grad()
def select(
    x: Tensor, table: Tensor, bias: Tensor | None, k: int, dtype: torch.dtype, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of `x @ table.T + bias`, which never exists as a whole.

    Exact among the scores as computed in `dtype`, ties aside. NaN counts as largest and is not hidden.

    Args:
        x: `[n, d]`.
        table: `[m, d]`, in any layout.
        bias: `[m]`, or None.
        k: Entries per row, at most m.
        dtype: Of the product and its result.
        signed: Whether entries compare by magnitude.

    Returns:
        indices int64 `[n, k]`, their scores `[n, k]` in fp32 (fp64 if `dtype` is), unordered.
    """
    m, wide = len(table), torch.promote_types(dtype, torch.float32)
    if not len(x):
        return x.new_empty(0, k, dtype=torch.int64), x.new_empty(0, k, dtype=wide)
    chunks = _score_chunks(x.to(dtype), table.to(dtype), None if bias is None else bias.to(dtype))
    if m < 64 * k or dtype.itemsize > 4:  # few groups would be left out
        found = [_plain_topk(chunk, k, signed) for chunk in chunks]
        indices, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        return indices, scores.to(wide)
    n_groups = triton.cdiv(m, GROUP * 16) * 16  # every stride aligned to 16 entries, so that reads stay wide
    with torch.cuda.device_of(x):
        best = [_best_in_groups(chunk, k, n_groups, signed) for chunk in chunks]
    groups, places, keys = (torch.cat(parts) for parts in zip(*best, strict=True))
    return groups.gather(1, places // GROUP) + places % GROUP * n_groups, _scores_of(keys, dtype, signed)

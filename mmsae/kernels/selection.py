"""Which latents fire, and their pre-activations: an encoder that never holds `[batch, d_latent]`.

Under autocast the choice is made in its low precision, among a few more candidates than are kept; the pre-activations
of the candidates are then computed in full precision, so that values and gradients are those of the latents chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmsae.kernels import cpu
from mmsae.kernels.pairs import Pairs
from mmsae.kernels.precision import CROSSOVER, selection_dtype
from mmsae.kernels.products import bodies, dots, encode_pairs


def linear_topk(
    x: Tensor,
    table: Tensor,
    bias: Tensor | None,
    k: int,
    centre: Tensor | None = None,
    signed: bool = False,
    spare: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of `(x - centre) @ table.T + bias`.

    Selection goes by index, never by a threshold, so that ties cannot raise the L0. Where fewer than k entries of a row
    are positive (and not `signed`), the rest are any of the others. The gradients, restricted to the entries kept, are
    exact.

    Args:
        x: `[..., d]`.
        table: Encoder rows `[d_latent, d]`, in the precision of the values.
        bias: `[d_latent]`.
        k: Entries kept per row.
        centre: Subtracted from x, `[d]`.
        signed: Whether the largest are those of largest magnitude.
        spare: Candidates beyond k when the choice is made in low precision; None is an eighth of k, at least 4.

    Returns:
        values `[..., k]`, indices int64 `[..., k]`, unordered.
    """
    flat = x.reshape(-1, x.shape[-1])
    dtype = selection_dtype(table)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        inner = flat if centre is None else flat - centre
        width = k
        if dtype != table.dtype:
            width = min(k + (max(4, k // 8) if spare is None else spare), len(table))
        indices, known = bodies(x.device).select(inner, table, bias, width, dtype, signed)
        if dtype != table.dtype:
            candidates = Pairs.of(indices, len(table))
            known = dots(inner, table, candidates).view(indices.shape)
            if bias is not None:
                known += bias.index_select(0, candidates.latents).view_as(known)
            if width > k:
                kept = (known.abs() if signed else known).topk(k, dim=-1, sorted=False).indices
                indices, known = indices.gather(-1, kept), known.gather(-1, kept)
    indices = indices.view(*x.shape[:-1], k)
    pairs = Pairs.of(indices, len(table))
    values = encode_pairs(flat, table, bias, pairs, centre, known.reshape(-1))
    return values.view(indices.shape), indices


def linear_batch_topk(
    x: Tensor, table: Tensor, bias: Tensor | None, budget: int, centre: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `budget` largest positive entries of the whole matrix `(x - centre) @ table.T + bias`.

    The best candidates of each row are taken first and the global cut is made among them. A row that keeps all of its
    candidates gets twice as many, and the cut is repeated. On an accelerator, where looking would stall the queue, rows
    are held to 8 times the mean instead.

    Args:
        x: `[..., d]`.
        table: Encoder rows `[d_latent, d]`, in the precision of the values.
        bias: `[d_latent]`.
        budget: Entries kept in total.
        centre: Subtracted from x, `[d]`.

    Returns:
        values `[..., n]` (0 where not kept), indices int64 `[..., n]`, with n the entries of the fullest row on a CPU.
    """
    flat = x.reshape(-1, x.shape[-1])
    n_rows, d_latent = len(flat), len(table)
    dtype = selection_dtype(table)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        inner = flat if centre is None else flat - centre
        mean = max(1, -(-budget // max(n_rows, 1)))
        if x.device.type == "cpu":
            indices, kept, known = _cut_exactly(inner, table, bias, budget, min(d_latent, 2 * mean), dtype)
            exact = known[kept] if dtype == table.dtype else None
            indices, pairs = Pairs.within(indices, kept, d_latent)
        else:
            indices, known = bodies(x.device).select(inner, table, bias, min(d_latent, 8 * mean), dtype)
            kept = _cut(known, budget)
            exact = known.reshape(-1) if dtype == table.dtype else None
            pairs = Pairs.of(indices, d_latent)
    values = pairs.padded(encode_pairs(flat, table, bias, pairs, centre, exact), indices.shape)
    if x.device.type != "cpu":
        values = values * kept
    return pairs.reshaped(values, indices, x.shape[:-1])


def linear_above(
    x: Tensor,
    table: Tensor,
    bias: Tensor | None,
    lower: Tensor,
    centre: Tensor | None = None,
    padding: float = 0.0,
    densest: float = 1 / CROSSOVER,
) -> tuple[Tensor, Tensor] | None:
    """The entries of `(x - centre) @ table.T + bias` above a bound per latent, if they are few; on a CPU only.

    Args:
        x: `[..., d]`.
        table: Encoder rows `[d_latent, d]`, in the precision of the values.
        bias: `[d_latent]`.
        lower: Bound of each latent `[d_latent]`.
        centre: Subtracted from x, `[d]`.
        padding: Value of the places that shorter rows leave empty.
        densest: Share of entries from which a dense matrix is cheaper; judged by the first rows of `x`.

    Returns:
        values `[..., n]`, which in low precision may lie a little below the bound, and indices int64 `[..., n]`, n
        being the entries of the fullest row; None if there are too many, or on an accelerator, where counting
        them would stall the queue.
    """
    if x.device.type != "cpu":
        return None
    flat = x.reshape(-1, x.shape[-1])
    dtype = selection_dtype(table)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        inner = flat if centre is None else flat - centre
        # low precision rounds at 1/256: with this margin nothing above the bound is missed
        margin = lower.abs() / 64 if dtype != table.dtype else 0.0
        found = cpu.above(inner, table, bias, lower - margin, dtype, densest)
        if found is None:
            return None
        rows, latents, known = found
        counts = torch.bincount(rows, minlength=len(flat))
        indices, pairs = Pairs.ragged(latents, rows, counts, len(table))
        exact = known if dtype == table.dtype else None
    values = pairs.padded(encode_pairs(flat, table, bias, pairs, centre, exact), indices.shape, padding)
    return pairs.reshaped(values, indices, x.shape[:-1])


def _cut(scores: Tensor, budget: int) -> Tensor:
    """Which of the scores `[n_rows, n]` are among the `budget` largest of all, and positive."""
    budget = min(budget, scores.numel())
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        best = cpu.largest(scores.reshape(1, -1).view(torch.int32), budget)[0]
    else:
        best = scores.flatten().topk(budget, sorted=False).indices
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[best] = True
    return kept.view(scores.shape) & (scores > 0)


def _cut_exactly(
    x: Tensor, table: Tensor, bias: Tensor | None, budget: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates `[n_rows, width]`, which of them make the cut, and their scores."""
    indices, scores = cpu.select(x, table, bias, width, dtype)
    while True:
        kept = _cut(scores, budget)
        full = kept.all(-1).nonzero()[:, 0]
        if len(full) == 0 or width == len(table):
            return indices, kept, scores
        # few different sizes, by repeating rows: oneDNN compiles and keeps a product for each
        full = full[torch.arange(-(-len(full) // 128) * 128) % len(full)]
        more = min(len(table), 2 * width)
        found = cpu.select(x[full], table, bias, more, dtype)
        indices = torch.nn.functional.pad(indices, (0, more - width)).index_copy_(0, full, found[0])
        scores = torch.nn.functional.pad(scores, (0, more - width)).index_copy_(0, full, found[1])
        width = more

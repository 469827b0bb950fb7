"""Do streams share the latents of a dictionary? Beware: all but `pair_support_jaccard` rise on shuffled pairs, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from scipy import sparse

from mmsae.errors import MmsaeError

Rows: TypeAlias = Any
"""SciPy sparse codes of one stream `[n, d_latent]`; row i of each stream belongs to pair i."""


class Census(NamedTuple):
    """How many latents fire where, at least once.

    Attributes:
        only: In one stream alone, for each stream.
        shared: In two streams or more.
        dead: Nowhere.
    """

    only: tuple[int, ...]
    shared: int
    dead: int


def by_stream(codes: sparse.spmatrix, stream: np.ndarray, pair_id: np.ndarray) -> list[Rows]:
    """The codes of each stream, row by row of the same pair; pairs that a stream lacks are left out.

    Args:
        codes: `[n_rows, d_latent]`, as `LatentStore.codes`.
        stream: Number of the stream of each row, as the column `stream`, `[n_rows]`.
        pair_id: Of each row `[n_rows]`; below 0 is unpaired. Of a pair that occurs several times in a stream, as with
            several captions, the first is taken.

    Raises:
        MmsaeError: There is no pair that all streams have.
    """
    numbers = np.unique(stream)
    firsts = []
    for number in numbers:
        own = np.flatnonzero((stream == number) & (pair_id >= 0))
        ids, first = np.unique(pair_id[own], return_index=True)
        firsts.append(dict(zip(ids.tolist(), own[first].tolist(), strict=True)))
    pairs = sorted(set.intersection(*(set(found) for found in firsts))) if firsts else []
    if not pairs or len(firsts) < 2:
        raise MmsaeError("no pair has codes in two streams: encode paired data with a core that codes each stream.")
    codes = sparse.csr_matrix(codes)
    return [codes[[found[pair] for pair in pairs]] for found in firsts]


def firing_rates(streams: Sequence[Rows]) -> np.ndarray:
    """Share of rows in which each latent fires, `[n_streams, d_latent]`."""
    return np.stack([(codes != 0).sum(0).A1 / max(codes.shape[0], 1) for codes in map(sparse.csr_matrix, streams)])


def census(streams: Sequence[Rows]) -> Census:
    """Latents by the streams in which they fire (arXiv 2601.20028). Shuffled pairs raise `shared`: show both."""
    fires = firing_rates(streams) > 0
    n = fires.sum(0)
    return Census(tuple(int((own & (n == 1)).sum()) for own in fires), int((n > 1).sum()), int((n == 0).sum()))


def balanced_share(streams: Sequence[Rows], ratio: float = 0.2) -> float:
    """Share of the live latents whose least firing rate over the streams is above `ratio` times their greatest.

    Shuffled pairs raise it as well as true ones: show both.
    """
    rates = firing_rates(streams)
    live = rates.max(0) > 0
    return float((rates.min(0)[live] > ratio * rates.max(0)[live]).mean()) if live.any() else 0.0


def modality_score(one: Rows, other: Rows) -> np.ndarray:
    """Share of the first stream in the mean activation of each latent, `[d_latent]`; .5 is balanced, NaN is dead."""
    means = [np.abs(codes).mean(0).A1.astype(np.float64) for codes in map(sparse.csr_matrix, (one, other))]
    with np.errstate(invalid="ignore"):
        return means[0] / (means[0] + means[1])


def pair_support_jaccard(one: Rows, other: Rows) -> float:
    """Mean over pairs of the latents that fire on both sides, over those that fire on any; 0 where none does."""
    supports = [(sparse.csr_matrix(codes) != 0).astype(np.int64) for codes in (one, other)]
    both = supports[0].multiply(supports[1]).sum(1).A1
    union = supports[0].sum(1).A1 + supports[1].sum(1).A1 - both
    return float((both / np.maximum(union, 1)).mean())

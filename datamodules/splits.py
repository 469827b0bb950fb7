"""Cutting files or documents into splits that never change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from datamodules.base import Split
from mmsae.errors import MmsaeError


def cut(n: int, split: Split, val_share: float, test_share: float, seed: int) -> list[int]:
    """Indices of a split of `n` things, in ascending order; a share above 0 gets at least one thing."""
    if not 0 <= val_share + test_share < 1:
        raise MmsaeError(f"val_share={val_share} and test_share={test_share} leave nothing to train on.")
    n_val, n_test = (max(round(share * n), 1) if share else 0 for share in (val_share, test_share))
    if n_val + n_test >= n:
        raise MmsaeError(
            f"{n} examples cannot be cut into train, val and test: give more, or set val_share and test_share."
        )
    order = np.random.default_rng(seed).permutation(n)
    bounds = {"val": (0, n_val), "test": (n_val, n_val + n_test), "train": (n_val + n_test, n)}[split]
    return sorted(int(i) for i in order[slice(*bounds)])


class Items(Dataset[dict[str, Any]]):
    """A list of things, each made into an item when it is asked for.

    Args:
        things: Paths, documents, ...
        make: From a thing and its `sample_id` to an item.
    """

    def __init__(self, things: Sequence[Any], make: Callable[[Any, int], dict[str, Any]]) -> None:
        self.things, self.make = things, make

    def __len__(self) -> int:
        return len(self.things)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.make(self.things[index], index)

"""Labelled pictures that torchvision knows by name."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items, cut
from mmsae.errors import MmsaeError, nearest
from mmsae.sources.weights import first_line, needs

BY_SPLIT = {"SVHN", "STL10", "Flowers102", "DTD", "Food101", "FGVCAircraft", "PCAM", "RenderedSST2", "GTSRB"}
"""Data sets whose argument `split` may be train or test."""


class TorchvisionData(ActivationDataModule):
    """A classification data set of torchvision: FashionMNIST, MNIST, CIFAR10, CIFAR100, SVHN, STL10, Flowers102 …

    Its own test part is the test split; `val` is taken out of its training part.

    Args:
        name: Of the class in `torchvision.datasets`.
        root: Folder where its files are, or are to be.
        download: Fetch what is missing.
        val_share: Share of the training part to choose latents on.
        split_seed: Of that cut.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self,
        name: str,
        root: str = "data",
        download: bool = False,
        val_share: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.name: str = name
        self.root, self.download = root, download
        self.val_share, self.split_seed = val_share, split_seed
        _ = self._parts["test"]  # a missing data set must be told before any model is loaded

    @property
    def factors(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """The classes, by name where torchvision knows them."""
        data = self._parts["test"]
        names = getattr(data, "classes", None)
        if names is None:
            labels = getattr(data, "labels", None)
            if labels is None:
                labels = getattr(data, "_labels", [])
            names = [str(i) for i in range(int(max(labels, default=-1)) + 1)]
        return {"class": tuple(str(name) for name in names)}

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Pictures and labels."""
        data = self._parts["test" if split == "test" else "train"]
        chosen = range(len(data)) if split == "test" else cut(len(data), split, self.val_share, 0, self.split_seed)

        def make(index: int, sample_id: int) -> dict[str, Any]:
            image, label = data[index]
            return {"image": image, "sample_id": sample_id, "labels": {"class": int(label)}}

        return Items(chosen, make)

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """The training and the test part."""
        datasets = needs("torchvision.datasets", type(self).__name__, "vision")
        known = {name for name in datasets.__all__ if self._way(getattr(datasets, name)) is not None}
        if self.name not in known:
            close = nearest(self.name, known)
            raise MmsaeError(f"torchvision has no labelled pictures {self.name!r}; nearest: {close}.")
        kind = getattr(datasets, self.name)
        argument, train, test = self._way(kind)  # type: ignore[misc]
        found = {}
        for part, value in (("train", train), ("test", test)):
            try:
                found[part] = kind(self.root, download=self.download, **{argument: value})
            except Exception as error:  # RuntimeError, OSError, ValueError, urllib's own
                way = "no connection?" if self.download else "or set download=true"
                raise MmsaeError(
                    f"{self.root!r} has no {self.name} ({first_line(error)}): give its folder as root, {way}."
                ) from error
        return found

    @staticmethod
    def _way(kind: Any) -> tuple[str, Any, Any] | None:
        """Name of the argument that chooses the part, and its values; None for data sets of another kind."""
        parameters = inspect.signature(kind).parameters
        if "download" not in parameters:
            return None
        if "train" in parameters:
            return "train", True, False
        return ("split", "train", "test") if "split" in parameters and kind.__name__ in BY_SPLIT else None

"""The embedded default: captioned scenes with known factors."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from mmsae.errors import checked
from mmsae.miniatures.scenes import FACTORS, mentions
from mmsae.miniatures.scenes import Scenes as SceneSet


class Scenes(ActivationDataModule):
    """Handwritten digits of known colour, size and place on known backgrounds, with captions.

    Args:
        n_train: Scenes to train on.
        n_val: Scenes to choose latents on.
        n_test: Scenes to measure on.
        scene_seed: Of the scenes.
        **kwargs: See `ActivationDataModule`.
    """

    factors: ClassVar[dict[str, tuple[str, ...]]] = FACTORS

    def __init__(
        self, n_train: int = 6000, n_val: int = 1000, n_test: int = 1000, scene_seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.n_train = checked("n_train", n_train, 1)
        self.n_val = checked("n_val", n_val, 1)
        self.n_test = checked("n_test", n_test, 1)
        self.scene_seed = scene_seed

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Pictures, captions and labels."""
        return SceneSet(split, {"train": self.n_train, "val": self.n_val, "test": self.n_test}[split], self.scene_seed)

    def stated(self, split: Split) -> dict[str, np.ndarray]:
        """A caption says about half of the time one factor, else some of them."""
        said = [mentions(text) for text in self.items(split).captions()]  # type: ignore[attr-defined]
        return {factor: np.array([factor in facts for facts in said]) for factor in FACTORS}

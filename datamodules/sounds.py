"""Generated sounds with captions and known factors."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from mmsae.errors import checked
from mmsae.miniatures.sounds import FACTORS, mentions
from mmsae.miniatures.sounds import Sounds as SoundSet


class Sounds(ActivationDataModule):
    """Instruments of known pitch, rhythm and loudness over known noises, two seconds each, with captions.

    Args:
        n_train: Sounds to train on.
        n_val: Sounds to choose latents on.
        n_test: Sounds to measure on.
        sound_seed: Of the sounds.
        **kwargs: See `ActivationDataModule`.
    """

    factors: ClassVar[dict[str, tuple[str, ...]]] = FACTORS

    def __init__(
        self, n_train: int = 3000, n_val: int = 500, n_test: int = 500, sound_seed: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.n_train = checked("n_train", n_train, 1)
        self.n_val = checked("n_val", n_val, 1)
        self.n_test = checked("n_test", n_test, 1)
        self.sound_seed = sound_seed

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Samples, captions and labels."""
        return SoundSet(split, {"train": self.n_train, "val": self.n_val, "test": self.n_test}[split], self.sound_seed)

    def stated(self, split: Split) -> dict[str, np.ndarray]:
        """A caption says about half of the time one factor, else some of them."""
        said = [mentions(text) for text in self.items(split).captions()]  # type: ignore[attr-defined]
        return {factor: np.array([factor in facts for facts in said]) for factor in FACTORS}

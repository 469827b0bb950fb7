"""Simulated 12-lead ECGs of known rhythm and morphology."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items
from mmsae.errors import checked
from mmsae.miniatures.ecgs import BEATS, CLASSES, FACTORS, ECGs
from mmsae.sources.signal import render_signal


class SimulatedECGs(ActivationDataModule):
    """ECGs of simulated hearts: class, rhythm and morphology of each, and the kind of every beat (`label.event`).

    Args:
        n_train: Records to train on; every record is of another heart.
        n_val: Records to choose latents on.
        n_test: Records to measure on.
        ecg_seed: Of the records.
        seconds: Length of a record.
        rate: Samples per second.
        **kwargs: See `ActivationDataModule`.
    """

    factors: ClassVar[dict[str, tuple[str, ...]]] = {**FACTORS, "event": BEATS}

    def __init__(
        self,
        n_train: int = 4000,
        n_val: int = 500,
        n_test: int = 500,
        ecg_seed: int = 1,
        seconds: float = 5.0,
        rate: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.n_train = checked("n_train", n_train, 1)
        self.n_val = checked("n_val", n_val, 1)
        self.n_test = checked("n_test", n_test, 1)
        self.ecg_seed, self.seconds, self.rate = ecg_seed, seconds, rate

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Signals in millivolts, beats and labels."""
        n = {"train": self.n_train, "val": self.n_val, "test": self.n_test}[split]
        ecgs = ECGs(split, n, self.ecg_seed, self.seconds, self.rate)

        def make(index: int, sample_id: int) -> dict[str, Any]:
            item = ecgs[index]
            return {**item, "event_names": BEATS, "text": CLASSES[item["labels"]["class"]]}

        return Items(range(n), make)

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The twelve leads and the beats."""
        return render_signal(item)

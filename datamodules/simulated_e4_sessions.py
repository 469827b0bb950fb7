"""Simulated windows of an Empatica E4 with what the wearer did."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items
from mmsae.errors import checked
from mmsae.miniatures.wristbands import EVENTS, FACTORS, Wristbands
from mmsae.sources.signal import render_signal


class SimulatedE4Sessions(ActivationDataModule):
    """Wristband windows of simulated wearers: activity, arousal, posture and pulse of each, and events in them.

    `label.event` is a movement or a response of the skin. Wearers of one split are in no other.

    Args:
        n_train: Windows to train on, eight of each wearer.
        n_val: Windows to choose latents on.
        n_test: Windows to measure on.
        wearer_seed: Of the wearers.
        seconds: Length of a window.
        rate: Samples per second.
        **kwargs: See `ActivationDataModule`.
    """

    factors: ClassVar[dict[str, tuple[str, ...]]] = {**FACTORS, "event": EVENTS}

    def __init__(
        self,
        n_train: int = 2000,
        n_val: int = 400,
        n_test: int = 400,
        wearer_seed: int = 1,
        seconds: float = 16.0,
        rate: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.n_train = checked("n_train", n_train, 1)
        self.n_val = checked("n_val", n_val, 1)
        self.n_test = checked("n_test", n_test, 1)
        self.wearer_seed, self.seconds, self.rate = wearer_seed, seconds, rate

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Signals, events and labels."""
        n = {"train": self.n_train, "val": self.n_val, "test": self.n_test}[split]
        windows = Wristbands(split, n, self.wearer_seed, self.seconds, self.rate)

        def make(index: int, sample_id: int) -> dict[str, Any]:
            item = windows[index]
            said = ", ".join(FACTORS[factor][value] for factor, value in item["labels"].items())
            return {**item, "event_names": EVENTS, "text": said}

        return Items(range(n), make)

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The six channels and the events."""
        return render_signal(item)

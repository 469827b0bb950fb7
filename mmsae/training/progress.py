"""A progress bar over steps, not epochs, with the numbers that matter."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgress(TQDMProgressBar):
    """One bar for the whole training, in optimizer steps, with FVU and L0.

    Args:
        refresh_rate: Steps between two updates of the bar.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """FVU and L0, not the number of the run."""
        metrics = super().get_metrics(trainer, pl_module)
        return {key: value for key, value in metrics.items() if key != "v_num"}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar, at the step of the checkpoint."""
        super().on_train_start(trainer, pl_module)
        total = trainer.estimated_stepping_batches
        self.train_progress_bar.total = int(total) if total < float("inf") else None
        self.train_progress_bar.initial = trainer.global_step
        self.train_progress_bar.set_description("training")

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Leave the bar alone."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move to the current step."""
        step = trainer.global_step
        if step % self.refresh_rate == 0 or step == self.train_progress_bar.total:
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar alone."""

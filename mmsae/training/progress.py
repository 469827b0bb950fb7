"""One progress bar per task, in optimizer steps or batches, with the numbers that matter."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm


class StepProgress(ProgressBar):
    """One bar for the whole training, in optimizer steps, with FVU and L0; a log file gets one line a minute.

    Args:
        refresh_rate: Steps between two updates of the bar.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__()
        self.refresh_rate, self.enabled = refresh_rate, True
        self.bars: dict[str, tqdm[Any]] = {}

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Show bars again."""
        self.enabled = True

    def begin(self, task: str, title: str, total: float, initial: int = 0, leave: bool = True) -> None:
        """Open the bar of a task."""
        self.end(task)
        terminal = sys.stderr.isatty()
        self.bars[task] = tqdm(
            desc=title,
            total=int(total) if total < float("inf") else None,
            initial=initial,
            leave=leave,
            disable=not self.enabled or not (leave or terminal),
            dynamic_ncols=True,
            mininterval=0.1 if terminal else 60,
        )

    def end(self, task: str) -> None:
        """Close the bar of a task, if it is open."""
        if task in self.bars:
            self.bars.pop(task).close()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """FVU and L0, not the number of the run."""
        return {key: value for key, value in super().get_metrics(trainer, pl_module).items() if key != "v_num"}

    # ---- training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar, at the step of the checkpoint."""
        self.begin("train", "training", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move to the current step."""
        bar, step = self.bars["train"], trainer.global_step
        if step % self.refresh_rate == 0 or step == bar.total:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(step - bar.n)

    def on_train_end(self, *_: Any) -> None:
        """Leave the finished bar on the screen."""
        self.end("train")

    # ---- passes over a split

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        """A small bar that goes away."""
        if not trainer.sanity_checking:
            self.begin("val", "validating", sum(trainer.num_val_batches), leave=False)

    def on_validation_batch_end(self, *_: Any) -> None:
        """One batch."""
        if "val" in self.bars:
            self.bars["val"].update()

    def on_validation_end(self, *_: Any) -> None:
        """Remove it."""
        self.end("val")

    def on_test_start(self, trainer: L.Trainer, *_: Any) -> None:
        """One bar."""
        self.begin("test", "testing", sum(trainer.num_test_batches))

    def on_test_batch_end(self, *_: Any) -> None:
        """One batch."""
        self.bars["test"].update()

    def on_test_end(self, *_: Any) -> None:
        """Leave it."""
        self.end("test")

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A bar for each split."""
        if batch_idx == 0:
            title = pl_module.title(dataloader_idx) if hasattr(pl_module, "title") else "encoding"  # type: ignore[operator]
            self.begin("predict", title, trainer.num_predict_batches[dataloader_idx])

    def on_predict_batch_end(self, *_: Any) -> None:
        """One batch."""
        self.bars["predict"].update()

    def on_predict_end(self, *_: Any) -> None:
        """Leave it."""
        self.end("predict")

    def on_exception(self, *_: Any) -> None:
        """The sentence that follows begins on a line of its own."""
        for task in list(self.bars):
            self.end(task)

"""Resuming is exact only if `Batches` and Lightning's loops agree on where an epoch ends and what was fetched ahead."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_batches import disk, live, store  # noqa: F401

from datamodules.base import TrainedBatches


class Recorder(L.LightningModule):
    """Remembers which rows it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.trainer.train_dataloader.trained()
        self.seen.append(batch["sample_id"].tolist())
        return (batch["acts"]["x"] @ self.weight).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


def run(loader, steps, folder, resume=None):
    """Rows of each step, with a checkpoint after every step and every epoch."""
    module = Recorder()
    often = ModelCheckpoint(folder / "step", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    epochs = ModelCheckpoint(
        folder / "epoch", filename="{step}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1
    )
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, callbacks=[often, epochs],
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["disk", "live"])
def test_resumed_training_sees_the_identical_rest(store, tmp_path, kind):  # noqa: F811
    def loader():
        return TrainedBatches(disk(store) if kind == "disk" else live(), 7)

    length = len(list(loader()))
    whole = run(loader(), 2 * length + 3, tmp_path / "whole")
    for n in (length - 1, length, length + 1, 2 * length):
        checkpoints = [tmp_path / "whole" / "step" / f"step={n}.ckpt", tmp_path / f"{n}" / "end.ckpt"]
        run(loader(), n, tmp_path / f"{n}")
        if n % length == 0:
            checkpoints.append(tmp_path / "whole" / "epoch" / f"step={n}.ckpt")
        for file in checkpoints:
            assert run(loader(), 2 * length + 3, tmp_path / "again", file) == whole[n:], (n, file)

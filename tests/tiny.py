"""Tiny data, datamodules and trainers for the tests of training."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ActivationDataModule
from mmsae.sources import Custom
from mmsae.spec import ACTS, ActivationSpec
from mmsae.store import Writer

D = 8


def planted(n, d=D, seed=0, offset=2.0):
    """Rows `[n, d]`: three of 16 directions each, with weights, noise and an offset."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(16, d, generator=torch.Generator().manual_seed(99))
    on = torch.rand(n, 16, generator=g).argsort(1)[:, :3]
    weights = 0.5 + torch.rand(n, 3, generator=g)
    return (weights[..., None] * directions[on]).sum(1) + 0.05 * torch.randn(n, d, generator=g) + offset


class Fixed(L.LightningDataModule):
    """Given batches in the given order, every epoch: `train` and `val` are lists of `[n, d]`."""

    def __init__(self, train, val=(), stream="x"):
        super().__init__()
        self.lists, self.stream = {"train": list(train), "val": list(val)}, stream
        self.spec = ActivationSpec({stream: self.lists["train"][0].shape[1]})

    def _loader(self, split):
        batches = [{ACTS: {self.stream: x}} for x in self.lists[split]]
        return DataLoader(dataset=batches, batch_size=None)

    def train_dataloader(self):
        return self._loader("train")

    def val_dataloader(self):
        return self._loader("val")

    test_dataloader = val_dataloader


def batches_of(x, size):
    return list(x.split(size))


def trainer(folder=None, **arguments):
    """On the CPU, silent."""
    given = {"max_steps": 20, "max_epochs": -1, "num_sanity_val_steps": 0, "logger": False, "log_every_n_steps": 1}
    given |= {"enable_checkpointing": any(is_checkpoint(c) for c in arguments.get("callbacks", ()))}
    given |= {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**(given | arguments), default_root_dir=folder)


def is_checkpoint(callback):
    return isinstance(callback, L.pytorch.callbacks.ModelCheckpoint)


def adam(lr=1e-2):
    return lambda params: torch.optim.Adam(params, lr=lr)


class Recorder(L.Callback):
    """Calls `note(trainer, module)` after every optimizer step and keeps what it gives."""

    def __init__(self, note):
        self.note, self.found = note, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.found.append(self.note(trainer, pl_module))


class Vectors(Dataset):
    """Items with `input` `[3, D]` and a label; a pure function of the index."""

    def __init__(self, n, seed):
        self.x = planted(3 * n, seed=seed).view(n, 3, D)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"input": self.x[index], "sample_id": index, "labels": {"class": index % 2}}


def identity_model():
    """A model of one module that can be hooked."""
    return nn.Sequential(nn.Identity())


def vectors_source():
    return Custom(identity_model, ["0"], modality="signal", input_shape=[3, D], device="cpu")


def write_store(folder, x, rows_per_shard=100, covariance=False, columns=None):
    """A store of the rows `x` for every split, as `mmsae extract` would leave it."""
    for split in ("train", "val", "test"):
        writer = Writer(folder / split, {"x": 1}, "float32", rows_per_shard, covariance)
        writer.resume()
        writer.add({ACTS: {"x": x}, "sample_id": torch.arange(len(x)), **(columns or {})})
        writer.close()
        writer.finish({"class": "Toy"}, {"class": "Toy"}, {})
    return folder


def stored(folder, **arguments):
    """The datamodule of `write_store`, with 64 rows per step in chunks of 256."""
    from datamodules import Stored

    return Stored(store=str(folder), **{"batch_size": 64, "chunk_rows": 256, "block_rows": 16, **arguments})


def live(n=200, **arguments):
    """A datamodule that runs `identity_model` on `Vectors`; made here so that no test module defines a subclass."""
    data = ActivationDataModule(
        source=vectors_source(), **{"batch_size": 64, "chunk_rows": 256, "examples_per_forward": 7, **arguments}
    )
    data.items = lambda split: Vectors(n, ("train", "val", "test").index(split))
    return data

"""What each of two processes does in `test_ddp.py`: `python ddp.py WHAT FOLDER`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")
torch.set_num_threads(1)

import lightning as L  # noqa: E402
from tiny import Vectors, adam, live, stored, trainer  # noqa: E402

from mmsae.cores import PCA, BatchTopK, JumpReLU, TopK  # noqa: E402
from mmsae.errors import MmsaeError  # noqa: E402
from mmsae.training.extract import ExtractModule  # noqa: E402
from mmsae.training.module import SAEModule  # noqa: E402

TWO = {"devices": 2, "strategy": "ddp"}


class Seen(L.Callback):
    """Samples of every training batch."""

    def __init__(self):
        self.ids = []

    def on_train_batch_start(self, trainer, module, batch, *_):
        self.ids.append(batch["sample_id"].clone())


def fit(folder):
    """Train on the store of the test, validate, leave the state of each rank."""
    torch.manual_seed(0)
    spec = {"x": 8}
    also = {"b": BatchTopK(spec, 16, k=3, dead_after=300), "j": JumpReLU(spec, 16, target_l0=4)}
    module = SAEModule(TopK(spec, 16, k=3), also=also, normalise="center_scale", optimizer=adam(), lr_warmup_steps=5)
    seen, data = Seen(), stored(folder / "store", batch_size=40, columns=["sample_id"])
    run = trainer(max_steps=-1, max_epochs=1, callbacks=[seen], **TWO)
    run.fit(module, data)
    metrics = run.validate(module, data, verbose=False)[0]
    state = {k: v.clone() for k, v in module.state_dict().items()}
    found = {"state": state, "ids": torch.cat(seen.ids), "steps": run.global_step, "metrics": metrics}
    torch.save(found, folder / f"rank{run.global_rank}.pt")


def free(folder):
    """A core that learns in one pass."""
    try:
        trainer(max_steps=5, **TWO).fit(SAEModule(PCA({"x": 8}), normalise="none"), stored(folder / "store"))
    except MmsaeError as error:
        (folder / "said.txt").write_text(str(error))


def extract(folder):
    """Two ranks write one store; the validation split has fewer batches than there are ranks."""
    data = live(examples_per_forward=4)
    data.identity = lambda split: {"class": "Vectors", "split": split}
    sizes = {"train": 45, "val": 3, "test": 8}
    data.items = lambda split: Vectors(sizes[split], 0)
    module = ExtractModule(str(folder / "out"), rows_per_shard=10)
    module.prepare(data)
    trainer(max_steps=-1, **TWO).predict(module, return_predictions=False)


if __name__ == "__main__":
    {"fit": fit, "free": free, "extract": extract}[sys.argv[1]](Path(sys.argv[2]))

"""What each of two processes does in `test_ddp.py`: `python ddp.py WHAT FOLDER`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "contracts")]
warnings.simplefilter("ignore")
torch.set_num_threads(1)

import lightning as L  # noqa: E402
from tiny import Vectors, adam, live, planted, stored, trainer  # noqa: E402

from mmsae.cores import PCA, BatchTopK, JumpReLU, TopK  # noqa: E402
from mmsae.errors import MmsaeError  # noqa: E402
from mmsae.spec import ActivationSpec  # noqa: E402
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


class Shared:
    """Batches of which each rank gets every other row; the sample for the start is the same for all."""

    def __init__(self, rank, n_ranks):
        self.rank, self.n_ranks = rank, n_ranks
        x = planted(10 * 64 + 256, 12)
        y = x[:, torch.arange(12).roll(1)].abs()
        self.acts = {"x": x, "target": y, "one": x[:, :5], "other": x[:, 5:], "image": x, "text": y}

    def _rows(self, rows):
        acts = {stream: t[rows] for stream, t in self.acts.items()}
        return {"acts": acts, "grads": {stream: 1e-3 * t.cos() for stream, t in acts.items()}}

    def sample(self, n):
        return self._rows(slice(640, None))

    def __iter__(self):
        return (self._rows(slice(64 * i + self.rank, 64 * (i + 1), self.n_ranks)) for i in range(10))

    def __len__(self):
        return 10


def all_cores(folder, n_ranks=2):
    """Ten steps of every core that learns by gradients, all in one pass."""
    from test_cores import LEARNING

    torch.manual_seed(0)
    built = {}
    for name, make in LEARNING.items():
        core = make()
        if hasattr(core, "dead_after"):
            core.dead_after = 10**9  # AuxK is a share of the variance of a rank's own rows
        built[name] = core
    spec = ActivationSpec({"x": 12, "target": 12, "one": 5, "other": 7, "image": 12, "text": 12})
    module = SAEModule(built.pop("TopK"), spec, also=built, lr_warmup_steps=0, lr_decay=0, sparsity_warmup=0,
                       optimizer=lambda groups: torch.optim.SGD(groups, lr=0.02))  # fmt: skip
    two = TWO if n_ranks == 2 else {}
    run = trainer(max_steps=10, log_every_n_steps=0, **two)
    run.fit(module, Shared(run.global_rank, n_ranks))
    state = {k.replace("cores.main", "cores.TopK"): v.clone() for k, v in module.state_dict().items()}
    torch.save(state, folder / f"cores{run.global_rank}of{n_ranks}.pt")


if __name__ == "__main__":
    {"fit": fit, "all_cores": all_cores, "free": free, "extract": extract}[sys.argv[1]](Path(sys.argv[2]))

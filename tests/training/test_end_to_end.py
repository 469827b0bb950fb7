"""Dictionaries trained for what the model does with them."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import D, adam, live, trainer
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, ExampleBatches
from mmsae.cores import ReLU, TopK
from mmsae.errors import MmsaeError
from mmsae.sources import Custom
from mmsae.training.end_to_end import EndToEnd
from mmsae.training.module import SAEModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Head(nn.Module):
    """Decides by four quiet dimensions out of eight; the other four are loud and ignored."""

    def __init__(self):
        super().__init__()
        self.body, self.middle = nn.Identity(), nn.Identity()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.cat([4 * torch.randn(4, 5, generator=generator), torch.zeros(4, 5)]))

    def forward(self, x):
        return self.middle(self.body(x).mean(1)) @ self.weight


class Signals(Dataset):
    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        size = torch.tensor([0.3] * 4 + [3.0] * 4)
        self.x = (torch.rand(n, 3, 8, generator=g) < 0.3) * size * (0.5 + torch.rand(n, 3, 8, generator=g))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"input": self.x[index], "sample_id": index, "labels": {"class": index % 5}}


def data(n=400, **arguments):
    source = Custom(
        Head, ["body"], modality="signal", input_shape=[3, 8], device="cpu", positions=arguments.pop("positions", "all")
    )
    made = ActivationDataModule(source=source, **{"batch_size": 50, "whole_examples": True, **arguments})
    made.items = lambda split: Signals(n, ("train", "val", "test").index(split))
    return made


def module(**arguments):
    torch.manual_seed(0)
    settings = {"optimizer": adam(5e-3), "lr_warmup_steps": 5, "end_to_end": EndToEnd(), **arguments}
    return SAEModule(settings.pop("core", TopK({"body": 8}, 16, k=1)), **settings)


def spliced(source, core, n=400):
    """Divergence with the reconstruction in place, and FVU."""
    batch = source.collate([Signals(n, 2)[i] for i in range(n)])
    with torch.no_grad():
        clean = source.forward(batch)
        x = source.read(batch)["acts"]["body"]
        with source.spliced(batch, {"body": core}):
            kl = source.divergence(source.forward(batch), clean, batch)
    return float(kl), float((x - core(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_model_is_kept_where_the_reconstruction_is_not(seed):
    found = {}
    for name, whole in (("end to end", True), ("local", False)):
        loaded = data(whole_examples=whole, seed=seed, batch_size=50 if whole else 150)
        fitted = module(end_to_end=EndToEnd() if whole else None)
        trainer(max_steps=300).fit(fitted, loaded)
        found[name] = spliced(loaded.source, fitted.export())
    assert found["end to end"][0] < 0.7 * found["local"][0]
    assert found["end to end"][1] > found["local"][1]


def test_the_loss_is_that_of_the_spliced_model():
    loaded, fitted = data(), module(end_to_end=EndToEnd("kl", 2.0, local=0.5, downstream=["middle"]), normalise="none")
    source = loaded.source
    batch = source.collate([Signals(9, 0)[i] for i in range(9)])
    settings = fitted.end_to_end
    run = settings.run(source, batch)
    core = fitted.core.train()
    core.start(run.rows)
    losses = core.losses(run.rows)
    local = losses.terms["reconstruction"].detach().clone()
    run.adjust(losses.terms, {"body": losses.reconstruction})
    with torch.no_grad():
        clean, kept = source.forward(batch), run.further["middle"]
        with source.spliced(batch, {"body": core}):
            output = source.forward(batch)
        middle = core(batch["input"]).mean(1)
    assert_close(losses.terms["kl"], 2 * source.divergence(output, clean, batch))
    assert_close(losses.terms["reconstruction"], 0.5 * local)
    share = (kept - middle).pow(2).sum() / (kept - kept.mean(0)).pow(2).sum()
    assert_close(losses.terms["downstream"], share)
    sum(losses.terms.values()).backward()
    assert core.W_enc.grad.abs().sum() > 0
    assert not any(weight.grad is not None for weight in source.model.parameters())


def test_cross_entropy_is_against_the_truth():
    loaded, fitted = data(), module(end_to_end=EndToEnd("ce"), core=ReLU({"body": 8}, 16, l1_coefficient=0.0))
    trainer(max_steps=150).fit(fitted, loaded)
    source = loaded.source
    batch = source.collate([Signals(100, 0)[i] for i in range(100)])
    with torch.no_grad():
        clean = source.loss(source.forward(batch), batch)
        with source.spliced(batch, {"body": fitted.export()}):
            assert source.loss(source.forward(batch), batch) < clean  # labels are noise: the dictionary may overfit


def test_resuming_gives_the_same_weights(tmp_path):
    whole, first = module(schedule_steps=30), module(schedule_steps=30)
    trainer(max_steps=30).fit(whole, data())
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=11, save_top_k=-1, filename="{step}")
    trainer(max_steps=11, callbacks=[keep]).fit(first, data())
    second = module(schedule_steps=30)
    trainer(max_steps=30).fit(second, data(), ckpt_path=tmp_path / "step=11.ckpt", weights_only=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_every_example_once_per_epoch_and_shares_are_disjoint():
    shares = [[int(i) for batch in ExampleBatches(data(101), rank, 2) for i in batch["sample_id"]] for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 50
    assert len({*shares[0], *shares[1]}) == 100
    loader = ExampleBatches(data(101))
    first, second = ([int(i) for batch in loader for i in batch["sample_id"]] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(101))
    assert first != second
    assert len(loader) == 3


def test_half_of_what_is_needed_is_refused():
    with pytest.raises(MmsaeError, match="whole_examples=true"):
        trainer().fit(module(), data(whole_examples=False))
    with pytest.raises(MmsaeError, match=r"model\.end_to_end"):
        trainer().fit(module(end_to_end=None), data())
    with pytest.raises(MmsaeError, match="positions=all"):
        trainer().fit(module(), data(positions="mean"))
    with pytest.raises(MmsaeError, match=r"has no module that matches 'nowhere'"):
        trainer().fit(module(end_to_end=EndToEnd(downstream=["nowhere"])), data())
    with pytest.raises(MmsaeError, match=r"give --data\.source"):
        ActivationDataModule(store="somewhere", whole_examples=True)
    other = module(core=TopK({"0": D}, 16, k=3))
    made = live(whole_examples=True)
    with pytest.raises(MmsaeError, match="knows no loss"):
        trainer().fit(other, made)

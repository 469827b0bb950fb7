"""Acceptance T1a of the analyses, on a real classifier."""

import pytest
import torch
from tiny import D, Vectors, live, stored, write_store
from torch import nn

from mmsae.analyses import Downstream
from mmsae.cores import Neurons, TopK
from mmsae.latents import LatentStore
from mmsae.sources import Custom


class Classifier(nn.Module):
    """Three positions, one class."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, 2)

    def forward(self, x):
        return self.head(self.body(x).relu().mean(1))


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    model = Classifier()
    items = [Vectors(200, 0)[i] for i in range(200)]
    x, y = torch.stack([i["input"] for i in items]), torch.tensor([i["labels"]["class"] for i in items])
    x[:, :, 0] += 3.0 * y[:, None]  # the classes differ
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = live()
    found.source = Custom(model, ["body"], modality="signal", input_shape=[3, D], task="classification", device="cpu")
    found.items = lambda split: [{"input": x[i], "sample_id": i, "labels": {"class": int(y[i])}} for i in range(len(x))]
    return found


def activations(data):
    return torch.cat([batch["acts"]["body"] for batch in data.rows("train")])


def run(core, data, **arguments):
    core = core.eval()
    return Downstream(**arguments).run(core, LatentStore.build(core, data.rows("test")), data)


def mean_core(data):
    core = TopK({"body": D}, 4, k=1)
    with torch.no_grad():
        core.b_enc.fill_(-1e6)
        core.b_dec.copy_(Downstream()._mean(core, data))
    return core


def test_identity_recovers_everything_and_the_mean_nothing(data):
    found = run(Neurons({"body": D}), data).numbers
    assert found["recovered"] == found["cross_entropy/recovered"] == 1
    assert found["cross_entropy/reconstructed"] == found["cross_entropy/clean"]
    assert found["cross_entropy/mean_ablated"] > found["cross_entropy/clean"] + 0.1
    found = run(mean_core(data), data).numbers
    assert found["recovered"] == found["cross_entropy/recovered"] == found["accuracy/recovered"] == 0


def test_the_clean_loss_is_the_models_own(data):
    found = run(Neurons({"body": D}), data).numbers
    items = data.items("test")
    with torch.no_grad():
        logits = data.source.model(torch.stack([i["input"] for i in items]))
    labels = torch.tensor([i["labels"]["class"] for i in items])
    assert found["cross_entropy/clean"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found["accuracy/clean"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_hooks_are_removed_even_after_an_error(data):
    modules = list(data.source.model.modules())
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    run(Neurons({"body": D}), data)
    broken = Neurons({"body": D}).eval()
    latents = LatentStore.build(broken, data.rows("test"))
    broken.W_dec.data = torch.eye(D + 1)
    with pytest.raises(RuntimeError):
        Downstream().run(broken, latents, data)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules] == before


def test_at_most_so_many_examples(data):
    assert run(Neurons({"body": D}), data, n_samples=14).settings["samples"] == 14  # two batches of seven


def test_what_cannot_be_measured_is_said(data, tmp_path):
    store = stored(write_store(tmp_path, activations(data)))
    core = Neurons({"x": D}).eval()
    result = Downstream().run(core, LatentStore.build(core, store.rows("test")), store)
    assert (result.numbers, result.title) == ({}, "not measured: there is no model, only stored activations")
    plain = live()
    core = Neurons({"0": D}).eval()
    result = Downstream().run(core, LatentStore.build(core, plain.rows("test")), plain)
    assert "knows no task" in result.title

"""Gradients of the model's loss by its activations: against finite differences through the real model classes."""

import pytest
import torch
from test_text import items as texts
from test_text import save_tokenizer
from torch import nn
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.sources import CausalLM, Custom

LLAMA = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


class Residual(nn.Module):
    """Adds in place, as ResNets do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        out = self.inner(x)
        out += x
        return out


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def pictures(labels=True):
    x = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return [{"input": x[i], "sample_id": i, **({"labels": {"class": i}} if labels else {})} for i in range(3)]


def language(tokenizer, points, **arguments):
    return CausalLM(str(tokenizer), points, config=LLAMA, device="cpu", **arguments)


def vision(points, **arguments):
    return Custom(network, points, input_shape=[1, 6, 6], device="cpu", **arguments)


def differences(source, batch, point, direction, step=2e-4):
    """Change of the loss per unit of `direction` at the rows of a point."""

    def loss(sign):
        with source.spliced(batch, {point: lambda rows: rows + sign * step * direction}), torch.no_grad():
            return float(source.loss(source.forward(batch), batch).double())

    return (loss(1) - loss(-1)) / (2 * step)


@pytest.mark.parametrize(
    "point", ["model.layers.0", "model.layers.1.mlp", "model.layers.1.self_attn.o_proj:input", "model.layers.1:delta"]
)
def test_of_a_language_model(tokenizer, point):
    source = language(tokenizer, ["model.layers.0", point])
    source.model.double()
    batch = source.collate(texts())
    read = source.read(batch, gradients=True)
    plain = source.read(batch)
    for stream in read["acts"]:
        assert_close(read["acts"][stream], plain["acts"][stream])
        g = read["grads"][stream]
        direction = torch.randn(g.shape, dtype=g.dtype, generator=torch.Generator().manual_seed(1))
        assert differences(source, batch, stream, direction) == pytest.approx(float((g * direction).sum()), rel=1e-3)
    assert set(plain) == set(read) - {"grads"}


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("point", ["0", "2", "2.inner", "2:delta"])
def test_of_a_network_that_writes_in_place(point, labels):
    source = vision([point])
    source.model.double()
    batch = source.collate([{**item, "input": item["input"].double()} for item in pictures(labels)])
    batch["input"] = batch["input"].double()
    g = source.read(batch, gradients=True)["grads"][point]
    direction = torch.randn(g.shape, dtype=g.dtype, generator=torch.Generator().manual_seed(1))
    assert differences(source, batch, point, direction, 1e-5) == pytest.approx(float((g * direction).sum()), rel=1e-4)


def test_of_a_mean_is_that_of_a_shift_of_all(tokenizer):
    every, mean = (
        language(tokenizer, ["model.layers.0"], positions=positions, drop_special=True) for positions in ("all", "mean")
    )
    read = every.read(every.collate(texts()), gradients=True)
    sums = torch.stack([read["grads"]["model.layers.0"][read["sample_id"] == i].sum(0) for i in range(3)])
    assert_close(mean.read(mean.collate(texts()), gradients=True)["grads"]["model.layers.0"], sums)


def test_also_in_inference_mode(tokenizer):
    source = language(tokenizer, ["model.layers.0"])
    want = source.read(source.collate(texts()), gradients=True)
    with torch.inference_mode():
        got = source.read(source.collate(texts()), gradients=True)
    assert_close(got["grads"], want["grads"])


def test_what_has_no_loss_says_so(tokenizer):
    source = language(tokenizer, ["model.layers.0", "lm_head:input"])
    source.read(source.collate(texts()), gradients=True)
    silent = Custom(nn.Identity, [""], modality="signal", input_shape=[6, 4], device="cpu")
    batch = silent.collate([{"input": torch.ones(6, 4), "sample_id": 0}])
    with pytest.raises(MmsaeError, match="knows no loss of its model"):
        silent.read(batch, gradients=True)


def test_running_gives_rows_output_and_further_tensors(tokenizer):
    source = language(tokenizer, ["model.layers.0"])
    batch = source.collate(texts())
    rows, output, further = source.run(batch, ["model.layers.2"])
    assert_close(rows["acts"], source.read(batch)["acts"])
    with torch.no_grad():
        assert_close(output.logits, source.forward(batch).logits)
        with capture(source.model, ["model.layers.2"]) as found:
            source.forward(batch)
    assert_close(further, found)


def test_the_divergence_is_zero_from_itself_and_grows(tokenizer):
    source = language(tokenizer, ["model.layers.0"])
    batch = source.collate(texts())
    with torch.no_grad():
        clean = source.forward(batch)
        found = []
        for strength in (0.0, 0.1, 1.0):
            with source.spliced(batch, {"model.layers.0": lambda x, s=strength: (1 - s) * x}):
                found.append(float(source.divergence(source.forward(batch), clean, batch)))
        logits, truth = source.predictions(clean, batch)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert 0 < found[1] < found[2]
    assert len(logits) == len(truth) == int(batch["attention_mask"][:, 1:].sum())

import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.sources import CausalLM, Custom, OpenCLIP, Source, Timm, Torchvision
from mmsae.sources.positions import patch_grid


class Tokens(nn.Module):
    """Passes its input on; the norm of a token is what the test puts in."""

    def __init__(self):
        super().__init__()
        self.body = nn.Identity()
        self.pooled = nn.Identity()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.body(x * self.weight)
        return self.pooled(x.mean(1))


def source(hook_points=("body",), **kwargs):
    kwargs = {"modality": "signal", "input_shape": [6, 4], "prefix_tokens": 1, "device": "cpu", **kwargs}
    return Custom(Tokens, list(hook_points), **kwargs)


def items(n=3, **more):
    noise = torch.randn(n, 6, 4, generator=torch.Generator().manual_seed(1))
    return [{"input": noise[i], "sample_id": 10 + i, **more} for i in range(n)]


def rows(positions, data=None, **kwargs):
    data = data or items()
    one = source(positions=positions, **kwargs)
    return one.read(one.collate(data))


def test_rows_carry_activations_and_where_they_come_from():
    batch = rows("all", items(labels={"class": 2, "odd": 1}, timestep=7, sigma=0.5))
    assert_close(batch["acts"]["body"], torch.stack([item["input"] for item in items()]).flatten(0, 1))
    assert batch["sample_id"].tolist() == [10] * 6 + [11] * 6 + [12] * 6
    assert batch["position"].tolist() == [0, 1, 2, 3, 4, 5] * 3
    assert batch["kind"].tolist() == [1, 0, 0, 0, 0, 0] * 3
    assert batch["modality"].unique().tolist() == [3]
    assert batch["label.class"].unique().tolist() == [2]
    assert batch["timestep"].dtype == torch.int64
    assert batch["sigma"].dtype == torch.float32
    assert {len(values) for key, values in batch.items() if key != "acts"} == {18}


@pytest.mark.parametrize(
    ("positions", "drop_special", "expected"),
    [
        ("first", False, [0]),
        ("first", True, [1]),
        ("last", False, [5]),
        ("all", True, [1, 2, 3, 4, 5]),
        ("mean", False, [-1]),
    ],
)
def test_positions(positions, drop_special, expected):
    assert rows(positions, drop_special=drop_special)["position"].tolist() == expected * 3


def test_the_mean_pools_ordinary_positions():
    data = items()
    data[0]["input"][0] = torch.inf  # the class token, not pooled
    expected = torch.stack([item["input"][1:].mean(0) for item in data])
    assert_close(rows("mean", data)["acts"]["body"], expected)


def test_outliers_of_the_norm_are_dropped():
    data = items()
    data[1]["input"][3] *= 1000
    assert (11, 3) not in _places(rows("all", data, drop_outliers=20.0))
    assert len(_places(rows("all", data, drop_outliers=20.0))) == 17
    assert len(_places(rows("all", data))) == 18


@pytest.mark.parametrize("drop_outliers", [None, 5.0])
def test_what_is_not_finite_is_named_and_never_dropped_in_silence(drop_outliers):
    data = items()
    data[2]["input"][3, 0] = torch.nan
    with pytest.raises(MmsaeError, match=r"activations at 'body' are not finite for sample_id 12"):
        rows("all", data, drop_outliers=drop_outliers)


def test_streams_of_one_source_have_the_same_rows():
    with pytest.raises(MmsaeError, match=r"'body' and 'pooled' have 6 and 1 positions; extract them separately"):
        source(["body", "pooled"]).spec  # noqa: B018
    assert source(["pooled"]).spec.streams == {"pooled": 4}


def test_a_hook_point_without_a_batch_axis_is_refused():
    class Windows(Tokens):
        def forward(self, x):
            return self.body(x.reshape(-1, 2, 4))

    windows = Custom(Windows, ["body"], modality="signal", input_shape=[6, 4])
    with pytest.raises(MmsaeError, match="gives 6 examples for a batch of 2"):
        windows.spec  # noqa: B018


def test_identity_is_json_and_tells_weights_apart():
    one, same, other = source().identity, source().identity, source()
    other.model.weight.add_(1)
    assert json.loads(json.dumps(one)) == same
    assert other.identity["weights"] != one["weights"]
    assert one["hook_points"] == ["body"]


def test_the_model_is_frozen_and_random_weights_repeat():
    first, second = (Custom(lambda: nn.Linear(4, 4), [":output"], input_shape=[4]) for _ in range(2))
    state = torch.random.get_rng_state()
    assert_close(first.model.weight, second.model.weight)
    assert_close(torch.random.get_rng_state(), state)
    assert not first.model.training
    assert not first.model.weight.requires_grad
    assert first.model is first.model


def test_workers_get_a_source_without_weights():
    one = Timm("resnet10t", ["layer4"], image_size=32)
    batch = one.collate(one.example_items())
    copy = pickle.loads(pickle.dumps(one))
    assert copy._model is None
    assert_close(copy.collate(one.example_items())["input"], batch["input"])
    assert copy._model is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: source(positions="some"), "positions='some' is unknown"),
        (lambda: source(positions="patches"), "needs images, but the source reads signal"),
        (lambda: source(drop_outliers=0.5), "must be above 1"),
        (lambda: source(device="tpu9"), "device='tpu9' is unknown"),
        (lambda: source(modality="imge"), "modality='imge' is unknown; nearest: image"),
        (lambda: source(["bdy"]).model, "no module that matches 'bdy'; nearest: body"),
        (lambda: source().collate([{"input": torch.zeros(6, 4)}]), "has no 'sample_id'"),
        (lambda: source().collate(items(position=3)), "number named 'position'"),
        (lambda: source().collate([{"sample_id": 4}]), "item 4 has neither 'input' nor 'image'"),
        (lambda: source().collate([*items(1), {"input": torch.zeros(5, 4), "sample_id": 1}]), "different shapes"),
        (lambda: source(input_shape=None).spec, "give input_shape"),
        (lambda: Custom(lambda: 3, ["body"]).model, "the model of Custom is int"),
    ],
)
def test_wrong_arguments_are_named(make, said):
    with pytest.raises(MmsaeError, match=said):
        make()


def test_missing_labels_are_marked():
    one = source()
    batch = one.collate([*items(1, labels={"a": 4}, t=0.5), *items(1, labels={"b": 1})])
    assert batch["columns"]["label.a"].tolist() == [4, -1]
    assert batch["columns"]["label.b"].tolist() == [-1, 1]
    assert batch["columns"]["t"].isnan().tolist() == [False, True]


def test_example_of_the_docstring_and_classification():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5408, 10))
    one = Custom(net, ["1"], input_shape=[1, 28, 28], task="classification", device="cpu")
    data = [{"input": torch.rand(1, 28, 28), "sample_id": i, "labels": {"class": i - 1}} for i in range(4)]
    batch = one.collate(data)
    read = one.read(batch)
    assert read["acts"]["1"].shape == (4 * 26 * 26, 8)
    assert one.spec.d_in == 8
    assert read["row"][27] == read["column"][27] == 1
    x = torch.stack([item["input"] for item in data])
    assert_close(read["acts"]["1"].view(4, 26, 26, 8)[2, 3, 4], net[:2](x)[2, :, 3, 4].detach())
    with torch.no_grad():
        found = one.outcomes(one.forward(batch), batch)
        by_hand = nn.functional.cross_entropy(net(x)[1:], torch.tensor([0, 1, 2]), reduction="none")
    assert found["cross_entropy"][0].isnan()  # its class is unknown
    assert_close(found["cross_entropy"][1:], by_hand)
    assert one.render(data[0])["image"].size == (28, 28)
    wrong = one.collate([{**data[0], "labels": {"class": 10}}])
    with pytest.raises(MmsaeError, match="class=10 is none of the 10 classes"):
        one.outcomes(one.forward(wrong), wrong)


def test_models_of_several_inputs_are_called_by_the_user():
    class Two(Tokens):
        def forward(self, x, t):
            return self.body(x + t[:, None, None])

    one = Custom(Two, ["body"], modality="signal", call=lambda model, b: model(b["input"], b["columns"]["timestep"]))
    batch = one.collate(items(timestep=2))
    assert_close(one.read(batch)["acts"]["body"], 2 + batch["input"].flatten(0, 1))


@pytest.mark.parametrize(
    ("T", "prefix", "size", "grid"),
    [
        (17, 1, (32, 32), (1, 4, 4)),
        (21, 5, (32, 32), (5, 4, 4)),
        (16, 1, (32, 32), (0, 4, 4)),  # patch_embed: before the class token
        (9, 1, (64, 32), (1, 4, 2)),
        (9, 1, (32, 64), (1, 2, 4)),
        (33, 1, (64, 32), (1, 8, 4)),
        (1, 1, (32, 32), (0, 0, 0)),  # pooled
        (8, 1, (32, 32), (1, 0, 0)),
    ],
)
def test_patch_grid(T, prefix, size, grid):
    assert patch_grid(T, prefix, *size) == grid


def _places(batch):
    return set(zip(batch["sample_id"].tolist(), batch["position"].tolist(), strict=True))


def test_sources_are_found_as_subclasses():
    assert {"Custom", "Timm", "Torchvision", "OpenCLIP", "SceneCLIP", "CausalLM"} <= _names(Source)


def _names(cls):
    return {name for sub in cls.__subclasses__() for name in {sub.__name__} | _names(sub)}


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (lambda: Timm("resnet10t", ["layer1"]), "timm", "vision"),
        (lambda: Torchvision("resnet18", ["layer1"]), "torchvision.models", "vision"),
        (lambda: OpenCLIP("ViT-B-32", ["visual"]), "open_clip", "clip"),
        (lambda: CausalLM("gpt2", ["transformer.h.0"]), "transformers", "text"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(make, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MmsaeError, match=rf"needs {module}: pip install 'mmsae\[{extra}\]'"):
        make().model  # noqa: B018


def test_importing_the_sources_loads_no_model_library():
    code = "import sys, mmsae.sources; print([m for m in ('timm', 'transformers', 'open_clip') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

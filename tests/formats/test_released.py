"""Formats of released dictionaries, read only: Gemma Scope, OpenAI's, saev."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mmsae import formats
from mmsae.cores import BatchTopK, JumpReLU, ReLU, TopK
from mmsae.errors import MmsaeError
from mmsae.formats import gemma_scope
from mmsae.spec import TARGET

GOLDEN = sorted((Path(__file__).parent / "golden").glob("gemma_scope_*"))
# float32 sums of 8 and 16 terms of size 1, in another order
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(64, 8, generator=GENERATOR) + 0.3


def random_tensors(**shapes):
    return {name: 0.5 * torch.randn(shape, generator=GENERATOR) for name, shape in shapes.items()}


def inside(golden):
    return next(file.parent for file in golden.rglob("params.*"))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_gemma_scope_computes_here_what_saelens_computes(golden):
    folder = inside(golden)
    assert formats.detect(folder) == "gemma_scope"
    core = formats.load(folder)
    expected = load_file(golden / "expected.safetensors")
    codes = core.encode(expected["x"])
    assert type(core) is JumpReLU
    assert (TARGET in core.spec.streams) == ("transcoder" in golden.name)
    assert 0 < expected["codes"].count_nonzero() < expected["codes"].numel()
    assert_close(codes.dense(), expected["codes"], **TOLERANCE)
    assert_close(core.decode(codes), expected["reconstruction"], **TOLERANCE)


def test_gemma_scope_that_is_more_than_a_jumprelu_is_refused(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(inside(GOLDEN[-1]), folder)
    tensors = load_file(folder / "params.safetensors")
    save_file({**tensors, "affine_skip_connection": torch.ones(8, 8)}, folder / "params.safetensors")
    with pytest.raises(MmsaeError, match="affine skip connection"):
        formats.load(folder)
    save_file({**tensors, "w_dec": torch.ones(16, 3, 8)}, folder / "params.safetensors")
    with pytest.raises(MmsaeError, match="several layers"):
        formats.load(folder)
    save_file(tensors, folder / "params.safetensors")
    assert gemma_scope.about(folder)["model_name"] == "gemma-v3-270m"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "relu"}))
    with pytest.raises(MmsaeError, match="'relu'; known here: jump_relu"):
        formats.load(folder)


def test_gemma_scope_with_pickled_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([{}], dtype=object))
    with pytest.raises(MmsaeError, match="other than plain arrays"):
        formats.load(tmp_path)


def openai_state():
    shapes = {"pre_bias": (8,), "latent_bias": (16,), "encoder.weight": (16, 8), "decoder.weight": (8, 16)}
    return random_tensors(**shapes) | {"stats_last_nonzero": torch.zeros(16, dtype=torch.int64)}


def test_openai_relu_follows_its_formula(tmp_path):
    state = openai_state()
    torch.save({**state, "activation": "ReLU", "activation_state_dict": {}}, tmp_path / "layer_6.pt")
    assert formats.detect(tmp_path / "layer_6.pt") == "openai"
    core = formats.load(tmp_path / "layer_6.pt")
    codes = ((X - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]).relu()
    assert type(core) is ReLU
    assert_close(core.encode(X).dense(), codes, **TOLERANCE)
    assert_close(core(X), codes @ state["decoder.weight"].T + state["pre_bias"], **TOLERANCE)


def test_openai_topk_is_refused_since_it_rescales_rows(tmp_path):
    torch.save({**openai_state(), "activation": "TopK", "activation_state_dict": {"k": 3}}, tmp_path / "v5.pt")
    with pytest.raises(MmsaeError, match="rescales each row by itself"):
        formats.load(tmp_path / "v5.pt")


def write_saev(file, state, activation, schema=5):
    header = {"schema": schema, "cfg": {"d_model": 8, "d_sae": 16, "activation": activation}, "lib": "0.1"}
    with file.open("wb") as out:
        out.write((json.dumps(header) + "\n").encode())
        torch.save(state, out)
    return file


SAEV = {"W_enc": (8, 16), "b_enc": (16,), "W_dec": (16, 8), "b_dec": (8,)}
THRESHOLD = torch.tensor(0.7)


def largest(pre, k):
    return pre * torch.zeros_like(pre).scatter(-1, pre.topk(k).indices, 1.0)


@pytest.mark.parametrize(
    ("activation", "extra", "cls", "choose"),
    [
        ({"cls": "Relu", "params": {}}, {}, ReLU, torch.relu),
        ({"cls": "TopK", "params": {"top_k": 3}}, {}, TopK, lambda pre: largest(pre, 3)),
        ({"cls": "BatchTopK", "params": {"top_k": 3}}, {}, TopK, lambda pre: largest(pre, 3)),
        (
            {"cls": "BatchTopK", "params": {"top_k": 3}},
            {"activation.threshold": THRESHOLD},
            BatchTopK,
            lambda pre: torch.where(pre > THRESHOLD, pre, 0.0),
        ),
        (
            {"cls": "BatchTopK", "params": {"top_k": 3}},
            {"activation.threshold": torch.tensor(0.0)},  # never measured: a ReLU
            BatchTopK,
            torch.relu,
        ),
    ],
)
def test_saev_follows_its_formula(activation, extra, cls, choose, tmp_path):
    state = random_tensors(**SAEV)
    file = write_saev(tmp_path / "sae.pt", {**state, **extra}, activation)
    assert formats.detect(file) == "saev"
    core = formats.load(file)
    codes = choose(X @ state["W_enc"] + state["b_enc"])
    assert type(core) is cls
    assert_close(core.encode(X).dense(), codes, **TOLERANCE)
    assert_close(core(X), codes @ state["W_dec"] + state["b_dec"], **TOLERANCE)


def test_saev_with_what_is_not_known_is_refused(tmp_path):
    state = random_tensors(**SAEV)
    with pytest.raises(MmsaeError, match="'Gelu'; known here: Relu, TopK, BatchTopK"):
        formats.load(write_saev(tmp_path / "sae.pt", state, {"cls": "Gelu"}))
    with pytest.raises(MmsaeError, match="could run code when opened"):
        formats.load(write_saev(tmp_path / "sae.pt", {"W_enc": torch.nn.Linear(1, 1)}, {"cls": "Relu"}))
    (tmp_path / "sae.pt").write_bytes(b"no json")
    with pytest.raises(MmsaeError, match="does not begin with the JSON of saev"):
        formats.load(tmp_path / "sae.pt", "saev")

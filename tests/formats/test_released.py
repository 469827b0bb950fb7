"""Formats of released dictionaries, read only: Gemma Scope, Llamascopium, ViT-Prisma, OpenAI's, saev, others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mmsae import formats
from mmsae.cores import BatchTopK, Crosscoder, Gated, JumpReLU, JumpReLUSkipTranscoder, ReLU, SkipTranscoder, TopK
from mmsae.errors import MmsaeError
from mmsae.formats import gemma_scope
from mmsae.formats.check import answer_of
from mmsae.spec import TARGET

ALL = Path(__file__).parent / "golden"
GOLDEN = sorted(ALL.glob("gemma_scope_*"))
CLASSES = {
    "llamascopium_crosscoder": Crosscoder,
    "llamascopium_inference": JumpReLU,
    "llamascopium_jumprelu": JumpReLU,
    "llamascopium_jumprelu_plain": JumpReLU,
    "llamascopium_llama_scope": JumpReLU,
    "llamascopium_r1_distill": JumpReLU,
    "llamascopium_relu": ReLU,
    "llamascopium_topk": TopK,
    "llamascopium_topk_plain": TopK,
    "llamascopium_transcoder": JumpReLU,
    "prisma_gated": Gated,
    "prisma_skip_transcoder": JumpReLUSkipTranscoder,
    "prisma_standard": ReLU,
    "prisma_topk": TopK,
    "prisma_topk_skip_transcoder": SkipTranscoder,
    "prisma_transcoder": ReLU,
    "released_goodfire": ReLU,
    "released_qwen_scope": TopK,
}
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
    assert type(core) is (JumpReLUSkipTranscoder if "affine" in golden.name else JumpReLU)
    assert (TARGET in core.spec.streams) == ("transcoder" in golden.name)
    assert 0 < expected["codes"].count_nonzero() < expected["codes"].numel()
    assert_close(codes.dense(), expected["codes"], **TOLERANCE)
    assert_close(core.decode(codes), expected["reconstruction"], **TOLERANCE)


def of(name):
    """The folder, or file, that is to be loaded."""
    places = [
        p.parent if p.suffix == ".json" else p for p in (ALL / name).rglob("*") if p.name != "expected.safetensors"
    ]
    return next(p for p in sorted(places, key=lambda p: (p.is_file(), p)) if p.is_file() or any(p.glob("*.json")))


def test_every_golden_folder_is_expected():
    found = [p.name for p in ALL.iterdir() if p.name.startswith(("llamascopium_", "prisma_", "released_"))]
    assert sorted(found) == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_golden_folder_computes_the_same_here(name):
    path = of(name)
    assert formats.detect(path) == name.partition("_")[0]
    core = formats.load(path)
    expected = load_file(ALL / name / "expected.safetensors")
    codes, reconstruction = answer_of(core)(expected["x"])
    assert type(core) is CLASSES[name]
    assert (TARGET in core.spec.streams) == ("transcoder" in name)
    assert 0 < expected["codes"].count_nonzero() < expected["codes"].numel()
    assert_close(reconstruction, expected["reconstruction"], **TOLERANCE)
    if name == "llamascopium_topk":  # its selection includes the norm of the row, so codes carry it
        state = torch.load(path / "sae_weights.pt", weights_only=True)["sae"]
        codes = codes / state["W_D"].norm(dim=-1)
    assert_close(codes, expected["codes"], **TOLERANCE)


def test_shares_of_a_crosscoder_are_those_of_the_normalised_streams():
    core = formats.load(ALL / "llamascopium_crosscoder")
    norms = load_file(ALL / "llamascopium_crosscoder" / "sae_weights.safetensors")["W_D"].norm(dim=-1)
    assert_close(core.shares, (norms / norms.sum(0)).T)
    assert list(core.spec.streams) == ["blocks.1.in", "blocks.1.out"]


def changed(name, tmp_path, config=None, tensors=None):
    """A copy of a golden folder with another config, or other tensors (None: without)."""
    folder = tmp_path / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(of(name), folder)
    file = next(folder.glob("*.json")) if not (folder / "config.json").is_file() else folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    for weights in folder.glob("*weights.*"):
        if weights.suffix == ".pt":
            old = torch.load(weights, weights_only=True)
            torch.save({key: t for key, t in {**old, **(tensors or {})}.items() if t is not None}, weights)
        else:
            save_file(
                {key: t for key, t in {**load_file(weights), **(tensors or {})}.items() if t is not None}, weights
            )
    return folder


NORM = "dataset_average_activation_norm.blocks.1.in"


@pytest.mark.parametrize(
    ("name", "config", "tensors", "sentence"),
    [
        ("llamascopium_relu", {"sae_type": "clt"}, {}, "'clt' with the activation 'relu'; known here: sae with relu"),
        ("llamascopium_relu", {"use_glu_encoder": True}, {}, "after a gated linear unit"),
        ("llamascopium_crosscoder", {"act_fn": "jumprelu"}, {}, "crosscoder with relu"),
        ("llamascopium_crosscoder", {"hook_points": ["a"]}, {}, r"\[2, .* instead of \[1, "),
        ("llamascopium_relu", {"norm_activation": "token-wise"}, {}, "take x times the root of d_in"),
        ("llamascopium_relu", {}, {NORM: None}, r"average norm of blocks\.1\.in"),
        ("llamascopium_relu", {}, {NORM: torch.tensor(0.0)}, "average norm"),
        ("llamascopium_relu", {"d_model": 12}, {}, r"\[16, 8\] instead of \[16, 12\]"),
        ("llamascopium_relu", {"d_model": "8"}, {}, "d_model=8, where a whole number"),
        ("llamascopium_relu", {"act_fn": "jumprelu"}, {}, "no tensor 'activation_function.log_jumprelu_threshold'"),
        ("llamascopium_relu", {}, {"W_E": None}, "no matrix 'W_E'"),
        ("llamascopium_topk", {"top_k": None}, {}, "top_k=None"),
        ("llamascopium_relu", {"sae_type": ["sae"]}, {}, "no dictionary that llamascopium writes"),
        ("prisma_standard", {"normalize_activations": "layer_norm"}, {}, r"take \(x - .* set it to 'none'"),
        ("prisma_standard", {"architecture": "jumprelu"}, {}, "'jumprelu' .* known here: standard with relu, topk"),
        ("prisma_standard", {"activation_fn_str": "tanh-relu"}, {}, "'tanh-relu'"),
        ("prisma_standard", {"d_in": 12}, {}, r"\[16, 8\] instead of \[16, 12\]"),
        ("prisma_standard", {"activation_fn_str": "topk"}, {}, "k=None"),
        ("prisma_gated", {}, {"r_mag": None}, "no tensor 'r_mag'"),
        ("prisma_gated", {}, {"b_mag": torch.full((16,), torch.nan)}, "'b_mag' .* not finite"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(name, config, tensors, sentence, tmp_path):
    with pytest.raises(MmsaeError, match=sentence):
        formats.load(changed(name, tmp_path, config, tensors))


def test_rows_that_were_normalised_by_their_user_can_be_read(tmp_path):
    """What the refusal says does work: the config changed, and rows normalised as ViT-Prisma does."""
    core = formats.load(changed("prisma_standard", tmp_path, {"normalize_activations": "none"}))
    rows = (X - X.mean(-1, keepdim=True)) / (X.std(-1, keepdim=True) + 1e-5)
    state = torch.load(of("prisma_standard") / "weights.pt", weights_only=True)
    assert_close(
        core.encode(rows).dense(), ((rows - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu(), **TOLERANCE
    )


def test_batchtopk_of_llamascopium_selects_over_the_batch(tmp_path):
    core = formats.load(changed("llamascopium_topk", tmp_path, {"act_fn": "batchtopk"}))
    with pytest.raises(MmsaeError, match="no inference threshold"):
        core.encode(X)
    assert core.train().encode(X).l0().sum() == 3 * len(X)


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


@pytest.mark.parametrize("name", ["llamascopium_topk", "prisma_standard", "prisma_topk", "released_goodfire"])
def test_unsafe_or_cut_pickle_is_refused_and_not_run(name, tmp_path):
    place = of(name)
    path = tmp_path / place.name
    (shutil.copytree if place.is_dir() else shutil.copy)(place, path)
    file = next(path.glob("*.pt")) if path.is_dir() else path
    whole = file.read_bytes()
    torch.save({"cfg": Payload(), "state_dict": {"W_enc": torch.ones(8, 16)}}, file)
    with pytest.raises(MmsaeError, match="could run code when opened"):
        formats.load(path)  # also where the format is yet to be found
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MmsaeError, match="missing or damaged"):
        formats.load(path)


def test_dcp_checkpoint_and_qwen_outside_its_folder_are_named(tmp_path):
    folder = changed("llamascopium_relu", tmp_path)
    (folder / "sae_weights.safetensors").rename(folder / "sae_weights.dcp")
    with pytest.raises(MmsaeError, match="let Llamascopium save it on one device"):
        formats.load(folder)
    shutil.copy(of("released_qwen_scope"), tmp_path / "layer0.sae.pt")
    with pytest.raises(MmsaeError, match="-L0_50 says how many fire"):
        formats.load(tmp_path / "layer0.sae.pt")
    with pytest.raises(MmsaeError, match="neither of Goodfire's nor of Qwen Scope's"):
        formats.load(of("prisma_topk"), "released")


def test_gemma_scope_that_is_more_than_a_jumprelu_is_refused(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(inside(next(g for g in GOLDEN if g.name == "gemma_scope_2_transcoder")), folder)
    tensors = load_file(folder / "params.safetensors")
    save_file({**tensors, "affine_skip_connection": torch.ones(3, 8)}, folder / "params.safetensors")
    with pytest.raises(MmsaeError, match="'affine_skip_connection'"):
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
    with pytest.raises(MmsaeError, match=r"rescales each row.*save it with normalize=False"):
        formats.load(tmp_path / "v5.pt")


def test_openai_topk_without_normalisation_follows_its_formula(tmp_path):
    state, settings = openai_state(), {"k": 3, "postact_fn": "ReLU"}
    file = tmp_path / "v5.pt"
    torch.save({**state, "activation": "TopK", "activation_state_dict": settings, "normalize": False}, file)
    core = formats.load(file)
    codes = largest((X - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"], 3).relu()
    assert_close(core.encode(X).dense(), codes, **TOLERANCE)
    assert_close(core(X), codes @ state["decoder.weight"].T + state["pre_bias"], **TOLERANCE)
    settings["postact_fn"] = "Identity"
    torch.save({**state, "activation": "TopK", "activation_state_dict": settings, "normalize": False}, file)
    with pytest.raises(MmsaeError, match="'TopK and Identity'; known here: ReLU, TopK and ReLU"):
        formats.load(file)


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

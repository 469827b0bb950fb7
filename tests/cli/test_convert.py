from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mmsae.artifact
from mmsae import formats
from mmsae.cli import convert
from mmsae.cli.main import main
from mmsae.cores import TopK

GOLDEN = Path(__file__).parents[1] / "formats" / "golden"


@pytest.fixture
def sae():
    torch.manual_seed(0)
    return mmsae.artifact.save(TopK(32, 64, k=4), "sae", activations={"stream": "blocks.3", "source": {"model": "toy"}})


@pytest.mark.parametrize("to", ["saelens", "sparsify", "dictionary_learning"])
def test_there_and_back_with_check(to, sae, store, capsys):
    main(["convert", "sae", "theirs", f"--to={to}", "--check", f"--activations={store / 'test'}"])
    said = capsys.readouterr().out
    assert said.startswith("dictionary: theirs\n")
    assert "read again, random rows: largest difference of codes" in said
    assert f"read again, {store / 'test'}: largest difference" in said
    main(["convert", "theirs", "ours", "--to=mmsae", "--check"])
    before, after = (load_file(f"{folder}/sae.safetensors") for folder in ("sae", "ours"))
    assert all(torch.equal(before[name], after[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    assert "blocks.3" in "".join(path.read_text() for path in Path("theirs").glob("*.json"))


def test_from_one_library_to_another_keeps_model_and_hook_point(capsys):
    main(["convert", str(GOLDEN / "dictionary_learning_AutoEncoderTopK"), "theirs", "--to=sparsify", "--check"])
    assert formats.detect("theirs") == "sparsify"
    assert "resid_post_layer_1" in Path("theirs/cfg.json").read_text()
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("llamascopium_transcoder", "saelens"),
        ("llamascopium_topk", "dictionary_learning"),
        ("llamascopium_crosscoder", "mmsae"),
        ("prisma_gated", "saelens"),
        ("prisma_skip_transcoder", "saelens"),
        ("prisma_topk_skip_transcoder", "sparsify"),
        ("saelens_matching_pursuit_all", "saelens"),
        ("saelens_abstopk_rescale", "mmsae"),
        ("dictionary_learning_AutoEncoderTopK/ae.pt", "sparsify"),
    ],
)
def test_one_command_converts_and_checks(name, to, capsys):
    main(["convert", str(GOLDEN / name), "out", f"--to={to}", "--check"])
    said = capsys.readouterr().out
    assert "read again, random rows: largest difference of codes" in said


def test_activations_of_several_streams_stand_side_by_side(capsys, refused):
    crosscoder = str(GOLDEN / "llamascopium_crosscoder")
    np.save("both.npy", np.random.default_rng(0).normal(size=(9, 16)).astype("float32"))
    np.save("one.npy", np.zeros((9, 8), dtype="float32"))
    main(["convert", crosscoder, "ours", "--to=mmsae", "--activations=both.npy"])
    assert "(9 rows" in capsys.readouterr().out
    assert "shape [9, 8], not [n, 16]" in refused("convert", crosscoder, "two", "--to=mmsae", "--activations=one.npy")
    assert "no architecture for a Crosscoder" in refused("convert", crosscoder, "theirs", "--to=saelens")


def test_refused_pickle_is_said_where_no_format_fits(refused):
    torch.save({"cfg": torch.nn.Linear(1, 1), "state_dict": {}}, "prisma.pt")
    assert "could run code when opened, so it is refused" in refused("convert", "prisma.pt", "out", "--to=mmsae")


def test_activations_may_be_a_file(sae, capsys):
    np.save("x.npy", np.random.default_rng(0).normal(size=(9, 32)).astype("float32"))
    save_file({"x": torch.randn(7, 32)}, "x.safetensors")
    for file, n_rows in (("x.npy", 9), ("x.safetensors", 7)):
        main(["convert", "sae", f"for_{n_rows}", f"--activations={file}"])
        assert f"({n_rows} rows" in capsys.readouterr().out


def test_a_difference_is_an_error(sae, monkeypatch, capsys):
    read = formats.load

    def wrong(*args):
        core = read(*args)
        core.b_enc.data[0] += 0.1
        return core

    monkeypatch.setattr(convert.formats, "load", wrong)
    with pytest.raises(SystemExit):
        main(["convert", "sae", "theirs", "--check"])
    assert "theirs does not compute what sae does, to 1e-05, by read again on random rows" in capsys.readouterr().err


def failing(error):
    def ask(folder):
        raise error

    return ask


def test_a_library_that_cannot_be_asked_is_named(sae, monkeypatch, capsys, refused):
    monkeypatch.setattr(formats.saelens, "ask", failing(ImportError()))
    main(["convert", "sae", "theirs", "--check"])
    assert "sae-lens is not installed, so it was not asked about the result" in capsys.readouterr().out
    monkeypatch.setattr(formats.saelens, "ask", failing(KeyError("batchtopk")))
    main(["convert", "theirs", "ours", "--to=mmsae", "--check"])
    assert "sae-lens cannot read theirs (KeyError: 'batchtopk'), so it was not" in capsys.readouterr().out
    assert "sae-lens cannot read again (KeyError" in refused("convert", "sae", "again", "--check")


def test_the_library_is_asked_and_its_difference_is_an_error(sae, monkeypatch, capsys, refused):
    monkeypatch.setattr(formats.saelens, "ask", lambda folder: lambda x: (torch.zeros(len(x), 64), x))
    said = refused("convert", "sae", "theirs", "--check")
    assert "by sae-lens on the result on random rows: do not use it" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["./nix", "y"], "nix does not exist"),
        (["sae", "y", "--to=foo"], "--to=foo is none of 'saelens', 'sparsify', 'dictionary_learning', 'mmsae'"),
        (["sae", "y", "--from=foo"], "--from=foo is none of 'mmsae', 'saelens', 'sparsify'"),
        (["sae", "y", "--from=saelens"], "there is no cfg.json"),
        (["folder", "y"], "no format that is known here; known: saelens, sparsify, dictionary_learning, gemma_scope"),
        (["sae"], "give --out"),
        (["sae", "y", "--activations=nix"], "neither a store nor a file"),
        (["sae", "y", "--activations=narrow.npy"], "shape [3, 5], not [n, 32]"),
        (["sae", "y", "--activations=pickled.npy"], "no plain array"),
        (["sae", "y", "--activations=two.safetensors"], "2 tensors"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(words, said, sae, refused):
    Path("folder").mkdir()
    np.save("narrow.npy", np.zeros((3, 5)))
    np.save("pickled.npy", np.array([{}], dtype=object))
    save_file({"a": torch.ones(2, 32), "b": torch.ones(2, 32)}, "two.safetensors")
    assert said in refused("convert", *words)

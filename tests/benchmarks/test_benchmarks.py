import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOY = ["--sizes", "16,64,4,32", "--rounds", "2", "--steps", "2", "--precision", "32-true"]
PACKAGES = {
    "saelens": "sae_lens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
    "overcomplete": "overcomplete",
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a program in this process, where its workers start faster the second time, and gives what it printed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(program, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *arguments])
        importlib.import_module(program).main()
        return capsys.readouterr().out

    return run


def contenders(path):
    return [record["contender"] for record in json.loads(path.read_text())["records"]]


def test_training_is_compared_in_time_memory_and_quality(run, tmp_path):
    raw = tmp_path / "raw.json"
    shown = run("train", "--peers", "none", "--quality", *TOY, "--json", str(raw))
    names = ["mmsae", "mmsae-fp32", "mmsae-loop", "dense"]
    assert contenders(raw) == names
    for name in names:
        assert sum(f"│ {name} " in line for line in shown.splitlines()) == 2  # one row in each table
    assert "over the bare loop" in shown
    for record in json.loads(raw.read_text())["records"]:
        assert [turn["steps"] for turn in record["turns"]] == [2, 2]
        assert all(turn["wall"] > 0 and turn["cpu"] > 0 for turn in record["turns"])
        assert 0 < record["facts"]["fvu"] < 1.5
        assert record["facts"]["l0"] <= 4


def test_encoding_is_compared(tmp_path):
    """As a user starts it, from the root of the repository."""
    command = [sys.executable, "benchmarks/encode.py", "--peers", "none", "--controls", "dense", *TOY]
    raw = tmp_path / "raw.json"
    done = subprocess.run([*command, "--json", str(raw)], capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contenders(raw) == ["mmsae", "dense"]
    assert "│ dense " in done.stdout


def test_scaling_shows_the_cost_of_doubling(run, tmp_path):
    raw = tmp_path / "raw.json"
    shown = run(
        *("scaling", "--size", "16,64,4,32", "--latents", "64,128", "--ks", "", "--batches", "", "--thread-counts", ""),
        *("--rounds", "2", "--steps", "2", "--precision", "32-true", "--json", str(raw)),
    )
    assert "per doubling over the whole range" in shown
    assert [record["value"] for record in json.loads(raw.read_text())["records"]] == [64, 128]


def test_unknown_contenders_are_answered_with_the_known_ones(run):
    with pytest.raises(SystemExit, match="no contender 'sealens'; known: saelens, dictionary_learning, sparsify"):
        run("train", "--peers", "sealens")


def test_a_named_peer_that_is_missing_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"overcomplete is not installed: pip install 'mmsae\[benchmark\]' brings it"):
        run("train", "--peers", "overcomplete")


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_a_peer_takes_part(run, name, tmp_path):
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{name} is not installed: pip install 'mmsae[benchmark]' brings it")
    for program in ("train", "encode"):
        raw = tmp_path / f"{program}.json"
        run(program, "--peers", name, "--controls", "none", *TOY, "--json", str(raw))
        assert contenders(raw) == ["mmsae", name]


def test_reading_is_compared_with_the_bare_forward_pass(run, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    raw = tmp_path / "raw.json"
    names = ["CausalLM", "Timm", "Signal", "Custom"]
    shown = run(
        *("extract", "--toy", "--sources", ",".join(names), "--rounds", "1", "--batch", "2", "--batches", "2"),
        *("--json", str(raw)),
    )
    assert all(f"{name}: read " in shown for name in names)
    records = {record["source"]: record for record in json.loads(raw.read_text())["records"]}
    assert list(records) == names
    ways = {"to depth", "in full", "read", "collate", "extract"}
    for record in records.values():
        assert set(record["seconds"]) == ways
        assert all(len(found) == 1 and found[0] > 0 for found in record["seconds"].values())
    assert records["Timm"]["rows"] == 4 * 197  # a class token and 14 x 14 patches


@pytest.mark.slow
def test_every_class_of_source_is_read(run, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from specimens import SPECIMENS

    for name in SPECIMENS:
        shown = run("extract", "--toy", "--sources", name, "--rounds", "1", "--batch", "2", "--batches", "1")
        assert f"{name}: read " in shown


def test_an_unknown_source_is_answered_with_the_known_ones(run):
    with pytest.raises(SystemExit, match="no source 'Tim'; known: CausalLM, TextEncoder"):
        run("extract", "--sources", "Tim")


def test_several_dictionaries_in_one_pass_are_compared_with_the_sum(run):
    shown = run("together", "--ks", "2,4", "--d-latent", "64", "--batch", "64", "--steps", "1", "--rounds", "1")
    assert "2 dictionaries in one pass cost" in shown

"""The CLAP that ships: its own class, its size, what it knows, and that its training resumes."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from datamodules import Sounds
from mmsae.miniatures.sounds import FACTORS
from mmsae.sources import CLAP, PairedEmbeddings
from mmsae.sources.weights import located

FOLDER = Path(located("miniature:clap"))
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def source():
    return CLAP("miniature:clap", ["audio_model.audio_encoder.norm"], device="cpu")


def test_it_is_small_and_of_the_library_s_own_class(source):
    assert (FOLDER / "model.safetensors").stat().st_size < 5e6
    assert type(source.model).__name__ == "ClapModel"
    assert {p.dtype for p in source.model.parameters()} == {torch.float32}
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert file.get_tensor("logit_scale_a").dtype == torch.float16
    assert sum(p.numel() for p in source.model.parameters()) < 2.5e6


def test_it_hears_every_factor_of_new_sounds(source):
    data = Sounds(n_test=150, sound_seed=5, source=source, examples_per_forward=50)
    right = {}
    for batch in data.item_batches("test"):
        with torch.no_grad():
            for name, values in source.outcomes(source.forward(batch), batch).items():
                right.setdefault(name, []).append(values)
    accuracy = {name.removeprefix("accuracy_"): float(torch.cat(v).mean()) for name, v in right.items()}
    assert set(accuracy) == set(FACTORS)
    told = json.loads((FOLDER / "config.json").read_text())["zero_shot_accuracy"]
    for factor, share in accuracy.items():
        assert share > told[factor] - 0.06, factor
        assert told[factor] > 0.97


def test_its_pairs_match(source):
    pairs = PairedEmbeddings(source)
    items = Sounds(source=source, sound_seed=6).items("test")
    batch = pairs.collate([items[i] for i in range(40)])
    rows = pairs.read(batch)
    own = pairs.outcomes(rows["acts"], batch)["cosine"]
    others = pairs.outcomes({**rows["acts"], "text": rows["acts"]["text"].roll(1, 0)}, batch)["cosine"]
    assert own.mean() > others.mean() + 0.15


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    monkeypatch.syspath_prepend(str(RECIPES))
    train = runpy.run_path(str(RECIPES / "train_sound_clap.py"))["train"]
    few = {"steps": 2, "batch_size": 4, "width": 16, "n_test": 4, "precision": "fp32"}
    train(str(tmp_path / "whole"), **few)
    stop = sys.modules["train_scene_clip"].save
    checkpoints = []

    def interrupted(path, *rest):
        stop(path, *rest)
        if path.name == "checkpoint.safetensors":
            checkpoints.append(path)
            raise KeyboardInterrupt

    monkeypatch.setitem(train.__globals__, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(str(tmp_path / "twice"), **few, checkpoint_every=1)
    assert checkpoints
    monkeypatch.setitem(train.__globals__, "save", stop)
    train(str(tmp_path / "twice"), **few)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "twice")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    again = CLAP(str(tmp_path / "twice"), ["audio_projection"], device="cpu")
    assert again.forward(again.collate(again.example_items())).shape == (2, 128)

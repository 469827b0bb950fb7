import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmsae.encoders import read_encoder
from mmsae.miniatures.wristbands import CHANNELS, FACTORS, Wristbands
from mmsae.sources import Signal
from mmsae.sources.weights import located

ROOT = Path(__file__).parents[2]
FOLDER = Path(located("miniature:e4"))
TINY = {"steps": 6, "batch_size": 4, "dim": 16, "depth": 1, "heads": 2, "n_train": 24, "n_test": 16}


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    spec = importlib.util.spec_from_file_location("train_e4", ROOT / "recipes" / "train_e4.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "probe_auc", lambda features, labels, seeds: float(features.std()))  # it is slow
    before = torch.get_num_threads()
    yield module
    torch.set_num_threads(before)


def test_the_files_that_ship_are_small():
    assert {path.name for path in FOLDER.iterdir()} == {"config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5e5


def test_its_tokens_lie_in_many_directions():
    """Without the terms that hold them apart the effective rank is below 4."""
    encoder, content = read_encoder(FOLDER)
    assert content["preprocess"]["channels"] == list(CHANNELS)
    assert content["masked_rmse"]["last"] < content["masked_rmse"]["first"]
    assert set(content["probe_auc"]["trained"]) == set(FACTORS)
    signals, _ = Wristbands("test", 40, seed=5, seconds=16).arrays()
    mean, std = (np.array(content["preprocess"][key], np.float32)[:, None] for key in ("mean", "std"))
    x = torch.from_numpy(np.clip((signals - mean) / std, -5, 5))
    with torch.no_grad():
        tokens = encoder(x).flatten(0, 1)
    share = torch.linalg.eigvalsh(tokens.T.cov()).clamp(min=1e-12)
    share = share / share.sum()
    assert float((-share * share.log()).sum().exp()) > 8


def test_a_position_is_a_second_of_a_channel():
    source = Signal("miniature:e4", ["norm"], device="cpu")
    items = [Wristbands("test", 2, seconds=16)[i] for i in range(2)]
    rows = source.read(source.collate(items))
    assert len(rows["sample_id"]) == 2 * 6 * 16
    assert rows["channel"].unique().tolist() == list(range(6))
    assert rows["start_s"].unique().tolist() == list(range(16))
    assert rows["duration_s"].unique().tolist() == [1.0]


def test_a_run_that_was_interrupted_ends_at_the_same_weights(recipe, tmp_path, monkeypatch):
    recipe.train(str(tmp_path / "whole"), **TINY)
    saved = recipe.save

    def stop(path, tensors, metadata):
        saved(path, tensors, metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(str(tmp_path / "parts"), **TINY, checkpoint_every=3)
    monkeypatch.setattr(recipe, "save", saved)
    recipe.train(str(tmp_path / "parts"), **TINY, checkpoint_every=3)
    whole, parts = (read_encoder(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert_close(parts, whole, rtol=0, atol=0)
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"config.json", "model.safetensors"}
    told = [json.loads((tmp_path / name / "config.json").read_text())["masked_rmse"] for name in ("whole", "parts")]
    assert told[0] == told[1]

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.miniatures.captions import FACTORS, vocabulary
from mmsae.miniatures.clip import FOLDER, WordTokenizer, scene_clip, zero_shot, zero_shot_accuracy
from mmsae.miniatures.scenes import Scenes

open_clip = pytest.importorskip("open_clip")
ROOT = Path(__file__).parents[2]
TINY = {"steps": 5, "batch_size": 8, "width": 32, "layers": 1, "threads": 1, "precision": "fp32", "n_test": 20}


@pytest.fixture(scope="module")
def clip():
    return scene_clip()


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("train_scene_clip", ROOT / "recipes" / "train_scene_clip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_caption_survives_the_tokenizer(clip):
    _, _, tokenizer = clip
    for scene in Scenes("test", 200):
        ids = tokenizer(scene["text"])[0]
        assert tokenizer.decode(ids) == scene["text"]
        assert ids[ids.argmax()] == tokenizer.end  # where open_clip reads the embedding


def test_unknown_and_surplus_words_do_no_harm():
    tokenizer = WordTokenizer(vocabulary(), context_length=5)
    ids = tokenizer(["A purple seven!", "a large red seven at the top"])
    assert ids.shape == (2, 5)
    assert tokenizer.decode(ids[0]) == "a <unknown> seven"
    assert tokenizer.decode(ids[1]) == "a large red"
    assert (ids.max(dim=1).values == tokenizer.end).all()
    assert tokenizer("a seven", context_length=9).shape == (1, 9)


def test_pictures_of_any_size_and_mode_become_the_same_tensor(clip):
    _, preprocess, _ = clip
    image = Scenes("test", 1)[0]["image"]
    assert preprocess(image).shape == (3, 64, 64)
    assert preprocess(Image.new("L", (100, 50))).shape == (3, 64, 64)
    pixels = preprocess(image) * preprocess.std + preprocess.mean
    assert_close(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)


def test_the_miniature_is_an_open_clip_model(clip):
    model, preprocess, tokenizer = clip
    assert type(model) is open_clip.CLIP
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    scene = Scenes("test", 1)[0]
    with torch.no_grad():
        image, text, scale = model(preprocess(scene["image"])[None], tokenizer(scene["text"]))
    assert image.shape == text.shape == (1, 128)
    assert scale > 1


def test_the_files_that_ship_are_small():
    assert {path.name for path in FOLDER.iterdir()} == {"config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6


def test_zero_shot_accuracy_is_as_documented(clip):
    documented = json.loads((FOLDER / "config.json").read_text())["zero_shot_accuracy"]
    n = 300
    measured = zero_shot_accuracy(*clip, Scenes("test", n, seed=1))
    for factor in FACTORS:
        assert documented[factor] > 0.85, factor
        # other scenes than the documented ones: four standard errors of a share of n scenes
        assert abs(measured[factor] - documented[factor]) < 4 * (0.25 / n) ** 0.5, factor


def test_zero_shot_rows_are_unit_vectors(clip):
    model, _, tokenizer = clip
    weight = zero_shot(model, tokenizer, "position")
    assert weight.shape == (9, 128)
    assert_close(weight.norm(dim=1), torch.ones(9))
    with pytest.raises(MmsaeError, match="nearest: position"):
        zero_shot(model, tokenizer, "positon")


def test_missing_weights_are_explained(tmp_path):
    with pytest.raises(MmsaeError, match=r"no config.json and no model.safetensors"):
        scene_clip(tmp_path)


def test_the_recipe_writes_a_model_that_loads(recipe, tmp_path, capsys):
    recipe.train(str(tmp_path), **TINY)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    model, preprocess, tokenizer = scene_clip(tmp_path)
    assert config["training"]["steps"] == 5
    assert config["zero_shot_accuracy"] == zero_shot_accuracy(model, preprocess, tokenizer, Scenes("test", 20))
    assert "Zero-shot accuracy on 20 test scenes" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_to_the_same_weights(recipe, tmp_path, monkeypatch):
    settings = TINY | {"checkpoint_every": 2}
    recipe.train(str(tmp_path / "whole"), **settings)
    contrast, calls = recipe.contrast, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:  # two steps are in the checkpoint, the third is lost
            raise KeyboardInterrupt
        return contrast(*args)

    monkeypatch.setattr(recipe, "contrast", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(str(tmp_path / "parts"), **settings)
    with pytest.raises(MmsaeError, match="other settings"):
        recipe.train(str(tmp_path / "parts"), **(settings | {"lr": 1e-2}))
    recipe.train(str(tmp_path / "parts"), **settings)
    assert len(calls) == 4 + 3
    whole, parts = (scene_clip(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_every_true_caption_counts_as_a_positive(recipe):
    labels = recipe.facts([dict.fromkeys(FACTORS, 0), dict.fromkeys(FACTORS, 1)])
    stated = recipe.facts([{"digit": 0}, {}])  # "a zero" is true of the first scene, "a digit" of both
    n_prompts = sum(map(len, FACTORS.values()))
    right = torch.full((2, 2 + n_prompts), -30.0)
    right[:, :2] = torch.tensor([[30.0, 30.0], [-30.0, 30.0]])
    start = 2
    for values in FACTORS.values():
        right[0, start], right[1, start + 1] = 30.0, 30.0
        start += len(values)
    one_positive = right.clone()
    one_positive[0, 1] = -30.0  # as CLIP's own targets want it
    log2 = torch.tensor(2.0).log()
    assert_close(recipe.contrast(right, labels, stated), 2 * 0.5 * log2 / 7)  # entropy of the two targets shared by two
    assert recipe.contrast(one_positive, labels, stated) > recipe.contrast(right, labels, stated) + 1

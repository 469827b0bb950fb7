"""The experiment of SAE-V's filter: its data are what it says, it runs, and goes on where it was stopped."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmsae.errors import MmsaeError
from mmsae.miniatures.captions import FACTORS, mentions

pytest.importorskip("transformers")
RECIPES = Path(__file__).parent.parent / "recipes"
TOY = {"n": 64, "dictionary_steps": 10, "steps": 1, "batch_size": 8, "n_test": 4, "n_random": 1}


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import filter_finetune

    return filter_finetune


def test_half_of_the_conversations_have_the_picture_of_another(recipe, tmp_path):
    spoilt = np.array(recipe.spoil(tmp_path, 40, seed=10))
    assert spoilt.sum() == 20
    lines = [json.loads(line) for line in (tmp_path / "talks.jsonl").read_text().splitlines()]
    pictures = [int(Path(line["image"]).stem) for line in lines]
    assert sorted(pictures) == list(range(40))  # every picture is used once
    assert ((np.array(pictures) != np.arange(40)) == spoilt.astype(bool)).all()
    scenes, _ = recipe.talks_about("train", 40, 10)
    labels = scenes.labels()
    wrong = 0
    for line, picture in zip(lines, pictures, strict=True):
        assert (tmp_path / line["image"]).is_file()
        asked, caption, _, _ = (turn["value"] for turn in line["conversations"])
        assert asked.startswith("<image>\n")
        stated = mentions(caption)
        assert set(stated) == set(FACTORS)
        true = all(labels[factor][picture] == value for factor, value in stated.items())
        assert true or spoilt[line["id"]]
        wrong += not true
    assert wrong >= 19  # two scenes may be alike


@pytest.mark.slow
def test_the_experiment_runs_and_is_not_repeated(recipe, tmp_path, capsys, monkeypatch):
    recipe.run(str(tmp_path), seed=10, **TOY)
    said = capsys.readouterr().out
    assert "AUROC" in said
    assert "random half 1" in said
    found = json.loads((tmp_path / "seed_10" / "results.json").read_text())
    arms = {"before fine-tuning", "the clean half", "all", "random half 1", "cosine_co", "association"}
    assert {name.removeprefix("arm/") for name in found if name.startswith("arm/")} == arms
    assert found["clean"]["the clean half"] == 1
    assert found["clean"]["all"] == 0.5
    assert found["auroc"]["loss"] > 0.9  # the model knows what it sees
    monkeypatch.setattr(recipe.Teacher, "tuned", None)
    monkeypatch.setattr(recipe, "main", None)
    recipe.run(str(tmp_path), seed=10, **TOY)
    with pytest.raises(MmsaeError, match="was made with other settings"):
        recipe.run(str(tmp_path), seed=10, **{**TOY, "steps": 2})
    with pytest.raises(MmsaeError, match="scores has 'clip'; there are cosine_co"):
        recipe.run(str(tmp_path), seed=10, scores=["clip"], **TOY)


def test_random_halves_have_nothing_to_do_with_what_is_spoilt(recipe, tmp_path):
    """NumPy's generators of the seeds [10] and [10, 0] are the same."""
    spoilt = np.array(recipe.spoil(tmp_path, 200, seed=10))
    half = np.random.default_rng([10, 1, 1]).permutation(200)[:100]
    assert 0.35 < spoilt[half].mean() < 0.65

"""Judges, near misses and neighbours."""

import numpy as np
import pytest
import torch
from scipy import sparse

from mmsae.errors import MmsaeError
from mmsae.latents import LatentStore
from mmsae.steering import Judge, RuleJudge, axbench
from mmsae.steering.fragility import auroc, confounded, confusion, diagonal_mass
from mmsae.steering.judges import Prompt, Reply, rating

TEXTS = ["the dog saw a dog in the garden near the river", "the dog ran", "the the the the the the", "a cat sat there"]
BEGUN = ["anna walked to the garden by the river"] * 4


def test_the_rules_rate_what_they_can_count():
    found = axbench(RuleJudge(), "dog", BEGUN, TEXTS)
    assert found["concept"].tolist() == [2, 1, 0, 0]
    assert found["instruction"].tolist() == [2, 0, 0, 0]
    assert found["fluency"].tolist() == [2, 2, 0, 2]
    assert found["overall"].tolist() == [2, 0, 0, 0]
    known = axbench(RuleJudge(["cat"], vocabulary=["a", "cat", "sat"]), "animal", BEGUN[:1], TEXTS[3:])
    assert (known["concept"], known["fluency"]) == (1, 1)  # "there" is unknown


def test_the_overall_rating_is_a_harmonic_mean():
    class Fixed(Judge):
        def ask(self, prompts):
            said = {"concept": "Rating: 2", "instruction": "I say 1.\nRating: 1", "fluency": "0.5"}
            return [Reply(said[prompt.about["aspect"]]) for prompt in prompts]

    assert axbench(Fixed(), "dog", ["x"], ["y"])["overall"][0] == pytest.approx(3 / (1 / 2 + 1 + 2))


def test_a_judge_is_told_everything_in_words():
    seen = []

    class Model(Judge):
        def ask(self, prompts):
            seen.extend(prompts)
            return [Reply("Rating: 1")] * len(prompts)

    axbench(Model(), "a dog", ["go on"], ["text to rate"])
    assert len(seen) == 3
    assert all("text to rate" in prompt.text and "Rating" in prompt.text for prompt in seen)
    assert "a dog" in seen[0].text
    assert "go on" in seen[1].text


@pytest.mark.parametrize("said", ["very good", "Rating: 7", "3", ""])
def test_a_reply_without_a_rating_is_refused(said):
    with pytest.raises(MmsaeError, match="gave no rating"):
        rating(Reply(said))


def test_what_a_judge_cannot_use_is_said():
    with pytest.raises(MmsaeError, match="give about="):
        RuleJudge().ask([Prompt("How good?")])
    with pytest.raises(MmsaeError, match="2 texts do not fit 1 instructions"):
        axbench(RuleJudge(), "dog", ["x"], ["y", "z"])


def test_auroc_counts_ties_half():
    assert auroc(np.array([2.0, 3.0]), np.array([1.0, 0.0])) == 1
    assert auroc(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5
    assert auroc(np.array([1.0, 3.0]), np.array([2.0, 0.0])) == 0.75
    assert np.isnan(auroc(np.array([]), np.array([1.0])))


@pytest.fixture
def coffee():
    """Latent 0 fires on value 0 and nearly as strongly on value 1, its near miss; latents 1 to 3 on their own value."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 4, 800)
    codes = np.zeros((800, 4), np.float32)
    codes[:, 0] = np.where(labels == 0, 1.2, np.where(labels == 1, 1.0, 0)) * (1 + 0.3 * draw.standard_normal(800))
    for value in (1, 2, 3):
        codes[:, value] = (labels == value) * 1.0
    found = sparse.csc_matrix(np.maximum(codes, 0))
    return LatentStore(found.indptr, found.indices, found.data, {}, 800), labels


def test_near_misses_are_found_and_are_harder(coffee):
    store, labels = coffee
    found = confounded(store, 0, labels, 0)
    assert found.misses == [1]
    assert found.near < found.auroc - 0.1
    assert confounded(store, 2, labels, 2).near == 1
    assert confounded(store, 0, labels, 0, misses=[3]).near > 0.95
    with pytest.raises(MmsaeError, match="3 labels do not fit 800 samples"):
        confounded(store, 0, labels[:3], 0)


def test_the_confusion_shows_the_neighbour(coffee):
    store, labels = coffee
    matrix = confusion(store, [0, 1, 2, 3], labels)
    assert np.allclose(matrix.sum(1), 1)
    assert matrix[0, 1] > 0.3
    assert np.allclose(np.diag(matrix)[1:], 1)
    assert diagonal_mass(matrix) == pytest.approx(np.diag(matrix).mean())
    assert torch.is_tensor(torch.tensor(matrix))

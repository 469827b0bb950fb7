"""What steering is measured by, on the models that ship: more of what is wanted, and a price for it."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from mmsae.errors import MmsaeError
from mmsae.miniatures.ecgs import ECGs
from mmsae.miniatures.questions import OPEN, SceneQuestions
from mmsae.miniatures.scenes import FACTORS, Scenes
from mmsae.sources import CausalLM, SceneCLIP, Signal, VisionLanguage
from mmsae.steering import (
    AddVector,
    AnswerReadout,
    ContinuationReadout,
    PosteriorReadout,
    Probe,
    deciding,
    difference_in_means,
    steer,
)
from mmsae.steering.readouts import divergence
from mmsae.steering.targets import opening
from mmsae.steering.word_readouts import saying

LAST = "visual.transformer.resblocks.3"
RED = FACTORS["colour"].index("red")


def direction(source, items, positive):
    """Difference of means of the activations of some items and others."""
    rows = source.read(source.collate(items))
    point = source.points[0].name
    chosen = torch.as_tensor(np.asarray(positive))[rows["sample_id"]]
    return difference_in_means(rows["acts"][point], chosen)


def on_digit(rows):
    """The four patches in the middle of the digit's place."""
    down, right = rows["row"] - 2 * (rows["label.position"] // 3), rows["column"] - 2 * (rows["label.position"] % 3)
    return (down >= 1) & (down <= 2) & (right >= 1) & (right <= 2)


@pytest.fixture(scope="module")
def clip():
    source = SceneCLIP([LAST], positions="first", device="cpu")
    scenes = Scenes("val", 160, seed=5)
    items = [scenes[i] for i in range(160)]
    vector = direction(source, items, [item["labels"]["colour"] == RED for item in items])
    others = [item for item in items if item["labels"]["colour"] != RED][:24]
    return source, others, vector


def test_a_posterior_moves_towards_the_target_and_collateral_grows_with_strength(clip):
    source, items, vector = clip
    readout = PosteriorReadout(deciding(source), items, "colour", RED, ["digit", "position"], FACTORS["colour"])
    found = [readout.measure()]
    for strength in (1.0, 4.0):
        steered = partial(steer, source, None, LAST, AddVector(vector, strength))
        found.append(readout.measure(steered))
    clean, some, much = found
    assert clean.success.mean() <= 0.1
    assert some.effect.mean() > clean.effect.mean() + 0.3  # .73 was seen, and all contexts decide for red
    assert some.success.mean() >= 0.8
    assert clean.damage.tolist() == [0.0] * len(items)
    assert clean.changed.sum() == 0
    assert 0 < some.damage.mean() < much.damage.mean()
    assert some.shown.count("red") > clean.shown.count("red")
    assert readout.groups.tolist() == [item["sample_id"] for item in items]


def test_what_nobody_decides_about_is_said(clip):
    source, items, _ = clip
    with pytest.raises(MmsaeError, match="nothing decides about the label 'mood'; there are digit"):
        PosteriorReadout(deciding(source), items, "mood", 0).measure()
    with pytest.raises(MmsaeError, match="colour has 8 values, so none of number 8"):
        PosteriorReadout(deciding(source), items, "colour", 8).measure()
    with pytest.raises(MmsaeError, match="at least one context"):
        PosteriorReadout(deciding(source), [], "colour", 0)


def test_divergence_is_that_of_kullback_and_leibler():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    assert float(divergence(p, q)) == pytest.approx(np.log(2), abs=1e-6)
    assert float(divergence(p, p)) == 0


def test_a_probe_decides_for_a_model_that_does_not():
    source = Signal("miniature:ecg_jepa", ["blocks.0"], device="cpu")
    train, test = ECGs("train", 200, 3), ECGs("test", 60, 3)
    probe = Probe(source, [train[i] for i in range(200)], ["class", "rhythm"])
    items = [test[i] for i in range(60)]
    found = probe(items)
    truth = torch.tensor([item["labels"]["rhythm"] for item in items])
    assert found["rhythm"].shape == (60, 3)
    assert torch.allclose(found["rhythm"].sum(1), torch.ones(60, dtype=torch.float64))
    assert (found["rhythm"].argmax(1) == truth).float().mean() >= 0.7
    with pytest.raises(MmsaeError, match="at least two of its values"):
        Probe(source, [train[0]], ["class"])


@pytest.fixture(scope="module")
def writer():
    return CausalLM("miniature:text", ["model.layers.2"], device="cpu")


def test_continuations_are_searched_and_judged_by_the_model_as_it_is(writer):
    names = enumerate(["anna", "ben"])
    items = [{"text": f"{name} went to the river with a lamp.", "sample_id": i} for i, name in names]
    facts = [["ben"], ["anna"]]
    readout = ContinuationReadout(writer, items * 8, ["dog", "dogs"], facts * 8, n_samples=1, seed=1)
    clean = readout.measure()
    assert clean.damage.tolist() == [0.0] * 16
    noise = AddVector(torch.randn(128, generator=torch.Generator().manual_seed(0)), 6.0)
    broken = readout.measure(partial(steer, writer, None, "model.layers.2", noise))
    assert broken.damage.mean() > 1  # a model that is not steered finds that unlikely
    assert set(clean.success) <= {0.0, 1.0}
    assert len(readout.groups) == 16
    begun, texts = readout.texts(np.arange(16) < 2)
    assert begun == [item["text"] for item in items]
    assert all(texts)


def test_words_are_found_whole():
    assert saying(["dog", "hot dog"]).search("A Dog.")
    assert not saying(["dog"]).search("dogma")
    with pytest.raises(MmsaeError, match="words to look for are missing"):
        saying([])


def test_prompts_are_first_sentences():
    assert opening("anna went. there she saw a dog.") == "anna went."
    assert opening("one two three four") == "one two"
    with pytest.raises(MmsaeError, match="too short"):
        opening("one")


def test_answers_about_pictures_follow_a_steered_tower():
    point = "model.vision_tower.encoder.layers.2"
    source = VisionLanguage("miniature:lmm", [point], tokens="image", device="cpu")
    asked = SceneQuestions("val", 80, form="open", seed=5)
    items = [asked[i] for i in range(80)]
    rows = source.read(source.collate(items))
    ink = on_digit(rows)
    vector = difference_in_means(rows["acts"][point][ink], rows["label.colour"][ink] == RED)
    others = [item for item in items if item["labels"]["colour"] != RED][:12]
    mask = on_digit(source.read(source.collate(others))).view(len(others), -1)
    readout = AnswerReadout(source, others, OPEN["colour"], "red.", [OPEN["position"]])
    clean = readout.measure(nullcontext)
    where = lambda context: mask[: context.shape[0]]  # noqa: E731
    steered = readout.measure(partial(steer, source, None, point, AddVector(vector, 2.0), where=where))
    assert clean.success.sum() == 0
    assert clean.changed.sum() == 0
    assert np.abs(clean.damage).max() < 1e-3
    assert steered.effect.mean() > clean.effect.mean() + 0.2  # .45 was seen
    assert steered.damage.mean() > 0
    assert "red." in steered.shown
    assert len(clean.shown) == 8
    # success is what is decoded greedily
    assert [s == 1 for s in steered.success[:8]] == [text == "red." for text in steered.shown]

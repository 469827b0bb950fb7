import re

import numpy as np
import pytest

from mmsae.errors import MmsaeError
from mmsae.miniatures import scenes as drawing
from mmsae.miniatures.captions import compose
from mmsae.miniatures.scenes import FACTORS, INK, SIDE, Scenes, caption_for, mentions, zero_shot_prompts

POSITIONS = FACTORS["position"]


def ink_cover(scene, tolerance=30):
    """Which pixels have the colour of the scene's ink: bool [64, 64]."""
    ink = np.array(INK[FACTORS["colour"][scene["labels"]["colour"]]])
    return (np.abs(np.asarray(scene["image"]).astype(int) - ink) <= tolerance).all(axis=2)


def test_a_scene_is_a_pure_function_of_its_index():
    forwards = [np.asarray(Scenes("train", 20, seed=3)[i]["image"]) for i in range(20)]
    longer = Scenes("train", 10**9, seed=3)
    for i in reversed(range(20)):
        assert np.array_equal(np.asarray(longer[i]["image"]), forwards[i])
        assert longer[i]["text"] == Scenes("train", 20, seed=3)[i]["text"]


def test_the_scenes_are_the_same_on_every_machine():
    scene = Scenes("test", 8)[5]
    assert (scene["text"], scene["labels"]) == (GOLDEN_TEXT, GOLDEN_LABELS)


GOLDEN_TEXT = "a large magenta digit near the left"
GOLDEN_LABELS = {"digit": 8, "colour": 6, "position": 3, "size": 1, "background": 4}


def test_seed_and_split_change_the_scenes():
    first = Scenes("train", 50).labels()
    for other in (Scenes("train", 50, seed=1), Scenes("val", 50)):
        assert any((first[factor] != other.labels()[factor]).any() for factor in FACTORS)


def test_labels_come_without_drawing_and_agree_with_the_scenes(monkeypatch):
    scenes = Scenes("val", 60, seed=1)
    drawn = [scenes[i]["labels"] for i in range(60)]
    monkeypatch.setattr(drawing, "_draw", None)
    labels = scenes.labels()
    assert {factor: values.dtype for factor, values in labels.items()} == dict.fromkeys(FACTORS, np.int64)
    for factor in FACTORS:
        assert labels[factor].tolist() == [each[factor] for each in drawn]


def test_splits_share_no_digit():
    pools = [drawing._digits(split) for split in ("train", "val", "test")]
    train, val, test = ({glyph.tobytes() for group in pool for glyph in group} for pool in pools)
    assert len(train) + len(val) + len(test) == 1797
    assert len(train | val | test) == 1797


def test_every_scene_shows_its_colour_and_its_position():
    scenes = Scenes("test", 300)
    for scene in scenes:
        if FACTORS["background"][scene["labels"]["background"]] in ("flower", "building"):
            continue  # bright petals may pass for ink
        rows, columns = np.nonzero(ink_cover(scene))
        assert len(rows) > 15, scene["text"]
        cell = [int(np.clip(np.mean([c.min(), c.max()]) // (SIDE / 3), 0, 2)) for c in (rows, columns)]
        assert POSITIONS[3 * cell[0] + cell[1]] == POSITIONS[scene["labels"]["position"]]


def test_large_digits_are_taller_than_small_ones():
    heights = {"small": [], "large": []}
    for scene in Scenes("train", 200):
        if FACTORS["background"][scene["labels"]["background"]] == "plain":
            rows = np.nonzero(ink_cover(scene))[0]
            heights[FACTORS["size"][scene["labels"]["size"]]].append(np.ptp(rows) + 1)
    assert max(heights["small"]) < min(heights["large"])


def test_no_stroke_is_cut_by_the_border():
    for scene in Scenes("train", 300):
        if FACTORS["background"][scene["labels"]["background"]] == "plain":
            rows, columns = np.nonzero(ink_cover(scene))
            assert {0, SIDE - 1}.isdisjoint({*rows, *columns}), scene["sample_id"]


def test_captions_state_only_true_facts():
    scenes = Scenes("train", 1000)
    counts = []
    for scene, caption in zip(scenes, scenes.captions(), strict=True):
        assert scene["text"] == caption
        stated = mentions(caption)
        counts.append(len(stated))
        assert stated.items() <= scene["labels"].items(), caption
    assert set(counts) == {1, 2, 3, 4, 5}
    assert 0.4 < np.mean(np.array(counts) == 1) < 0.65


@pytest.mark.parametrize("factor", FACTORS)
def test_values_are_about_equally_frequent(factor):
    n, k = 20_000, len(FACTORS[factor])
    counts = np.bincount(Scenes("train", n).labels()[factor], minlength=k)
    assert np.abs(counts - n / k).max() < 5 * np.sqrt(n / k)  # five standard deviations of a uniform draw


def test_factors_are_independent():
    labels = Scenes("train", 20_000).labels()
    table = np.corrcoef(np.stack([labels[factor] for factor in FACTORS]))
    assert np.abs(table - np.eye(len(FACTORS))).max() < 0.03


@pytest.mark.parametrize("factor", FACTORS)
def test_prompts_state_one_fact_each(factor):
    stated = [mentions(prompt) for prompt in zero_shot_prompts(factor)]
    assert stated == [{factor: index} for index in range(len(FACTORS[factor]))]


def test_captions_read_well():
    assert caption_for("digit", "eight") == "an eight"
    assert caption_for("digit", "one") == "a one"
    assert caption_for("position", "top left") == caption_for("position", 0) == "a digit at the top left"
    assert caption_for("background", "striped") == "a digit on stripes"
    full = compose({"digit": 7, "colour": 1, "position": 4, "size": 1, "background": 3}, opening=2)
    assert full == "a picture of a large orange seven at the centre in front of a flower"


def test_mentions_reads_the_longest_position():
    assert mentions("A digit at the top left.") == {"position": POSITIONS.index("top left")}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Scenes("trian", 3), "no split 'trian'"),
        (lambda: Scenes("train", 0), "n=0"),
        (lambda: caption_for("color", "red"), "nearest: colour"),
        (lambda: caption_for("colour", "reed"), "nearest: red"),
        (lambda: caption_for("colour", 8), "none of index 8"),
        (lambda: zero_shot_prompts("color"), "nearest: colour"),
    ],
)
def test_mistakes_are_explained(call, said):
    with pytest.raises(MmsaeError, match=re.escape(said)):
        call()


def test_indices_behave_like_those_of_a_list():
    scenes = Scenes("train", 5)
    assert scenes[-1]["sample_id"] == 4
    assert len(list(scenes)) == len(scenes) == 5
    with pytest.raises(IndexError):
        scenes[5]

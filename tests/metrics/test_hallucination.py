"""POPE and CHAIR: against hand-counted answers and captions, and on files in their published layouts."""

import json
import math

import pytest

from mmsae.errors import MmsaeError
from mmsae.metrics.coco_objects import CocoObjects, file_names
from mmsae.metrics.hallucination import chair, polling, read_polling, says_yes


def test_answers_are_read_as_the_script_of_pope_reads_them():
    assert says_yes("Yes, there is a dog in the image.")
    assert says_yes("yes")
    assert not says_yes("No, there is no dog.")
    assert not says_yes("There is not a dog in the image.")
    assert says_yes("There is a dog. There is no cat.")  # the first sentence alone
    assert says_yes("I see a nose and a knot.")  # words, not letters
    assert says_yes("")  # what is no "no" is a "yes", as in the paper


def test_polling_counts_yes_as_the_positive_class():
    said = [True, True, True, False, False, True]
    truth = [True, True, False, True, False, False]
    found = polling(said, truth)
    assert found.accuracy == pytest.approx(3 / 6)
    assert found.precision == pytest.approx(2 / 4)
    assert found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert found.yes_rate == pytest.approx(4 / 6)
    assert found.false_presence == pytest.approx(2 / 3)
    assert found.n == 6
    always = polling([True] * 4, [True, True, False, False])
    assert (always.accuracy, always.recall, always.yes_rate, always.false_presence) == (0.5, 1, 1, 1)
    never = polling([False] * 4, [True, True, False, False])
    assert math.isnan(never.precision)
    assert (never.f1, never.false_presence) == (0, 0)
    with pytest.raises(MmsaeError, match="2 answers to 3 questions"):
        polling([True, False], [True, False, True])


def test_files_of_pope_are_read(tmp_path):
    rows = [
        {"question_id": 0, "image": "COCO_val2014_000000548882.jpg", "image_id": 548882,
         "text": "Is there a dining table in the image?", "label": "yes"},
        {"question_id": 1, "image": "COCO_val2014_000000548882.jpg", "image_id": 548882,
         "text": "Is there a tv in the image?", "label": "no"},
    ]  # fmt: skip
    path = tmp_path / "coco_pope_random.json"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    first, second = read_polling(path)
    assert first == ("COCO_val2014_000000548882.jpg", "Is there a dining table in the image?", True)
    assert not second.present
    path.write_text('{"image": "a.jpg", "text": "?", "label": "maybe"}')
    with pytest.raises(MmsaeError, match=r"line 1 .* label 'maybe'"):
        read_polling(path)
    path.write_text('{"image": "a.jpg"}')
    with pytest.raises(MmsaeError, match=r"line 1 .*is no question of POPE"):
        read_polling(path)
    with pytest.raises(MmsaeError, match="cannot be read"):
        read_polling(tmp_path / "none.json")


def test_chair_counts_mentions_captions_and_what_is_found():
    stated = [["dog", "dog", "cat"], ["car"], []]
    present = [{"dog"}, {"car", "person"}, {"boat"}]
    found = chair(stated, present)
    assert found.chair_s == pytest.approx(1 / 3)
    assert found.chair_i == pytest.approx(1 / 4)
    assert found.recall == pytest.approx(2 / 4)
    assert found.n == 3
    silent = chair([[]], [{"dog"}])
    assert math.isnan(silent.chair_i)
    assert silent.recall == 0


SYNONYMS = """person, girl, man, woman, people, child
dining table, table, desk
dog, puppy
hot dog
bear
teddy bear, teddybear
elephant
knife
wine glass
bus, minibus
toilet
"""


@pytest.fixture
def objects(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(SYNONYMS)
    return CocoObjects(path)


@pytest.mark.parametrize(
    ("caption", "stated"),
    [
        ("Two puppies under a desk.", ["dog", "dining table"]),
        ("A man eats a hot dog", ["person", "hot dog"]),
        ("hot dogs, and dogs", ["hot dog", "dog"]),
        ("a baby elephant with a child", ["elephant", "person"]),
        ("wine glasses and knives on buses", ["wine glass", "knife", "bus"]),
        ("a teddy bear and a bear", ["teddy bear", "bear"]),
        ("a toilet seat", ["toilet"]),
        ("the sky is blue", []),
    ],
)
def test_objects_are_found_in_captions(objects, caption, stated):
    assert objects.stated(caption) == stated


def test_annotations_of_coco_say_what_is_there(objects, tmp_path):
    instances = tmp_path / "instances_val2014.json"
    instances.write_text(json.dumps({
        "images": [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}, {"id": 8, "file_name": "8.jpg"}],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 7, "category_id": 18}, {"image_id": 7, "category_id": 18}],
    }))  # fmt: skip
    captions = tmp_path / "captions_val2014.json"
    said = [{"image_id": 7, "caption": "A girl and a puppy"}, {"image_id": 99, "caption": "a bus"}]
    captions.write_text(json.dumps({"images": [], "annotations": said}))
    assert objects.present(instances) == {7: {"dog"}, 8: set()}
    assert objects.present(instances, captions) == {7: {"dog", "person"}, 8: set()}
    assert file_names(instances)[7] == "COCO_val2014_000000000007.jpg"
    captions.write_text("[]")
    with pytest.raises(MmsaeError, match="no annotation file of COCO: it has no annotations"):
        objects.present(instances, captions)
    instances.write_text('{"images": [], "annotations": [], "categories": [{"id": 3, "name": "kite"}]}')
    with pytest.raises(MmsaeError, match="does not know COCO's 'kite'"):
        objects.present(instances)

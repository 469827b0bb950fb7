import json

import numpy as np
import pytest
from tiny import vectors_source

from datamodules import Prompts, ScenePrompts
from datamodules.base import SPLITS
from mmsae.errors import MmsaeError
from mmsae.miniatures.captions import mentions


def data(path, **arguments):
    return Prompts(str(path), source=vectors_source(), **{"val_share": 0, "test_share": 0, **arguments})


def items(module, split="train"):
    return [module.items(split)[i] for i in range(len(module.items(split)))]


def test_one_prompt_in_a_line_each_once(tmp_path):
    (tmp_path / "a.txt").write_text("a red cat \n\na dog\na red cat\n", "utf-8-sig")
    assert [item["text"] for item in items(data(tmp_path / "a.txt"))] == ["a red cat", "a dog"]
    assert [item["sample_id"] for item in items(data(tmp_path / "a.txt"))] == [0, 1]
    assert "labels" not in items(data(tmp_path / "a.txt"))[0]


def test_labels_of_json_lines(tmp_path):
    rows = [
        {"prompt": "a cat in oil", "labels": {"animal": "cat", "style": "oil"}},
        {"prompt": "a dog", "labels": {"animal": "dog"}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    module = data(tmp_path / "a.jsonl", text_key="prompt")
    assert module.factors == {"animal": ("cat", "dog"), "style": ("oil",)}
    assert [item["labels"] for item in items(module)] == [{"animal": 0, "style": 0}, {"animal": 1, "style": -1}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b" \n ", r"holds no prompts"),
        ("a.txt", b"caf\xe9", r"is not UTF-8 text \(.* at byte 3\)"),
        ("a.csv", b"a", r"names no \.txt or \.jsonl file of prompts"),
        ("a.jsonl", b'{"text": "a"}\n{', r"a\.jsonl, line 2 has no prompt 'text'"),
        ("a.jsonl", b'{"prompt": "a"}', r"a\.jsonl, line 1 has no prompt 'text'"),
        ("a.jsonl", b'{"text": 3}', r"line 1 has no prompt 'text' \(3 is no prompt\)"),
        ("a.jsonl", b'{"text": "a", "labels": [1]}', r"line 1 has no prompt"),
    ],
)
def test_what_cannot_be_read_is_named_before_any_model_is_loaded(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MmsaeError, match=said):
        data(tmp_path / name)


def test_scene_prompts_say_what_their_labels_say():
    module = ScenePrompts(n_train=1100, n_val=108, n_test=108, source=vectors_source())
    found = {split: items(module, split) for split in SPLITS}
    for split in SPLITS:
        assert all(mentions(item["text"]) == item["labels"] for item in found[split])
    assert len({item["text"] for split in SPLITS for item in found[split]}) == 720
    first = [item["labels"]["digit"] for item in found["train"][:100]]
    assert np.bincount(first, minlength=10).min() > 3  # a short split has all values


def test_scene_prompts_with_pictures():
    module = ScenePrompts(n_train=6, n_val=3, n_test=3, pictures=True, source=vectors_source())
    item = items(module)[5]
    assert item["image"].size == (32, 32)
    assert mentions(item["text"]) == item["labels"]

"""Conversations about pictures in both layouts, their splits by picture, and lines that are wrong."""

import json

import pytest
from PIL import Image

from datamodules import Conversations
from datamodules.base import SPLITS
from mmsae.errors import MmsaeError
from mmsae.sources import Custom


def llava(image, question="<image>\nWhat is it?", answer="a cat"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": image} if image else {})}


def parts(image, question="What is it?", answer="a cat"):
    asked = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def identity_model():
    from torch import nn

    return nn.Sequential(nn.Identity())


@pytest.fixture
def made(tmp_path):
    """Writes rows to a file, and twelve pictures beside it."""
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")

    def data(rows, **arguments):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "talks.jsonl").write_text("\n".join(lines) + "\n")
        source = Custom(identity_model, ["0"], input_shape=[3, 8, 8], device="cpu")
        return Conversations(str(tmp_path / "talks.jsonl"), source=source, **arguments)

    return data


def everything(data):
    return {split: [data.items(split)[i] for i in range(len(data.items(split)))] for split in SPLITS}


@pytest.mark.parametrize("layout", [llava, parts])
def test_both_layouts_give_the_same_items(made, tmp_path, layout):
    data = made([layout(f"{i}.png", answer=f"a cat {i}") for i in range(12)])
    found = everything(data)
    items = [item for split in SPLITS for item in found[split]]
    assert {len(found[split]) for split in ("val", "test")} == {1}
    assert sorted(item["image"] for item in items) == sorted(str(tmp_path / f"{i}.png") for i in range(12))
    for item in items:
        number = item["image"].split("/")[-1].removesuffix(".png")
        user, assistant = item["messages"]
        assert user == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        assert assistant == {"role": "assistant", "content": [{"type": "text", "text": f"a cat {number}"}]}


def test_a_picture_is_in_one_split_only(made):
    """Also when it is chained to others by a conversation about both."""
    both = {"messages": [{"role": "user", "content": [
        {"type": "image", "image": "0.png"}, {"type": "image", "image": "1.png"}, {"type": "text", "text": "Which?"},
    ]}]}  # fmt: skip
    data = made([llava(f"{i % 12}.png", answer=str(i)) for i in range(36)] + [both], val_share=0.2, test_share=0.2)
    found = everything(data)
    seen = {s: {p for item in found[s] for p in item.get("images", [item.get("image")])} for s in SPLITS}
    assert sum(map(len, seen.values())) == 12
    assert all(seen.values())
    assert sum(map(len, found.values())) == 37
    (split,) = [s for s in SPLITS if any("images" in item for item in found[s])]
    assert sum(path.endswith(("/0.png", "/1.png")) for path in seen[split]) == 2


def test_words_alone_are_allowed(made):
    data = made([llava(None, "How are you?", f"well {i}") for i in range(5)], val_share=0.2, test_share=0.2)
    for items in everything(data).values():
        for item in items:
            assert "image" not in item
            assert [part["type"] for message in item["messages"] for part in message["content"]] == ["text", "text"]


def test_placeholders_keep_their_place(made):
    rows = [{"image": ["0.png", "1.png"], "conversations": [
        {"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "no"},
    ]}] * 3  # fmt: skip
    item = made(rows, val_share=0.0, test_share=0.0).items("train")[0]
    kinds = [part["type"] for part in item["messages"][0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert [path.split("/")[-1] for path in item["images"]] == ["0.png", "1.png"]


def test_pictures_may_lie_elsewhere(made, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    data = made([llava("a.png")], images=str(folder), val_share=0.0, test_share=0.0)
    assert data.items("train")[0]["image"] == str(folder / "a.png")
    with pytest.raises(MmsaeError, match=r"data\.images=/nowhere is no folder"):
        made([llava("a.png")], images="/nowhere")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"image": "0.png", "conv', r"line 2: this is no JSON"),
        (llava(None), r"line 2, message 1: there is an <image> but no picture for it"),
        (llava("0.png", "What?"), r"line 2: the picture '0\.png' has no <image> in the messages"),
        (llava("gone.png"), r"line 2: there is no picture '.*gone\.png'"),
        (llava("https://pictures.net/a.png"), r"line 2: 'https://pictures\.net/a\.png' is no path of a picture"),
        ({"image": "0.png"}, r"line 2: there is no list of messages under 'messages', 'conversations'"),
        (
            {"messages": [{"role": "humn", "content": "hello"}]},
            r"line 2, message 1: role 'humn' is unknown; nearest: human",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, r"line 2, message 1: there is nothing in 'content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            r"neither a part of type text nor one of type",
        ),
        ("[]", r"line 2: there is no list of messages"),
        ({"messages": ["hello"]}, r"line 2, message 1: 'hello' is no message"),
    ],
)
def test_wrong_lines_are_told(made, row, said):
    with pytest.raises(MmsaeError, match=said):
        made([llava("1.png"), row, llava("2.png")]).items("train")


def test_wrong_paths_are_told(tmp_path):
    source = Custom(identity_model, ["0"], input_shape=[3, 8, 8], device="cpu")
    with pytest.raises(MmsaeError, match=r"names no \.jsonl file"):
        Conversations(str(tmp_path / "nothing.jsonl"), source=source)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(MmsaeError, match="holds no conversation"):
        Conversations(str(tmp_path / "empty.jsonl"), source=source).items("train")


def test_without_a_source_the_words_are_shown(made):
    data = made([llava("0.png"), llava(None, "How are you?", "well"), llava("1.png")], val_share=0.3, test_share=0.3)
    data.source = None
    shown = {data.render(item)["kind"] for items in everything(data).values() for item in items}
    assert shown == {"image", "text"}

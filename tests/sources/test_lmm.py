"""Multimodal models: tokens of pictures and words told apart, and traced back to pixels, roles and answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_lmm import FAMILIES, SIDE, WORDS, save_lmm, template
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.sources import VisionLanguage
from mmsae.sources.chat import ROLES

pytest.importorskip("transformers")
SPEAKS = {"user": ROLES.index("user"), "assistant": ROLES.index("assistant")}
TOWER = {
    "llava": "model.vision_tower.encoder.layers.1",
    "llava_next": "model.vision_tower.encoder.layers.1",
    "qwen2_vl": "model.visual.blocks.1",
    "qwen2_5_vl": "model.visual.blocks.1",
    "idefics3": "model.vision_model.encoder.layers.1",
}
PROJECTOR = {
    "llava": "model.multi_modal_projector",
    "llava_next": "model.multi_modal_projector",
    "qwen2_5_vl": "model.visual.merger",
    "idefics3": "model.connector",
    "gemma3": "model.multi_modal_projector",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family == "smolvlm":
            pytest.importorskip("num2words")
        if family not in made:
            made[family] = save_lmm(tmp_path_factory.mktemp(family), family)
        return str(made[family])

    return folder


def picture(width=70, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(90, 110, (height, width, 3), dtype=np.uint8))


def asked(image, question="what colour is the cat ?", answer="a red cat", sample_id=0):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"image": image, "messages": messages, "sample_id": sample_id}


def source(folder, point=None, **arguments):
    inside = "text_model" if any(name in folder for name in ("idefics3", "smolvlm")) else "language_model"
    point = point or f"model.{inside}.layers.0:input"
    return VisionLanguage(folder, [point], device="cpu", **arguments)


def local(model):
    """Without attention in the vision tower every patch sees itself only."""
    for name, module in model.named_modules():
        tower = any(part in name for part in ("vision", "visual"))
        if tower and name.endswith(("attn.out_proj", "attn.proj")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def brightened(image, box):
    """The middle of a box painted white."""
    x0, y0, x1, y1 = box
    pixels = np.array(image)
    across, down = (x1 - x0) / 4, (y1 - y0) / 4
    pixels[round(y0 + down) : max(round(y1 - down), round(y0 + down) + 1),
           round(x0 + across) : max(round(x1 - across), round(x0 + across) + 1)] = 255  # fmt: skip
    return Image.fromarray(pixels)


def check_boxes(it, image, per_tile=9):
    """The token that answers to a bright spot most, of its tile, is the one whose box holds it."""
    local(it.model)
    rows = it.read(it.collate([asked(image)]))
    seen = (rows["row"] >= 0).nonzero()[:, 0]
    stream = next(iter(rows["acts"].values()))
    tried = 0
    for tile in rows["tile"][seen].unique():
        there = seen[rows["tile"][seen] == tile]
        box = torch.stack([rows[name] for name in ("x0", "y0", "x1", "y1")], 1)
        whole = ((box[there, 2:] - box[there, :2]) >= 2).all(1)
        some = there[whole][:: max(len(there) // per_tile, 1)]
        items = [asked(brightened(image, box[i].tolist()), sample_id=n) for n, i in enumerate(some)]
        changed = it.read(it.collate(items))
        acts = next(iter(changed["acts"].values())).view(len(items), *stream.shape)
        moved = (acts - stream).norm(dim=-1)  # [bright spots, tokens]
        assert torch.equal(there[moved[:, there].argmax(1)], some)
        assert (moved.amax(1) > 1e-3).all()
        tried += len(some)
    return tried, rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(70, 40), (40, 90)], ids=["wide", "tall"])
def test_a_bright_patch_moves_the_token_that_is_mapped_to_it(folders, family, size):
    it = source(folders(family))
    tried, rows = check_boxes(it, picture(*size))
    assert tried >= 4
    assert (rows["row"][rows["token_type"] == 0] == -1).all()
    assert (rows["x0"][rows["token_type"] == 0] == -1).all()
    assert rows["x1"].max() <= size[0]
    assert rows["y1"].max() <= size[1]


@pytest.mark.parametrize("family", TOWER)
def test_inside_the_vision_tower_too(folders, family):
    tried, rows = check_boxes(source(folders(family), TOWER[family]), picture())
    assert tried >= 9
    assert set(rows["token_type"].tolist()) == {1}
    assert set(rows["modality"].tolist()) == {0}


@pytest.mark.parametrize("family", PROJECTOR)
def test_and_behind_the_projector(folders, family):
    assert check_boxes(source(folders(family), PROJECTOR[family]), picture())[0] >= 4


def test_llava_boxes_tile_the_crop(folders):
    rows = source(folders("llava"), tokens="image").read(source(folders("llava")).collate([asked(picture(64, 32))]))
    assert rows["row"].tolist() == [i // 4 for i in range(16)]
    assert rows["column"].tolist() == [i % 4 for i in range(16)]
    box = torch.stack([rows[name] for name in ("x0", "y0", "x1", "y1")], 1)
    assert_close(box[0], torch.tensor([16.0, 0, 24, 8]))  # the middle 32 of 64 pixels
    assert_close(box[-1], torch.tensor([40.0, 24, 48, 32]))


def test_qwen_boxes_follow_the_size_of_the_picture(folders):
    it = source(folders("qwen2_5_vl"), tokens="image")
    for width, height in ((64, 32), (32, 80), (33, 31)):
        rows = it.read(it.collate([asked(picture(width, height))]))
        assert (rows["x1"].max(), rows["y1"].max()) == (width, height)
        area = ((rows["x1"] - rows["x0"]) * (rows["y1"] - rows["y0"])).sum()
        assert_close(area, torch.tensor(float(width * height)))


def test_llava_next_has_the_whole_picture_and_its_tiles(folders):
    it = source(folders("llava_next"), tokens="image")
    rows = it.read(it.collate([asked(picture(60, 60))]))
    for tile, n in ((0, 16), (1, 64)):
        there = (rows["tile"] == tile) & (rows["row"] >= 0)
        assert int(there.sum()) == n
        area = ((rows["x1"] - rows["x0"]) * (rows["y1"] - rows["y0"]))[there].sum()
        assert_close(area, torch.tensor(3600.0))
    assert int((rows["row"] < 0).sum()) == 8  # a separator behind every row
    few = source(folders("llava_next"), tokens="image", drop_special=True)
    assert (few.read(few.collate([asked(picture(60, 60))]))["row"] >= 0).all()


def test_tokens_know_who_speaks(folders):
    it = source(folders("qwen2_5_vl"))
    batch = it.collate([asked(picture()), asked(picture(seed=1), "where is it ?", "the cat", sample_id=1)])
    rows = it.read(batch)
    names = it.tokenizer.convert_ids_to_tokens(rows["token_id"].tolist())
    for sample, question, answer in ((0, "what colour is the cat ?", "a red cat"), (1, "where is it ?", "the cat")):
        here = (rows["sample_id"] == sample).tolist()
        said = [(name, int(role)) for name, role, yes in zip(names, rows["role"], here, strict=True) if yes]
        assert [name for name, role in said if role == SPEAKS["assistant"]] == answer.split()
        assert [name for name, role in said if role == SPEAKS["user"] and name in WORDS] == question.split()
        assert {name for name, role in said if role == 0} >= {"<s>", "<|user|>", "<|assistant|>", "<|end|>"}
        assert all(role == SPEAKS["user"] for name, role in said if name == "<|image_pad|>")


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_several_pictures_and_none_in_one_batch(folders, family):
    it = source(folders(family))
    two = [{"type": "image"}, {"type": "text", "text": "a cat"}, {"type": "image"}, {"type": "text", "text": "it ?"}]
    talk = [{"role": "user", "content": two}, {"role": "assistant", "content": "the red cat"}]
    items = [
        {"images": [picture(40, 40), picture(50, 40, 1)], "messages": talk, "sample_id": 0},
        {"messages": [{"role": "user", "content": "where is it ?"}], "sample_id": 1},
    ]
    batch = it.collate(items)
    rows = it.read(batch)
    assert rows["image"].unique().tolist() == [-1, 0, 1]
    assert (rows["token_type"][rows["sample_id"] == 1] == 0).all()
    names = it.tokenizer.convert_ids_to_tokens(rows["token_id"].tolist())
    said = [
        n for n, r, s in zip(names, rows["role"], rows["sample_id"], strict=True) if r == SPEAKS["assistant"] and s == 0
    ]
    assert said == ["the", "red", "cat"]
    with torch.no_grad():
        outcomes = it.outcomes(it.forward(batch), batch)
    assert outcomes["cross_entropy"].isnan().tolist() == [False, True]


def test_the_loss_is_that_of_the_answer(folders):
    it = source(folders("llava"))
    batch = it.collate([asked(picture())])
    with torch.no_grad():
        output = it.forward(batch)
    ids = batch["input_ids"][0].tolist()
    names = it.tokenizer.convert_ids_to_tokens(ids)
    first = names.index("<|assistant|>") + 1
    logs = output.logits[0].log_softmax(-1)
    by_hand = -sum(logs[t - 1, ids[t]] for t in range(first, first + 3))
    assert names[first : first + 3] == ["a", "red", "cat"]
    assert_close(it.loss(output, batch), by_hand)
    assert_close(it.outcomes(output, batch)["cross_entropy"], by_hand[None] / 3)


def test_without_an_answer_there_is_no_loss(folders):
    it = source(folders("llava"))
    batch = it.collate([asked(picture(), answer="")])
    with torch.no_grad(), pytest.raises(MmsaeError, match="no item of the batch has an answer"):
        it.loss(it.forward(batch), batch)


@pytest.mark.parametrize("point", ["model.language_model.layers.1", TOWER["llava"], PROJECTOR["llava"]])
def test_gradients_and_edits_reach_the_logits(folders, point):
    """After a first forward pass: LLaVA then reads what transformers' own hooks recorded (trap of hidden_states)."""
    it = source(folders("llava"), point)
    batch = it.collate([asked(picture()), asked(picture(seed=3), "where ?", "the cat", sample_id=1)])
    rows = it.read(batch, gradients=True)
    name = it.points[0].name
    slope = rows["grads"][name]
    assert slope.shape == rows["acts"][name].shape
    assert slope.norm() > 0
    step = 1e-2 * slope / slope.norm()
    with torch.no_grad():
        before = it.loss(it.forward(batch), batch)
        with it.spliced(batch, {name: lambda x: x + step}):
            after = it.loss(it.forward(batch), batch)
    assert_close(after - before, (slope * step).sum(), rtol=0.1, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "idefics3"])
def test_edits_of_packed_towers_reach_the_right_rows(folders, family):
    it = source(folders(family), TOWER[family])
    batch = it.collate([asked(picture(70, 40)), asked(picture(40, 40), "where ?", sample_id=1)])
    rows, name = it.read(batch), it.points[0].name
    first = rows["sample_id"] == 0
    with torch.no_grad():
        before = it.forward(batch).logits
        with it.spliced(batch, {name: lambda x: torch.where(first[:, None], x + 1.0 * x.flip(1), x)}):
            after = it.forward(batch).logits
        with it.spliced(batch, {name: lambda x: x}):
            assert_close(it.forward(batch).logits, before)
    assert (after - before)[0].abs().max() > 1e-4
    assert_close(after[1], before[1])


def test_tokens_choose_rows(folders):
    everything, words, patches = (
        source(folders("llava"), tokens=tokens).read(source(folders("llava")).collate([asked(picture())]))
        for tokens in ("all", "text", "image")
    )
    assert len(patches["position"]) == 16
    both = torch.cat([words["position"], patches["position"]]).sort().values
    assert torch.equal(both, everything["position"])
    mean = source(folders("llava"), tokens="image", positions="mean")
    pooled = mean.read(mean.collate([asked(picture())]))["acts"]
    assert_close(
        *(
            next(iter(rows.values()))
            for rows in (pooled, {"": next(iter(patches["acts"].values())).mean(0, keepdim=True)})
        )
    )
    assert mean.read(mean.collate([asked(picture())]))["modality"].tolist() == [0]
    with pytest.raises(MmsaeError, match="tokens='sound' is unknown"):
        source(folders("llava"), tokens="sound")
    with pytest.raises(MmsaeError, match="sees pictures only"):
        _ = source(folders("llava"), TOWER["llava"], tokens="text").model
    with pytest.raises(MmsaeError, match="before and behind the projector"):
        VisionLanguage(folders("llava"), [TOWER["llava"], "model.language_model.layers.0"], device="cpu").spec  # noqa: B018


def test_pictures_with_captions_need_no_messages(folders):
    it = source(folders("llava"), prompt="describe the picture .")
    rows = it.read(
        it.collate([{"image": picture(), "text": "a red cat", "sample_id": 0}, {"image": picture(), "sample_id": 1}])
    )
    names = it.tokenizer.convert_ids_to_tokens(rows["token_id"].tolist())
    said = [
        (n, int(s)) for n, r, s in zip(names, rows["role"], rows["sample_id"], strict=True) if r == SPEAKS["assistant"]
    ]
    assert said == [("a", 0), ("red", 0), ("cat", 0)]


def test_a_reader_sees_picture_and_words(folders):
    it = source(folders("llava"))
    shown = it.render(asked(picture()))
    assert shown["kind"] == "image_text"
    assert shown["image"].size == (70, 40)
    assert [token.strip() for token in shown["tokens"]][-4:] == ["a", "red", "cat", "<|end|>"]
    rows = it.read(it.collate([asked(picture())]))
    assert shown["positions"] == rows["position"][rows["token_type"] == 0].tolist()
    words = it.render({"messages": [{"role": "user", "content": "the cat"}], "sample_id": 0})
    assert words["kind"] == "text"
    assert dict(zip((t.strip() for t in words["tokens"]), words["roles"], strict=True))["cat"] == "user"
    assert source(folders("llava"), TOWER["llava"]).render(asked(picture()))["kind"] == "image"


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "item 7 speaks of more pictures than it has",
        ),
        (
            {"image": picture(), "messages": [{"role": "user", "content": "the cat"}]},
            "a picture that its messages do not",
        ),
        ({"image": "/nowhere.png"}, "there is no picture '/nowhere.png'"),
        ({}, "item 7 has neither 'messages' nor an 'image' nor a 'text'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of type 'audio'"),
    ],
)
def test_wrong_items_are_told(folders, item, said):
    with pytest.raises(MmsaeError, match=said):
        source(folders("llava")).collate([{**item, "sample_id": 7}])


def test_words_beyond_the_context_are_cut_but_not_pictures(folders):
    it = source(folders("llava"), context_length=22)
    assert it.collate([asked(picture())])["input_ids"].shape == (1, 22)
    assert it.read(it.collate([asked(picture())]))["position"].max() == 21
    with pytest.raises(MmsaeError, match="the pictures of item 0 take more than context_length=10 tokens"):
        source(folders("llava"), context_length=10).collate([asked(picture())])


def test_wrong_folders_are_told(folders, tmp_path):
    with pytest.raises(MmsaeError, match="holds no model that transformers can load"):
        _ = VisionLanguage(str(tmp_path), ["model"], device="cpu").model
    with pytest.raises(MmsaeError, match="there is no folder '/nowhere/lmm'"):
        _ = VisionLanguage("/nowhere/lmm", ["model"], device="cpu").model


def test_a_configuration_alone_gives_random_weights(folders):
    folder = folders("llava")
    config = json.loads((Path(folder) / "config.json").read_text())
    it = source(folder, config=config)
    rows = it.read(it.collate([asked(picture())]))
    assert int((rows["token_type"] == 1).sum()) == 16
    assert it.spec.d_in == 32
    assert it.identity["config"] == config
    with pytest.raises(MmsaeError, match="transformers cannot build"):
        _ = source(folder, config={"model_type": "no such model"}).model


def test_a_template_that_hides_its_contents_leaves_roles_unknown(folders):
    upper = template("<image>").replace("part.text", "part.text | length")
    it = source(folders("llava"), chat_template=upper)
    rows = it.read(it.collate([asked(picture())]))
    assert set(rows["role"].tolist()) == {-1}
    assert SIDE == 32

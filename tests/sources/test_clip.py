import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.miniatures import captions as miniature_words
from mmsae.miniatures import clip as miniature
from mmsae.sources import OpenCLIP, SceneCLIP

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
TEXTS = ["a red digit !", "hi", "one two three four five six seven eight nine ten eleven twelve"]


def source(hook_points, tower="image", **kwargs):
    return OpenCLIP("ViT-B-32", hook_points, tower=tower, config=SMALL, device="cpu", **kwargs)


def texts():
    return [{"text": text, "sample_id": i} for i, text in enumerate(TEXTS)]


def test_image_tower_gives_what_open_clip_reports():
    one = source(["visual.transformer.resblocks.*"])
    batch = one.collate(one.example_items())
    read = one.read(batch)
    with torch.no_grad():
        told = one.model.forward_intermediates(image=batch["input"], image_indices=[0], normalize_intermediates=False)
    maps = told["image_intermediates"][0]  # [B, C, H, W]
    acts = read["acts"]["visual.transformer.resblocks.0"]
    assert_close(acts[read["kind"] == 0].view(2, 4, 4, 32).permute(0, 3, 1, 2), maps)
    assert read["kind"].view(2, 17)[0].tolist() == [1] + [0] * 16


def test_the_pooled_embedding_is_one_row_per_picture():
    one = source(["visual"])
    batch = one.collate(one.example_items())
    read = one.read(batch)
    assert_close(read["acts"]["visual"], one.forward(batch).detach())
    assert read["row"].tolist() == [-1, -1]


def test_text_tower_knows_start_end_and_padding():
    one = source(["transformer.resblocks.*"], tower="text")
    batch = one.collate(texts())
    read = one.read(batch)
    assert read["kind"][read["sample_id"] == 0].tolist() == [1, 0, 0, 0, 0, 2]  # "!" has the id of the padding
    assert read["kind"][read["sample_id"] == 1].tolist() == [1, 0, 2]
    assert (read["sample_id"] == 2).sum() == 12  # cut at the context length
    with torch.no_grad():
        told = one.model.forward_intermediates(text=batch["input"], text_indices=[1], normalize_intermediates=False)
    assert_close(read["acts"]["transformer.resblocks.1"][:6], told["text_intermediates"][0][0, :6])
    tokens = one.render(texts()[0])["tokens"]
    assert "".join(tokens[1:-1]) == "a red digit ! "
    last = source(["transformer.resblocks.1"], tower="text", positions="last")
    assert last.read(last.collate(texts()))["kind"].tolist() == [2, 2, 2]


def test_a_local_folder_is_loaded_whole_or_not_at_all(tmp_path):
    model = source(["visual"]).model
    with torch.no_grad():
        model.visual.proj.add_(1)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}}))
    empty = OpenCLIP(str(tmp_path), ["visual"])
    with pytest.raises(MmsaeError, match="open_clip cannot load"):  # open_clip itself would go on with random weights
        empty.model  # noqa: B018
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    again = OpenCLIP(str(tmp_path), ["visual"], device="cpu")
    assert_close(again.model.state_dict(), model.state_dict())


def test_a_weight_file_is_loaded(tmp_path):
    model = source(["visual"]).model
    with torch.no_grad():
        model.visual.proj.add_(1)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    again = source(["visual"], pretrained=str(tmp_path / "w.safetensors"))
    assert_close(again.model.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "ViT-B-33"}, "open_clip has no model 'ViT-B-33'; nearest: ViT-B-32"),
        ({"model": "ViT-B-32", "pretrained": "mine"}, "neither a file nor a tag of ViT-B-32; its tags: openai"),
        (
            {"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k", "config": SMALL},
            r"cannot fetch 'ViT-B-32' with .* give a local path with pretrained=/path/to/weights.safetensors",
        ),
        ({"model": "hf-hub:no/such", "config": SMALL}, "cannot fetch 'hf-hub:no/such'"),
    ],
)
def test_what_cannot_be_loaded_is_named(arguments, said):
    with pytest.raises(MmsaeError, match=said):
        OpenCLIP(hook_points=["visual"], **arguments).model  # noqa: B018


def test_wrong_towers_and_texts_are_named():
    with pytest.raises(MmsaeError, match="tower='both' is unknown"):
        source(["visual"], tower="both")
    with pytest.raises(MmsaeError, match="item 3 has no text"):
        source(["transformer"], tower="text").collate([{"text": " ", "sample_id": 3}])


def test_the_miniature_reads_both_towers_and_knows_the_factors(monkeypatch):
    shape = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": 64, "patch_size": 16}}
    shape["text_cfg"] = {"context_length": 20, "width": 16, "heads": 2, "layers": 1}
    config = {
        "model_cfg": shape,
        "vocabulary": miniature_words.vocabulary(),
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    monkeypatch.setattr(miniature, "scene_clip", lambda: miniature.build(config))
    scenes = miniature.Scenes("test", 8)
    data = [scenes[i] for i in range(8)]
    one = SceneCLIP(["visual.transformer.resblocks.0"], device="cpu")
    batch = one.collate(data)
    read = one.read(batch)
    assert read["label.colour"].view(8, -1)[:, 0].tolist() == [item["labels"]["colour"] for item in data]
    with torch.no_grad():
        output = one.forward(batch)
    found = one.outcomes(output, batch)
    prompts = miniature.zero_shot(one.model, one.tokenizer, "colour")
    truth = torch.tensor([item["labels"]["colour"] for item in data])
    assert_close(found["accuracy_colour"], ((normalize(output, dim=-1) @ prompts.T).argmax(1) == truth).float())
    assert set(found) == {f"accuracy_{factor}" for factor in miniature.FACTORS}

    text = SceneCLIP(["transformer.resblocks.0"], tower="text", device="cpu")
    words = text.read(text.collate(data))
    counts = words["sample_id"].bincount().tolist()
    assert counts == [len(text.render(item)["tokens"]) for item in data]
    assert "".join(text.render(data[0])["tokens"][1:-1]).strip() == data[0]["text"]

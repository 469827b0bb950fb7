import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from towers import clip_config, save_clip

from mmsae.errors import MmsaeError
from mmsae.sources import HFCLIP, OpenCLIP, PairedEmbeddings, SceneCLIP, Timm

LAYERS = "vision_model.encoder.layers"


@pytest.fixture(scope="module", params=["clip", "siglip", "siglip2"])
def folder(request, tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"), "clip")


def source(folder, hook_points, **arguments):
    return HFCLIP(str(folder), hook_points, device="cpu", **arguments)


def items(n=3, **more):
    sizes = [(40, 40), (60, 24), (33, 64)]
    return [
        {"image": Image.new("RGB", sizes[i], (90 * i, 200, 10)), "text": "a red dog of the bell"[: 5 + 6 * i], **more}
        | {"sample_id": i, "labels": {"kind": i % 2}}
        for i in range(n)
    ]


def family(folder):
    return next(name for name in ("siglip2", "siglip", "clip") if folder.name.startswith(name))


def grids(batch):
    """Further arguments of SigLIP 2."""
    return {"pixel_attention_mask": batch["patch_mask"], "spatial_shapes": batch["shapes"]} if "shapes" in batch else {}


def test_layers_are_what_the_model_reports(folder):
    one = source(folder, [f"{LAYERS}.*"])
    batch = one.collate(items())
    read = one.read(batch)
    with torch.no_grad():
        more = grids(batch)
        told = one.model.get_image_features(pixel_values=batch["input"], output_hidden_states=True, **more)
        assert_close(one.forward(batch), told.pooler_output)
    own = read["sample_id"] == 1
    rows = read["acts"][f"{LAYERS}.0"][own]
    assert_close(rows, told.hidden_states[1][1, : len(rows)])
    patches = read["kind"][own] == 0
    places = list(zip(read["row"][own][patches].tolist(), read["column"][own][patches].tolist(), strict=True))
    rows, columns = batch["shapes"][1].tolist() if "shapes" in batch else (4, 4)
    assert places == [(i, j) for i in range(rows) for j in range(columns)]
    assert (read["kind"][own] == 1).sum() == (family(folder) == "clip")


def test_text_tower_is_that_of_the_model(folder):
    one = source(folder, ["text_model.encoder.layers.1"], tower="text")
    batch = one.collate(items())
    read = one.read(batch)
    start = 2 if family(folder) == "siglip2" else 1  # whose tokenizer calls nothing a start
    assert read["kind"][read["sample_id"] == 0].tolist() == [start, 0, 0, 2]
    assert len(one.render(items()[0])["tokens"]) == 4
    with torch.no_grad():
        given = {"input_ids": batch["input_ids"]}
        if family(folder) == "clip":
            given["attention_mask"] = batch["attention_mask"]
        assert_close(one.forward(batch), one.model.get_text_features(**given).pooler_output)
    # SigLIP reads the embedding at the last position, so texts are always filled up
    assert batch["input_ids"].shape[1] == (8 if family(folder) != "clip" else batch["attention_mask"].sum(1).max())


def test_zero_shot_and_pairs_are_those_of_the_model(folder):
    prompts = {"kind": ["a red dog", "the bell"]}
    one = source(folder, [f"{LAYERS}.0"], prompts=prompts)
    batch = one.collate(items())
    with torch.no_grad():
        words = one.with_tower("text").words(prompts["kind"])
        if family(folder) != "clip":
            del words["attention_mask"]  # SigLIP was trained without
        more = grids(batch)
        told = one.model(pixel_values=batch["input"], **words, **more)
        logits, truth = one.predictions(one.forward(batch), batch)
    assert_close(logits.softmax(1), told.logits_per_image.softmax(1))
    assert truth.tolist() == [0, 1, 0]
    pairs = PairedEmbeddings(one, unit=True)
    read = pairs.read(pairs.collate(items()))
    assert list(pairs.spec.streams) == ["image", "text"]
    assert_close(read["acts"]["image"], told.image_embeds)
    assert read["pair_id"].tolist() == [0, 1, 2]


def test_a_vision_tower_alone_is_found_under_both_names(clip, tmp_path):
    from transformers import CLIPVisionModel

    whole = source(clip, [f"{LAYERS}.0"])
    CLIPVisionModel.from_pretrained(clip).save_pretrained(tmp_path)
    whole.preprocessor.save_pretrained(tmp_path)
    read = whole.read(whole.collate(items()))["acts"]
    for name in (f"{LAYERS}.0", "encoder.layers.0"):
        alone = source(tmp_path, [name])
        (rows,) = alone.read(alone.collate(items()))["acts"].values()
        assert_close(rows, *read.values())
    both = source(clip, ["encoder.layers.0"])
    assert_close(both.read(both.collate(items()))["acts"], read)
    with pytest.raises(MmsaeError, match="has no text tower"):
        source(tmp_path, ["encoder.layers.0"], tower="text").model  # noqa: B018


def test_half_precision_weights_are_fed_in_half_precision(clip):
    one = source(clip, [f"{LAYERS}.1"], dtype="bfloat16")
    whole = source(clip, [f"{LAYERS}.1"])
    rows, wide = (s.read(s.collate(items()))["acts"][f"{LAYERS}.1"] for s in (one, whole))
    assert rows.dtype == torch.bfloat16
    assert_close(rows.float(), wide, atol=0.1, rtol=0.1)


def test_what_cannot_be_loaded_is_named(clip, tmp_path):
    with pytest.raises(MmsaeError, match="neither a local folder nor can it be fetched"):
        HFCLIP("openai/clip-vit-base-patch16", [f"{LAYERS}.0"]).model  # noqa: B018
    with pytest.raises(MmsaeError, match=r"nearest: .*vision_model.encoder.layers"):
        source(clip, ["vision_model.encoder.layer.0"]).model  # noqa: B018
    with pytest.raises(MmsaeError, match="transformers cannot build"):
        HFCLIP("x", ["y"], config={"model_type": "clop"}).model  # noqa: B018
    one = source(clip, [f"{LAYERS}.0"], prompts={"kind": ["a dog"]})
    batch = one.collate(items())
    with pytest.raises(MmsaeError, match="the label kind=1 has no prompt: there are 1"):
        one.predictions(torch.zeros(3, 12), batch)


@pytest.mark.parametrize("inner", ["SceneCLIP", "OpenCLIP"])
def test_pairs_of_open_clip(inner):
    small = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    one = SceneCLIP(["visual"], device="cpu") if inner == "SceneCLIP" else \
        OpenCLIP("ViT-B-32", ["visual"], config=small, device="cpu")  # fmt: skip
    pairs = PairedEmbeddings(one)
    batch = pairs.collate(items())
    read = pairs.read(batch)
    with torch.no_grad():
        assert_close(read["acts"]["image"], one.model.encode_image(batch["image"]["input"]))
        assert_close(read["acts"]["text"], one.model.encode_text(batch["text"]["input"]))
    with pairs.spliced(batch, {"text": torch.zeros_like}):
        assert not pairs.forward(batch)["text"].any()
    assert pairs.forward(batch)["text"].any()
    assert pairs.render(items()[0])["text"] == "a red"


def test_pairs_need_two_towers():
    with pytest.raises(MmsaeError, match="Timm has not two towers"):
        PairedEmbeddings(Timm("resnet18", ["layer1"]))


def test_masks_follow_the_crop_of_the_model(clip):
    """A picture of two halves, left 3 and right 5, wider than high: the model crops both ends off."""
    import numpy as np

    mask = np.full((32, 64), 3, np.uint8)
    mask[:, 40:] = 5
    one = source(clip, [f"{LAYERS}.0"])
    batch = one.collate([{"image": Image.new("RGB", (64, 32)), "mask": Image.fromarray(mask), "sample_id": 0}])
    read = one.read(batch)
    assert read["label.mask"].tolist() == [-1] + [3, 3, 3, 5] * 4  # columns 16 to 48 are left
    assert clip_config("clip")["vision_config"]["patch_size"] == 8

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.sources import VisionEncoder

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SMALL |= {"image_size": 32, "patch_size": 8}
HIERA = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 24, "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [24, 48, 96, 192], "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 8, 4], "global_attention_blocks": [3], "image_size": [128, 128],
}  # fmt: skip
NECK = {"backbone_channel_list": [192, 96, 48, 24], "fpn_hidden_size": 64}
SAM2 = {"model_type": "sam2", "vision_config": {"backbone_config": HIERA, **NECK}}
SAM = {"model_type": "sam_vision_model", **SMALL, "output_channels": 16, "mlp_dim": 32, "global_attn_indexes": [1],
       "window_size": 2}  # fmt: skip


def encoder(config, hook_points, **kwargs):
    return VisionEncoder("untrained", list(hook_points), config=config, device="cpu", **kwargs)


def pictures(n=2, side=40):
    noise = np.random.default_rng(0).integers(0, 255, (n, side, side, 3), dtype=np.uint8)
    return [{"image": Image.fromarray(noise[i]), "text": "noise", "sample_id": i} for i in range(n)]


def test_stages_of_sam2_are_maps_with_channels_last():
    source = encoder(SAM2, ["vision_encoder.backbone.blocks.2", "backbone.blocks.3"])
    batch = source.collate(pictures())
    read = source.read(batch)
    with torch.no_grad():
        maps = source.model.backbone(batch["input"]).intermediate_hidden_states[2]
    assert maps.shape == (2, 8, 8, 96)
    assert source.spec.streams == {"backbone.blocks.2": 96, "backbone.blocks.3": 96}
    row = (read["sample_id"] == 1) & (read["row"] == 2) & (read["column"] == 5)
    assert_close(read["acts"]["backbone.blocks.3"][row][0], maps[1, 2, 5])


def test_the_neck_of_sam2_has_channels_first():
    source = encoder(SAM2, ["neck.convs.3"])  # stride 4, the finest; nothing is added to it
    batch = source.collate(pictures())
    read = source.read(batch)
    with torch.no_grad():
        maps = source.model(batch["input"]).fpn_hidden_states[0]
    assert maps.shape == (2, 64, 32, 32)
    row = (read["sample_id"] == 1) & (read["row"] == 20) & (read["column"] == 5)
    assert_close(read["acts"]["neck.convs.3"][row][0], maps[1, :, 20, 5])
    with pytest.raises(MmsaeError, match=r"neck of 'untrained' gives maps \[B, C, H, W\], its blocks \[B, H, W, C\]"):
        encoder(SAM2, ["neck.convs.1", "backbone.blocks.3"]).model  # noqa: B018


CASES = {
    "vit": ({"model_type": "vit", **SMALL}, "layers.*", [-1], {0, 1}, 4),
    "beit": ({"model_type": "beit", **SMALL}, "layers.*", [-1], {0, 1}, 4),
    "dinov2": ({"model_type": "dinov2", **SMALL}, "encoder.layer.*", [-1], {0, 1}, 4),
    "dinov2 with registers": (
        {"model_type": "dinov2_with_registers", **SMALL}, "encoder.layer.*", [-1] * 5, {0, 1, 3}, 4
    ),
    "dinov3": (
        {"model_type": "dinov3_vit", **SMALL, "num_register_tokens": 4}, "model.layer.*", [-1] * 5, {0, 1, 3}, 4
    ),
    "sam": (SAM, "layers.*", [], {0}, 4),
    "swin": (
        {"model_type": "swin", "embed_dim": 12, "depths": [1, 2], "num_heads": [1, 2], "image_size": 32,
         "window_size": 4}, "encoder.layers.0.blocks.0", [], {0}, 8
    ),
    "convnext": (
        {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32},
        "encoder.stages.1", [], {0}, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_patch_that_is_changed_is_the_one_at_that_row_and_column(name):
    """At depth all patches change; the one that changes most is the one that was painted."""
    config, point, before, kinds, side = CASES[name]
    source = encoder(config, [point])
    batch = source.collate(pictures(1))
    read = source.read(batch)
    first = next(iter(read["acts"]))
    assert read["row"].tolist() == before + [i // side for i in range(side * side)]
    assert read["column"].tolist() == before + [i % side for i in range(side * side)]
    assert set(read["kind"].tolist()) == kinds
    step = batch["input"].shape[-1] // side
    batch["input"][0, :, 2 * step : 3 * step, step : 2 * step] += 3  # row 2, column 1
    changed = (source.read(batch)["acts"][first] - read["acts"][first]).norm(dim=1)
    changed[read["row"] < 0] = 0
    where = int(changed.argmax())
    assert (read["row"][where], read["column"][where]) == (2, 1)


def test_the_neck_of_sam_has_channels_first():
    source = encoder(SAM, ["neck"])
    batch = source.collate(pictures())
    with torch.no_grad():
        maps = source.model(batch["input"]).last_hidden_state
    assert maps.shape == (2, 16, 4, 4)
    assert_close(source.read(batch)["acts"]["neck"].view(2, 4, 4, 16), maps.permute(0, 2, 3, 1))


def test_positions_of_mae_hiera_have_no_place():
    config = {"model_type": "hiera", "embed_dim": 16, "depths": [1] * 4, "num_heads": [1] * 4, "image_size": [64, 64]}
    source = encoder(config, ["encoder.stages.1"])
    read = source.read(source.collate([{**item, "mask": np.zeros((40, 40), int)} for item in pictures()]))
    assert set(read["row"].tolist()) == {-1}  # it reads patches window by window
    assert "label.mask" not in read
    with pytest.raises(MmsaeError, match="'untrained' mixes up its patches at random; read it with Timm"):
        encoder({"model_type": "vit_mae", **SMALL}, ["layers.0"]).model  # noqa: B018


def saved(folder, config, processor):
    config = transformers.AutoConfig.for_model(**config)
    kind = transformers.AutoModelForMaskGeneration if config.model_type.startswith("sam") else transformers.AutoModel
    torch.manual_seed(0)
    model = kind.from_config(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def test_a_folder_is_read_with_its_own_preprocessing(tmp_path):
    size, mean = {"height": 32, "width": 32}, [0.1, 0.2, 0.3]
    processor = transformers.ViTImageProcessor(size=size, image_mean=mean, image_std=[0.5, 0.6, 0.7])
    model = saved(tmp_path, {"model_type": "dinov2", **SMALL}, processor).eval()
    source = VisionEncoder(tmp_path, ["encoder.layer.0", "encoder.layer.1"], device="cpu")
    items = pictures()
    batch = source.collate(items)
    pixels = processor(images=[item["image"] for item in items], return_tensors="pt")["pixel_values"]
    assert_close(batch["input"], pixels)
    with torch.no_grad():
        hidden = model(pixels, output_hidden_states=True).hidden_states
    acts = source.read(batch)["acts"]
    assert_close(acts["encoder.layer.0"].view(2, 17, 24), hidden[1])
    assert_close(acts["encoder.layer.1"].view(2, 17, 24), hidden[2])
    array = {"array": np.full((3, 20, 20), 0.4, np.float32), "sample_id": 0}
    expected = torch.tensor([(0.4 - m) / s for m, s in zip(mean, [0.5, 0.6, 0.7], strict=True)])
    assert_close(source.collate([array])["input"][0, :, 3, 4], expected)
    assert json.loads(json.dumps(source.identity)) == source.identity


def test_sam2_of_a_folder(tmp_path):
    size = {"height": 128, "width": 128}
    model = saved(tmp_path, SAM2, transformers.Sam2ImageProcessor(size=size)).eval()
    source = VisionEncoder(tmp_path, ["backbone.blocks.3"], device="cpu")
    assert type(source.model).__name__ == "Sam2VisionModel"
    assert_close(source.model.state_dict(), model.vision_encoder.state_dict())
    batch = source.collate(pictures())
    assert batch["input"].shape == (2, 3, 128, 128)
    assert source.read(batch)["acts"]["backbone.blocks.3"].shape == (2 * 64, 96)


def test_masks_follow_the_preprocessing_of_the_folder(tmp_path):
    size = {"height": 128, "width": 128}
    saved(tmp_path, SAM2, transformers.Sam2ImageProcessor(size=size))
    source = VisionEncoder(tmp_path, ["backbone.blocks.3"], device="cpu")
    mask = np.zeros((40, 40), int)
    mask[20:] = 3
    read = source.read(source.collate([{**item, "mask": mask} for item in pictures()]))
    assert read["label.mask"].view(2, 8, 8)[1].tolist() == [[0] * 8] * 4 + [[3] * 8] * 4


def test_other_sizes_and_channels():
    source = encoder({"model_type": "dinov2", **SMALL}, ["encoder.layer.0"], image_size=64)
    assert len(source.read(source.collate(pictures(1)))["row"]) == 65
    source = encoder({"model_type": "vit", **SMALL}, ["layers.0"], image_size=64)
    assert len(source.read(source.collate(pictures(1)))["row"]) == 65
    four = {"model_type": "vit", **SMALL, "num_channels": 4}
    source = encoder(four, ["layers.0"], mean=[0.5] * 4, std=[0.5] * 4)
    assert source.spec.streams == {"layers.0": 24}
    with pytest.raises(MmsaeError, match="'untrained' reads 4 channels but mean has 3 numbers; give mean and std"):
        encoder(four, ["layers.0"]).spec  # noqa: B018
    with pytest.raises(MmsaeError, match="'untrained' cannot read pictures of 64 x 64 pixels"):
        encoder(SAM, ["layers.0"], image_size=64).spec  # noqa: B018


def test_a_classifier_has_a_downstream_measure():
    config = {"model_type": "vit", **SMALL, "num_labels": 3}
    source = encoder(config, ["vit.layers.0"], task="classification")
    batch = source.collate([{**item, "labels": {"class": 2}} for item in pictures()])
    with torch.no_grad():
        logits = source.model(batch["input"]).logits
    rows, output, _ = source.run(batch)
    assert rows["acts"]["vit.layers.0"].shape == (34, 24)
    assert_close(source.outcomes(output, batch)["cross_entropy"], -logits.log_softmax(1)[:, 2])
    assert source.read(batch, gradients=True)["grads"]["vit.layers.0"].abs().sum() > 0


def test_half_precision():
    source = encoder(SAM2, ["backbone.blocks.3"], dtype="bfloat16")
    assert source.read(source.collate(pictures()))["acts"]["backbone.blocks.3"].dtype == torch.bfloat16


def test_reading_costs_no_more_than_the_blocks_that_are_read():
    source = encoder(SAM2, ["backbone.blocks.4"])
    batch = source.collate(pictures(4))
    spent = {"bare": [], "read": []}
    for _ in range(5):
        for name, run in (("bare", lambda: source.model(batch["input"])), ("read", lambda: source.read(batch))):
            start = time.process_time()
            with torch.no_grad():
                run()
            spent[name].append(time.process_time() - start)
    assert min(spent["read"]) < 1.1 * min(spent["bare"])


def test_wrong_models_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "cut", {"model_type": "dinov2", **SMALL}, transformers.ViTImageProcessor())
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "cut" / "model.safetensors")
    lost = next(name for name in weights if "layer.1" in name)
    del weights[lost]
    save_file(weights, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    for make, said in (
        (lambda: VisionEncoder(tmp_path / "nowhere", ["a"]), r"there is no folder '.*nowhere' with a model"),
        (
            lambda: VisionEncoder(tmp_path / "empty", ["a"]),
            r"the folder '.*empty' holds no model that transformers can",
        ),
        (
            lambda: VisionEncoder(tmp_path / "cut", ["encoder.layer.0"]),
            r"the weights of '.*cut' lack 'encoder\.layer\.1\.[^']*'\.",
        ),
        (lambda: encoder({"model_type": "nothing"}, ["a"]), r"transformers cannot build \{'model_type': 'nothing'\}"),
        (lambda: encoder({"model_type": "vit", **SMALL}, ["layer.0"]), "ViTModel has no module that matches 'layer.0'"),
    ):
        with pytest.raises(MmsaeError, match=said):
            make().model  # noqa: B018
    with pytest.raises(MmsaeError, match="give mean and std together"):
        encoder({"model_type": "vit", **SMALL}, ["layers.0"], mean=[0.5] * 3)

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.sources import Timm, Torchvision

VIT = {"patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2}


def vit(hook_points=("blocks.*",), **kwargs):
    return Timm("vit_tiny_patch16_224", list(hook_points), image_size=32, config=VIT, device="cpu", **kwargs)


def pictures(n=2):
    noise = torch.randint(0, 255, (n, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [{"image": Image.fromarray(noise[i].numpy()), "text": "noise", "sample_id": i} for i in range(n)]


def test_vit_gives_what_timm_reports():
    source = vit()
    batch = source.collate(pictures())
    read = source.read(batch)
    with torch.no_grad():
        told = source.model.forward_intermediates(
            batch["input"],
            indices=[1],
            intermediates_only=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
            norm=False,
        )
    patches, prefix = told[0]
    acts = read["acts"]["blocks.1"].view(2, 17, 24)
    assert_close(acts[:, 1:], patches)
    assert_close(acts[:, :1], prefix)
    assert read["kind"].view(2, 17)[0].tolist() == [1] + [0] * 16
    assert read["row"].view(2, 17)[1].tolist() == [-1] + [i // 4 for i in range(16)]
    assert read["column"].view(2, 17)[1].tolist() == [-1] + [i % 4 for i in range(16)]
    assert source.spec.streams == {f"blocks.{i}": 24 for i in range(3)}


def test_the_patch_that_is_changed_is_the_one_at_that_row_and_column():
    source = vit(["patch_embed"])
    batch = source.collate(pictures(1))
    before = source.read(batch)
    batch["input"][0, :, 16:24, 8:16] += 1  # row 2, column 1
    changed = (source.read(batch)["acts"]["patch_embed"] - before["acts"]["patch_embed"]).abs().amax(1) > 1e-6
    assert before["row"][changed].tolist() == [2]
    assert before["column"][changed].tolist() == [1]
    assert before["kind"].unique().tolist() == [0]  # there is no class token yet


@pytest.mark.parametrize("model", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_registers_are_told_from_class_token_and_patches(model):
    config = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
    source = Timm(model, ["blocks.0"], image_size=32, config=config, device="cpu")
    read = source.read(source.collate(pictures()))
    assert read["kind"].view(2, 21)[0].tolist() == [1, 3, 3, 3, 3] + [0] * 16
    patches = Timm(model, ["blocks.0"], image_size=32, config=config, positions="patches", device="cpu")
    only = patches.read(patches.collate(pictures()))
    assert_close(only["acts"]["blocks.0"], read["acts"]["blocks.0"][read["kind"] == 0])
    assert only["position"].view(2, 16)[0].tolist() == list(range(5, 21))


def test_maps_of_a_resnet_become_positions():
    source = Timm("resnet10t", ["layer3"], image_size=64, device="cpu")
    batch = source.collate(pictures())
    read = source.read(batch)
    with torch.no_grad():
        maps = source.model.forward_intermediates(batch["input"], intermediates_only=True)[3]
    assert maps.shape == (2, 256, 4, 4)
    row = (read["sample_id"] == 1) & (read["row"] == 2) & (read["column"] == 3)
    assert_close(read["acts"]["layer3"][row][0], maps[1, :, 2, 3])


def test_maps_of_swin_have_their_channels_last():
    config = {"depths": (1, 1), "window_size": 2, "embed_dim": 12, "num_heads": (1, 1)}
    source = Timm("swin_tiny_patch4_window7_224", ["layers.1"], image_size=32, config=config, device="cpu")
    batch = source.collate(pictures())
    read = source.read(batch)
    with torch.no_grad():
        maps = source.model.forward_intermediates(batch["input"], intermediates_only=True, output_fmt="NCHW")[1]
    assert maps.shape == (2, 24, 4, 4)
    row = (read["sample_id"] == 1) & (read["row"] == 2) & (read["column"] == 3)
    assert_close(read["acts"]["layers.1"][row][0], maps[1, :, 2, 3])


def test_torchvision_resnet():
    source = Torchvision("resnet18", ["layer2", "layer2.1.relu"], image_size=64, task="classification", device="cpu")
    data = [{**item, "labels": {"class": 3}} for item in pictures()]
    batch = source.collate(data)
    read = source.read(batch)
    model = source.model
    with torch.no_grad():
        maps = model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(batch["input"]))))))
        output = model(batch["input"])
    assert_close(read["acts"]["layer2"].view(2, 8, 8, 128), maps.permute(0, 2, 3, 1))
    assert_close(source.outcomes(output, batch)["cross_entropy"], -output.log_softmax(1)[:, 3])
    assert source.render(data[0])["text"] == "noise"


def test_unread_layers_do_not_run():
    source = vit(["blocks.0"])
    batch = source.collate(pictures())
    with pytest.raises(MmsaeError, match="did not run"), capture(source.model, ["blocks.2"]):
        source.read(batch)


def test_local_weights_are_loaded(tmp_path):
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, **VIT)
    save_file(other.state_dict(), tmp_path / "vit.safetensors")
    source = Timm(
        "vit_tiny_patch16_224",
        ["blocks.0"],
        checkpoint=tmp_path / "vit.safetensors",
        config={**VIT, "img_size": 32},
        device="cpu",
    )
    assert_close(source.model.state_dict(), other.state_dict())
    other = torchvision.models.get_model("resnet18", weights=None)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "resnet.pth")
    source = Torchvision("resnet18", ["layer1"], checkpoint=tmp_path / "resnet.pth", device="cpu")
    assert_close(source.model.state_dict(), other.state_dict(), check_device=False)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    for kind, name in ((Timm, "resnet10t"), (Torchvision, "resnet18")):
        with pytest.raises(MmsaeError, match="evil"):
            kind(name, ["layer1"], checkpoint=tmp_path / "evil.pth").model  # noqa: B018
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda p: Timm("vit_tny_patch16_224", ["blocks.0"]),
            "timm has no model 'vit_tny_patch16_224'; nearest: vit_tiny",
        ),
        (lambda p: Timm("resnet10t", ["layer9"]), "ResNet has no module that matches 'layer9'; nearest: layer"),
        (lambda p: Timm("resnet10t", ["layer1"], checkpoint=p / "no.pth"), "there is no weight file"),
        (lambda p: Timm("resnet10t", ["layer1"], checkpoint=wrong(p)), "does not fit the timm model 'resnet10t'"),
        (lambda p: Timm("vit_tiny_patch16_224", ["blocks.0"], config={"deth": 2}), "cannot build .* with config"),
        (lambda p: Timm("resnet10t", ["layer1"], pretrained=True), "cannot fetch the timm model .* checkpoint="),
        (lambda p: Torchvision("resnet19", ["layer1"]), "torchvision has no model 'resnet19'; nearest: resnet1"),
        (
            lambda p: Torchvision("resnet18", ["layer1"], weights="BEST"),
            "no weights 'BEST' for resnet18; it has IMAGENET1K_V1",
        ),
        (
            lambda p: Torchvision("resnet18", ["layer1"], checkpoint=wrong(p)),
            "weights of another model than ResNet: it lacks",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(make, said, tmp_path):
    with pytest.raises(MmsaeError, match=said):
        make(tmp_path).model  # noqa: B018


def wrong(folder):
    save_file({"weight": torch.zeros(2)}, folder / "wrong.safetensors")
    return folder / "wrong.safetensors"


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    source = vit()
    good = tmp_path / "good.png"
    pictures(1)[0]["image"].save(good)
    assert source.collate([{"image": str(good), "sample_id": 0}])["input"].shape == (1, 3, 32, 32)
    (tmp_path / "truncated.png").write_bytes(good.read_bytes()[:400])
    (tmp_path / "words.jpg").write_text("not a picture")
    for name, said in (
        ("truncated.png", "cannot be read"),
        ("words.jpg", "cannot be read"),
        ("none.png", "no picture"),
    ):
        with pytest.raises(MmsaeError, match=said) as error:
            source.collate([{"image": tmp_path / name, "sample_id": 0}])
        assert name in str(error.value)
    with pytest.raises(MmsaeError, match="its 'image' is NoneType"):
        source.collate([{"sample_id": 7}])

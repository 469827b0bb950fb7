import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from mmsae.errors import MmsaeError
from mmsae.sources import Timm, Torchvision
from mmsae.sources.masks import majority, mask_of, origins

PIPELINES = {
    "resize": T.Compose([T.Resize((24, 24)), T.ToTensor(), T.Normalize(0.5, 0.2)]),
    "crop": T.Compose([T.Resize(32), T.CenterCrop(24), T.ToTensor()]),
    "flip": T.Compose([T.Resize((24, 24)), T.RandomHorizontalFlip(1.0), T.ToTensor()]),
    "gray": T.Compose([T.Grayscale(), T.Resize((24, 24)), T.ToTensor()]),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_mask_goes_where_its_picture_goes(name):
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 2, (5, 7)), np.ones((12, 12), int)).astype(np.uint8)
    shown = PIPELINES[name](Image.fromarray(mask * 255).convert("RGB"))[0]  # the mask itself as the picture
    found = torch.from_numpy(mask).flatten()[origins(PIPELINES[name], (84, 60))]
    levels = shown.min(), shown.max()
    sharp = (shown - levels[0] < 0.05) | (levels[1] - shown < 0.05)  # not on an edge
    assert sharp.float().mean() > 0.3
    agree = (found == (shown > (levels[0] + levels[1]) / 2).long())[sharp]
    assert agree.float().mean() > 0.97


def test_what_was_filled_in_comes_from_nowhere():
    padded = T.Compose([T.Pad((8, 0)), T.Resize((16, 32)), T.ToTensor()])
    found = origins(padded, (16, 16))
    assert (found[:, :7] == -1).all()
    assert (found[:, 9:23] >= 0).all()


def test_the_most_frequent_value_wins():
    mask = torch.tensor([[[0, 0, 1, 2], [0, 1, 2, 2], [-1, -1, 4, -1], [-1, -1, -1, -1]]])
    assert majority(mask, 2, 2).tolist() == [[0, 2, -1, 4]]
    assert majority(torch.full((1, 4, 4), -1), 2, 2).tolist() == [[-1] * 4]
    assert majority(mask, 4, 4).tolist() == [mask.flatten().tolist()]


def test_values_have_names_or_are_void():
    item = {"mask": np.array([[0, 255], [1, 1]], np.uint8), "mask_names": ["sky", "dog"], "sample_id": 2}
    assert mask_of(item, (2, 2)).tolist() == [[0, -1], [1, 1]]
    with pytest.raises(MmsaeError, match="the mask of item 2 has the value 1, but mask_names has 1 names"):
        mask_of({**item, "mask_names": ["sky"]}, (2, 2))
    with pytest.raises(MmsaeError, match="the mask of item 2 has 2x2 pixels but its picture 3x2"):
        mask_of(item, (3, 2))
    with pytest.raises(MmsaeError, match=r"has shape \(2, 2, 3\)"):
        mask_of({**item, "mask": np.zeros((2, 2, 3), np.uint8)}, (2, 2))
    with pytest.raises(MmsaeError, match=r"there is no mask 'none.png' \(item 2\)"):
        mask_of({**item, "mask": "none.png"}, (2, 2))


@pytest.mark.parametrize(
    ("source", "grid"),
    [
        (lambda: Timm("vit_tiny_patch16_224", ["blocks.0"], config={"depth": 1}, device="cpu"), 14),
        (lambda: Torchvision("resnet18", ["layer4"], image_size=64, device="cpu"), 2),
    ],
    ids=["tokens", "maps"],
)
def test_patches_and_positions_of_maps_are_labelled(source, grid):
    one = source()
    mask = np.zeros((256, 256), np.uint8)
    mask[:, 128:] = 1
    pictures = [{"image": Image.new("RGB", (256, 256)), "mask": mask, "sample_id": 0}]
    read = one.read(one.collate(pictures))
    placed = read["row"] >= 0
    assert torch.equal(read["label.mask"][placed], (read["column"][placed] >= grid // 2).long())
    assert (read["label.mask"][~placed] == -1).all()
    shown = one.render({**pictures[0], "mask_names": ["left", "right"]})
    assert shown["labels"] == {0: "left", 1: "right"}
    assert shown["mask"].size == shown["image"].size

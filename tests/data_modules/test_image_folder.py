import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import identity_model

from datamodules import ImageFolder
from datamodules.splits import cut
from mmsae.errors import MmsaeError
from mmsae.sources import Custom, Timm


def draw(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def folder(root, **arguments):
    source = Custom(identity_model, ["0"], input_shape=[3, 8, 8], device="cpu")
    return ImageFolder(str(root), source=source, **arguments)


def names(data, split):
    return [Path(data.items(split)[i]["image"]).stem for i in range(len(data.items(split)))]


def test_own_splits_are_kept(tmp_path):
    for split, n in (("train", 4), ("val", 2), ("test", 3)):
        for i in range(n):
            draw(tmp_path / split / ("cat" if i % 2 else "dog") / f"{split}{i}.png")
    draw(tmp_path / "elsewhere" / "cat" / "left_out.png")
    data = folder(tmp_path)
    assert sorted(names(data, "train")) == [f"train{i}" for i in range(4)]
    assert sorted(names(data, "test")) == [f"test{i}" for i in range(3)]
    assert data.factors == {"class": ("cat", "dog")}
    for i in range(4):
        item = data.items("train")[i]
        assert ("cat", "dog")[item["labels"]["class"]] in item["image"]


def test_the_names_of_the_splits_are_no_classes(tmp_path):
    for split in ("train", "val", "test"):
        draw(tmp_path / split / "a.png")
    data = folder(tmp_path)
    assert data.factors == {}
    assert data.items("val")[0]["labels"] == {}


def test_dealt_pictures_are_all_used_once(tmp_path):
    for i in range(30):
        draw(tmp_path / str(i % 3) / f"{i:02d}.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    data = folder(tmp_path, val_share=0.2, test_share=0.3)
    found = {split: names(data, split) for split in ("train", "val", "test")}
    assert {k: len(v) for k, v in found.items()} == {"train": 15, "val": 6, "test": 9}
    assert sorted(itertools.chain(*found.values())) == [f"{i:02d}" for i in range(30)]
    other = folder(tmp_path, val_share=0.2, test_share=0.3, split_seed=1)
    assert names(other, "train") != found["train"]


def test_one_folder_has_no_classes(tmp_path):
    for i in range(10):
        draw(tmp_path / f"{i}.png")
    assert folder(tmp_path).factors == {}


def test_folders_without_pictures_are_told_before_any_model_is_loaded(tmp_path):
    with pytest.raises(MmsaeError, match=r"data\.root=.*nowhere is no folder"):
        folder(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(MmsaeError, match=r"holds no pictures \(\.bmp, .*\.webp\)"):
        folder(tmp_path)


def test_an_unreadable_picture_is_named(tmp_path):
    for i in range(10):
        draw(tmp_path / f"{i}.png")
    data = folder(tmp_path)
    broken = data.items("val")[0]["image"]
    with open(broken, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(MmsaeError, match=r"the picture '.*\.png' cannot be read"):
        list(data.rows("val"))


@pytest.mark.parametrize("n", [3, 10, 101])
@pytest.mark.parametrize("shares", [(0.1, 0.1), (0, 0.2), (0.3, 0.3)])
def test_a_cut_is_a_partition(n, shares):
    parts = {split: cut(n, split, *shares, seed=4) for split in ("train", "val", "test")}
    assert sorted(itertools.chain(*parts.values())) == list(range(n))
    assert len(parts["val"]) == (max(round(shares[0] * n), 1) if shares[0] else 0)
    assert all(part == sorted(part) for part in parts.values())


def test_what_cannot_be_cut_is_told():
    with pytest.raises(MmsaeError, match=r"val_share=0\.6 and test_share=0\.6 leave nothing to train on"):
        cut(100, "train", 0.6, 0.6, 0)
    with pytest.raises(MmsaeError, match="2 examples cannot be cut into train, val and test"):
        cut(2, "train", 0.1, 0.1, 0)


def test_masks_are_found_by_name_and_become_labels_of_patches(tmp_path):
    pictures, masks = tmp_path / "pictures", tmp_path / "pictures" / "masks"
    for i in range(10):
        draw(pictures / "a" / f"{i}.jpg", 20 * i)
        (masks / "a").mkdir(parents=True, exist_ok=True)
        mask = np.zeros((8, 8), np.uint8)
        mask[:, 4:] = 1
        Image.fromarray(mask).save(masks / "a" / f"{i}.png")
    source = Timm("vit_tiny_patch16_224", ["blocks.0"], config={"depth": 1}, device="cpu")
    data = ImageFolder(str(pictures), masks=str(masks), mask_names=["left", "right"], source=source)
    assert sum(len(data.items(split)) for split in ("train", "val", "test")) == 10  # masks are no pictures
    assert data.factors == {"mask": ("left", "right")}
    (batch,) = data.rows("val")
    assert batch["label.mask"][1:].tolist() == ([0] * 7 + [1] * 7) * 14
    assert data.render(data.items("val")[0])["labels"] == {0: "left", 1: "right"}
    (masks / "a" / "3.png").unlink()
    with pytest.raises(MmsaeError, match=r"the picture '.*3.jpg' and 0 more have no mask in"):
        ImageFolder(str(pictures), masks=str(masks), source=source)
    with pytest.raises(MmsaeError, match=r"data\.masks=.*none is no folder"):
        ImageFolder(str(pictures), masks=str(tmp_path / "none"), source=source)
    with pytest.raises(MmsaeError, match="give the folder of the masks too"):
        ImageFolder(str(pictures), mask_names=["left"], source=source)

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from datamodules import ImageText
from datamodules.base import SPLITS
from mmsae.errors import MmsaeError
from mmsae.sources import SceneCLIP


def source():
    return SceneCLIP(["visual"], device="cpu")


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def pairs(first, n):
    for i in range(first, first + n):
        yield f"a/{i:04d}.png", png(i)
        text = f"picture number {i}"
        yield (
            (f"a/{i:04d}.txt", text.encode()) if i % 2 else (f"a/{i:04d}.json", json.dumps({"caption": text}).encode())
        )


def table(folder, n=20, captions=2):
    rows = []
    for i in range(n):
        (folder / f"{i}.png").write_bytes(png(i))
        rows += [
            json.dumps({"image": f"{i}.png", "caption": f"text {j} of {i}", "kind": "ab"[i % 2]})
            for j in range(captions)
        ]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return str(folder / "captions.jsonl")


def every(data, split):
    items = data.items(split)
    return [items[i] for i in range(len(items))]


def test_shards_are_split_by_key_and_never_change(tmp_path):
    shard(tmp_path / "0.tar", pairs(0, 60))
    shard(tmp_path / "1.tar", pairs(60, 60))
    data = ImageText(str(tmp_path), val_share=0.2, test_share=0.2, source=source())
    found = {split: every(data, split) for split in SPLITS}
    texts = {split: [item["text"] for item in items] for split, items in found.items()}
    assert sorted(text for said in texts.values() for text in said) == sorted(f"picture number {i}" for i in range(120))
    assert {s: 12 < len(texts[s]) < 40 for s in ("val", "test")} == {"val": True, "test": True}
    for item in found["test"]:  # the picture is that of the caption
        assert np.asarray(item["image"])[0, 0, 0] == int(item["text"].split()[-1])
    assert [item["sample_id"] for item in found["val"]] == list(range(len(found["val"])))
    (tmp_path / "0.tar").rename(tmp_path / "2.tar")  # another order, the same splits
    again = ImageText(str(tmp_path), val_share=0.2, test_share=0.2, source=source())
    assert {item["text"] for item in every(again, "test")} == set(texts["test"])
    other = ImageText(str(tmp_path), val_share=0.2, test_share=0.2, split_seed=1, source=source())
    assert {item["text"] for item in every(other, "test")} != set(texts["test"])


def test_captions_of_a_picture_stay_together(tmp_path):
    data = ImageText(table(tmp_path), labels=["kind"], val_share=0.2, test_share=0.2, source=source())
    pictures = {split: {item["image"] for item in every(data, split)} for split in SPLITS}
    assert {split: len(found) for split, found in pictures.items()} == {"train": 12, "val": 4, "test": 4}
    assert len(every(data, "train")) == 24
    assert not pictures["train"] & pictures["val"] | pictures["train"] & pictures["test"]
    item = every(data, "test")[0]
    assert item["labels"]["kind"] == int(item["image"].split("/")[-1].split(".")[0]) % 2
    assert item["text"].endswith(f"of {item['image'].split('/')[-1].split('.')[0]}")


def test_rows_of_pictures_go_through_the_model(tmp_path):
    path = shard(tmp_path / "0.tar", pairs(0, 30))
    data = ImageText(path, source=source(), examples_per_forward=4)
    rows = [batch["acts"]["visual"].shape for batch in data.rows("train")]
    assert sum(shape[0] for shape in rows) == len(data.items("train"))


def damaged():
    good = list(pairs(0, 4))
    yield "a picture without a caption", [("x.png", png(0))], "'x' in s.tar has a picture only"
    yield "a caption without a picture", [*good, ("y.txt", b"hi")], "'y' in s.tar has a caption only; 1 such keys"
    yield "nothing", [("x.bin", b"0")], r"holds no pictures \(.jpg"
    yield "an empty caption", [("x.png", png(0)), ("x.txt", b" ")], "a caption of s.tar .* is empty"
    yield "a picture that is none", [("x.png", b"0"), ("x.txt", b"hi")], "a picture of s.tar .* cannot be read"
    yield "a json that is none", [("x.png", png(0)), ("x.json", b"{")], "a .json of s.tar .* cannot be read"


@pytest.mark.parametrize(("members", "said"), [case[1:] for case in damaged()], ids=[case[0] for case in damaged()])
def test_damaged_shards_are_named(tmp_path, members, said):
    data = ImageText(shard(tmp_path / "s.tar", members), val_share=0, test_share=0, source=source())
    with pytest.raises(MmsaeError, match=said):
        every(data, "train")


def test_truncated_and_foreign_files_are_told(tmp_path):
    path = tmp_path / "s.tar"
    shard(path, pairs(0, 20))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(MmsaeError, match=r"the shard '.*s.tar' cannot be read \(unexpected end of data\)"):
        ImageText(str(path), source=source()).items("train")
    path.write_bytes(b"no tar")
    with pytest.raises(MmsaeError, match=r"the shard '.*s.tar' cannot be read"):
        ImageText(str(path), source=source()).items("train")
    with pytest.raises(MmsaeError, match=r"data\.path=.*none is no table \(.csv, .tsv, .jsonl\), no .tar file"):
        ImageText(str(tmp_path / "none"), source=source())


def test_missing_pictures_and_captions_are_named(tmp_path):
    (tmp_path / "c.csv").write_text("file,text\nnone.png,a\n")
    with pytest.raises(MmsaeError, match=r"c.csv names 'none.png' in line 2"):
        ImageText(str(tmp_path / "c.csv"), source=source())
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "c.csv").write_text("file,text\n" + "".join(f"{i}.png,\n" for i in range(3)))
    data = ImageText(str(tmp_path / "c.csv"), source=source())
    with pytest.raises(MmsaeError, match=r"the picture '.*png' has no caption in c.csv"):
        data.items("train")[0]
    with pytest.raises(MmsaeError, match="belong to a table"):
        ImageText(str(tmp_path), labels=["kind"], source=source())

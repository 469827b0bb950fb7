"""Every folder of real data, when at hand, in the form that it came in, through the datamodule that is meant for it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recordings import source as signal_source

from datamodules import E4Sessions, EDFRecordings, ScienceImages, SignalArrays, TextFiles, TorchvisionData, WFDBRecords
from mmsae.miniatures.ecgs import LEADS
from mmsae.sources import CausalLM, Signal, Timm

DATA = Path(os.environ.get("MMSAE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def needs(name):
    reason = f"no {name} beside the repository: set MMSAE_DATA to its folder"
    return pytest.mark.skipif(not (DATA / name).is_dir(), reason=reason)


def all_items(data):
    return [data.items(split)[i] for split in ("train", "val", "test") for i in range(len(data.items(split)))]


def vision(**more):
    return Timm("vit_tiny_patch16_224", ["blocks.0"], positions="patches", config={"depth": 1}, device="cpu", **more)


def words():
    return CausalLM("miniature:text", ["model.layers.0"], context_length=64, device="cpu")


@needs("tinyshakespeare")
def test_plays():
    data = TextFiles(str(DATA / "tinyshakespeare" / "input.txt"), source=words())
    items = [data.items("test")[i] for i in range(8)]
    assert data.n_documents > 5000
    batch = data.source.read(data.source.collate(items))
    assert set(batch["sample_id"].tolist()) == {item["sample_id"] for item in items}


@needs("udhr")
def test_many_languages_go_through_the_tokenizer_and_back():
    pytest.importorskip("datasets")
    data = TextFiles(str(DATA / "udhr" / "udhr_24_languages.parquet"), source=words())
    assert data.n_documents == 1424
    shown = 0
    for i in range(0, len(data.items("train")), 25):
        item = data.items("train")[i]
        tokens = data.source.render(item)["tokens"]
        text = "".join(tokens[1:])
        assert item["text"].startswith(text.rstrip("\ufffd")), text
        shown += any(ord(character) > 0x2000 for character in text)
    assert shown > 3  # of scripts beyond the Latin one


@needs("text_labelled")
@pytest.mark.parametrize(
    ("file", "key", "n"),
    [
        ("toxicity_1000.parquet", "text", 1000),
        ("goemotions_10k.parquet", "text", 10_000),
        ("clinc150_small.parquet", "text", 16_200),
        ("subject_verb_agreement.parquet", "clean_prefix", 3000),
        ("prontoqa_500.jsonl", "context", 500),
    ],
)
def test_labelled_texts(file, key, n):
    pytest.importorskip("datasets")
    data = TextFiles(str(DATA / "text_labelled" / file), text_key=key, source=words())
    assert data.n_documents == n
    assert data.source.collate([data.items("train")[0]])["input_ids"].shape[1] > 3


@needs("mnist")
def test_digits_as_torchvision_has_them(tmp_path):
    """The arrays, written back into MNIST's own files."""
    held = np.load(DATA / "mnist" / "mnist_12k.npz")
    root = tmp_path / "MNIST" / "raw"
    root.mkdir(parents=True)
    for part, name in (("train", "train"), ("t10k", "test")):
        images, labels = held[f"{name}_images"][::40], held[f"{name}_labels"][::40]
        head = np.array([2051, len(images), 28, 28], ">i4").tobytes()
        (root / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (root / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([2049, len(labels)], ">i4").tobytes() + labels.tobytes()
        )
    data = TorchvisionData("MNIST", str(tmp_path), source=vision())
    items = [data.items("test")[i] for i in range(len(data.items("test")))]
    assert len(items) == 50
    for i, item in enumerate(items):
        assert (np.asarray(item["image"]) == held["test_images"][40 * i]).all()
        assert data.factors["class"][item["labels"]["class"]].startswith(str(held["test_labels"][40 * i]))


@needs("fashion_mnist_sprite")
def test_garments_as_arrays_with_their_names(tmp_path):
    held = np.load(DATA / "fashion_mnist_sprite" / "fashion_900.npz")
    names = [str(name) for name in held["class_names"]]
    rows = [f"fashion_900.npz,{i},{names[label]},{'test' if late else 'train'}" for i, (label, late) in
            enumerate(zip(held["labels"], held["is_test"], strict=True))]  # fmt: skip
    table = tmp_path / "garments.csv"
    table.write_text("file,plane,class,split\n" + "\n".join(rows) + "\n")
    data = ScienceImages(
        str(DATA / "fashion_mnist_sprite"), channels=[0, 0, 0], array="images", table=str(table), labels=["class"],
        plane_column="plane", split_column="split", stretch="type", source=vision(),
    )  # fmt: skip
    assert len(data.items("test")) == 180
    item = data.items("test")[7]
    assert item["array"].shape == (3, 28, 28)
    i = int(np.flatnonzero(held["is_test"])[7])
    np.testing.assert_allclose(item["array"][0], held["images"][i] / 255, atol=1e-6)
    assert data.factors["class"][item["labels"]["class"]] == names[held["labels"][i]]


@needs("pneumonia_mnist")
def test_chest_x_rays_are_a_stack_of_pictures(tmp_path):
    held = np.load(DATA / "pneumonia_mnist" / "pneumoniamnist_cut.npz")
    np.save(tmp_path / "xrays.npy", held["test_images"][:40])
    data = ScienceImages(str(tmp_path), channels=[0, 0, 0], stretch="type", axes="ZYX", source=vision())
    assert len(all_items(data)) == 40
    assert data.source.spec.d_in == 192


@needs("mouse_parts")
def test_frames_of_a_mouse(tmp_path):
    held = np.load(DATA / "mouse_parts" / "openfield_mouse_parts.npz")
    for i in range(12):
        Image.fromarray(held["images"][i]).save(tmp_path / f"{i:03d}.png")
        mask = np.zeros(held["images"][i].shape, np.uint8)
        x, y = held["keypoints_xy"][i, 0].round().astype(int)
        mask[max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8] = 1
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i:03d}.png")
    data = ScienceImages(
        str(tmp_path), channels=[0, 0, 0], stretch="type", masks=str(tmp_path / "masks"),
        mask_values={"0": "background", "1": "snout"}, source=vision(),
    )  # fmt: skip
    rows = [batch for split in ("train", "val", "test") for batch in data.rows(split)]
    share = torch.cat([batch["label.mask"] for batch in rows]).float().mean()
    assert 0.002 < share < 0.05  # 256 of 19200 pixels are .013


@needs("tree_crowns")
def test_a_geotiff_of_trees_knows_its_pixel_size():
    pytest.importorskip("rasterio")
    data = ScienceImages(
        str(DATA / "tree_crowns"),
        channels=[0, 1, 2],
        stretch="type",
        tile=200,
        val_share=0,
        test_share=0.5,
        source=vision(),
    )
    items = [data.items(split)[i] for split in ("train", "test") for i in range(len(data.items(split)))]
    sizes = {round(float(item["pixel_size"]), 3) for item in items if np.isfinite(item["pixel_size"])}
    assert sizes == {0.1}  # metres, of the GeoTIFF; the PNG does not say
    assert sum(np.isfinite(item["pixel_size"]) for item in items) == 4
    assert {(item["tile_row"], item["tile_column"]) for item in items} == {(0, 0), (0, 200), (200, 0), (200, 200)}


@needs("connectivity_human")
def test_volumes_are_slices():
    nibabel = pytest.importorskip("nibabel")
    file = DATA / "connectivity_human" / "fmri1.nii.gz"
    volume = nibabel.load(file)  # 10 x 10 x 18, 40 times
    up = next(axis for axis, code in enumerate(nibabel.aff2axcodes(volume.affine)) if code in "SI")
    data = ScienceImages(str(file), channels=[0, 0, 0], val_share=0, test_share=0, every=36, source=vision())
    items = [data.items("train")[i] for i in range(len(data.items("train")))]
    assert len(items) == -(-volume.shape[up] * 40 // 36)
    sides = sorted(n for axis, n in enumerate(volume.shape[:3]) if axis != up)
    assert all(sorted(item["array"].shape[1:]) == sides for item in items)


@needs("ecg_mitbih")
def test_beats_of_two_leads():
    pytest.importorskip("wfdb")
    data = WFDBRecords(str(DATA / "ecg_mitbih"), window_s=10, rate=100, source=signal_source(2), split_by="recording")
    items = all_items(data)
    assert len({item["recording"] for item in items}) == 3
    assert {"normal", "ventricular"} <= set(data.factors["event"])


@needs("ecg_12lead_cinc2021")
def test_twelve_leads_of_three_hospitals_reach_the_miniature():
    pytest.importorskip("wfdb")
    source = Signal("miniature:ecg_jepa", ["norm"], drop_special=True, device="cpu")
    data = WFDBRecords(str(DATA / "ecg_12lead_cinc2021"), window_s=5, rate=100, source=source)
    items = all_items(data)
    assert len({item["recording"] for item in items}) == 24
    batch = source.read(source.collate(items[:4]))
    assert len(batch["sample_id"]) == 4 * 50
    assert batch["start_s"].unique().numpy() == pytest.approx(np.arange(50) / 10)


@needs("ecg_ptbxl_wpw")
def test_arrays_of_ecgs():
    source = Signal("miniature:ecg_jepa", ["norm"], device="cpu")
    data = SignalArrays(
        str(DATA / "ecg_ptbxl_wpw" / "ptbxl_wpw_100hz.npz"), 100, "signals_uV", labels=["wpw"], subject="ptbxl_id",
        names="leads", unit="mV", scale=0.001, window_s=5, source=source,
    )  # fmt: skip
    item = data.items("test")[0]
    one, two, three = (item["signal"][list(LEADS).index(name)] for name in ("I", "II", "III"))
    assert float((two - one - three).abs().max()) <= 0.0011
    assert data.factors["wpw"] == ("0", "1")


@needs("eeg_motor_imagery")
def test_recordings_of_a_brain():
    pytest.importorskip("mne")
    data = EDFRecordings(
        str(DATA / "eeg_motor_imagery"), windows="events", window_s=4, split_by="time", source=signal_source(64)
    )
    assert set(data.factors["class"]) == {"T0", "T1", "T2"}
    item = data.items("train")[0]
    assert item["signal"].shape == (64, 640)
    assert item["rate"] == 160


@needs("e4_stress")
def test_a_session_of_a_wristband():
    source = Signal("miniature:e4", ["norm"], device="cpu")
    data = E4Sessions(str(DATA / "e4_stress"), "labels_1hz.csv", "Time(sec)", "Label", split_by="time", source=source)
    batch = source.read(source.collate([data.items("train")[i] for i in range(2)]))
    assert len(batch["sample_id"]) == 2 * 6 * 32
    assert batch["channel"].unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert set(data.factors["event"]) == {"0", "1"}


@needs("clip_text_imagenet")
def test_vectors_without_a_model_become_a_store(tmp_path):
    from mmsae.spec import ACTS
    from mmsae.store import Store, Writer

    rows = torch.from_numpy(np.load(DATA / "clip_text_imagenet" / "imagenet_text_embeddings_1000x512.npy"))
    writer = Writer(tmp_path / "train", {}, "float32")
    writer.resume()
    writer.add({ACTS: {"clip": rows}, "sample_id": torch.arange(len(rows))})
    writer.close()
    writer.finish({"class": "vectors"}, {"class": "imagenet"}, {})
    store = Store(tmp_path / "train")
    assert store.spec.streams == {"clip": 512}

import csv
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import identity_model
from torch.testing import assert_close

from datamodules import ImageFolder, ScienceImages
from datamodules.base import SPLITS
from datamodules.raster_files import Arrays, Dicom, Nifti, Picture
from datamodules.tiff_files import GeoTiff, Tiff
from mmsae.errors import MmsaeError
from mmsae.sources import Custom, Timm

DATA = Path(os.environ.get("MMSAE_DATA", Path(__file__).parents[3] / "shared" / "data"))
RNG = np.random.default_rng


def source():
    return Custom(identity_model, ["0"], input_shape=[3, 8, 8], device="cpu")


def data(root, **arguments):
    return ScienceImages(str(root), source=source(), **{"val_share": 0, "test_share": 0, **arguments})


def window(reader, plane, top=0, left=0, height=None, width=None):
    rows = slice(top, top + (height or plane.height))
    return reader.read(plane, rows, slice(left, left + (width or plane.width)))


def numbers(*shape, seed=0, dtype=np.uint16):
    return RNG(seed).integers(0, 60000 if dtype == np.uint16 else 250, shape).astype(dtype)


# ---- formats: windows of what their own libraries wrote


TIFFS = {
    "plain": ({}, (50, 70), "YX"),
    "strips": ({"compression": "zlib", "rowsperstrip": 7}, (50, 70), "YX"),
    "tiles": ({"compression": "zlib", "tile": (16, 32)}, (50, 70), "YX"),
    "colours": ({"compression": "zlib", "tile": (16, 16), "photometric": "rgb"}, (50, 70, 3), "YXS"),
    "planar": ({"compression": "zlib", "tile": (16, 16), "photometric": "rgb", "planarconfig": "separate"},
               (3, 50, 70), "SYX"),
    "pages": ({"compression": "zlib", "metadata": None, "rowsperstrip": 9}, (4, 50, 70), "NYX"),
    "pages at once": ({}, (4, 50, 70), "NYX"),
    "big endian": ({"byteorder": ">", "compression": "zlib", "tile": (16, 16)}, (50, 70), "YX"),
}  # fmt: skip


@pytest.mark.parametrize("name", TIFFS)
def test_windows_of_tiff(name, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    options, shape, axes = TIFFS[name]
    values = numbers(*shape)
    photometric = {} if "photometric" in options else {"photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "a.tif", values, **photometric, **options)
    planes = Tiff().planes(str(tmp_path / "a.tif"))
    if axes == "YXS":
        values = values.transpose(2, 0, 1)
    expected = values[:, None] if axes == "NYX" else values.reshape(1, -1, 50, 70)  # [planes, C, Y, X]
    assert len(planes) == len(expected)
    for plane, of in zip(planes, expected, strict=True):
        assert (plane.height, plane.width, len(plane.channels)) == (50, 70, len(of))
        assert plane.largest == 65535
        for top, left, height, width in ((0, 0, 50, 70), (13, 30, 20, 33), (49, 69, 1, 1)):
            cut = window(Tiff(), plane, top, left, height, width)
            assert np.array_equal(cut, of[:, top : top + height, left : left + width])


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_ome_tiff_has_channels_and_pixel_size(compression, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = numbers(3, 2, 4, 40, 30)  # T C Z Y X
    about = {"axes": "TCZYX", "Channel": {"Name": ["DAPI", "GFP"]}, "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"}
    options = {"compression": compression, "tile": (16, 16)} if compression else {}
    tifffile.imwrite(tmp_path / "a.ome.tif", values, metadata=about, photometric="minisblack", **options)
    planes = Tiff().planes(str(tmp_path / "a.ome.tif"))
    assert len(planes) == 12
    assert planes[0].channels == ("DAPI", "GFP")
    assert planes[0].pixel_size == pytest.approx(0.25e-6)
    assert np.array_equal(window(Tiff(), planes[6], 5, 3, 20, 11), values[1, :, 2, 5:25, 3:14])


def test_imagej_tiff(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = numbers(3, 2, 20, 30)  # Z C Y X
    about = {"axes": "ZCYX", "unit": "um"}
    tifffile.imwrite(tmp_path / "a.tif", values, imagej=True, resolution=(4, 4), metadata=about)
    planes = Tiff().planes(str(tmp_path / "a.tif"))
    assert len(planes) == 3
    assert planes[0].pixel_size == pytest.approx(0.25e-6)
    assert np.array_equal(window(Tiff(), planes[2], 4, 4, 6, 7), values[2, :, 4:10, 4:11])


def test_axes_that_a_file_does_not_name(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = numbers(5, 20, 30)
    tifffile.imwrite(tmp_path / "a.tif", values, metadata=None, photometric="minisblack", compression="zlib")
    assert len(Tiff().planes(str(tmp_path / "a.tif"))) == 5
    (plane,) = Tiff("CYX").planes(str(tmp_path / "a.tif"))
    assert np.array_equal(window(Tiff("CYX"), plane, 3, 4, 5, 6), values[:, 3:8, 4:10])
    np.save(tmp_path / "a.npy", values)
    (plane,) = Arrays("CYX").planes(str(tmp_path / "a.npy"))
    assert np.array_equal(window(Arrays("CYX"), plane, 3, 4, 5, 6), values[:, 3:8, 4:10])
    with pytest.raises(MmsaeError, match=r"a\.npy' holds an array of shape \(5, 20, 30\), which axes='YX' does not"):
        Arrays("YX").planes(str(tmp_path / "a.npy"))


def geotiff(path, values, nodata=None, crs="EPSG:32617"):
    rasterio = pytest.importorskip("rasterio")
    shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    place = {"crs": crs, "transform": rasterio.transform.from_origin(400000, 3285000, 0.5, 0.5)}
    with rasterio.open(path, "w", driver="GTiff", compress="lzw", nodata=nodata, **shape, **place) as file:
        file.write(values)
        file.descriptions = [f"B{i + 2}" for i in range(len(values))]


def test_geotiff_keeps_its_place_on_earth(tmp_path):
    pytest.importorskip("tifffile")
    values = numbers(4, 30, 40)
    values[:, :2, :3] = 0  # without data
    values[1, 10, 10] = 0  # a value like any other
    geotiff(tmp_path / "a.tif", values, nodata=0)
    (plane,) = Tiff().planes(str(tmp_path / "a.tif"))
    assert plane.channels == ("B2", "B3", "B4", "B5")
    assert plane.pixel_size == 0.5
    assert plane.about["crs"] == "EPSG:32617"
    assert plane.about["affine"].startswith("0.5 0.0 400000.0")
    read = window(Tiff(), plane, 0, 0, 20, 20)
    assert np.isnan(read[:, :2, :3]).all()
    assert np.isnan(read).sum() == 4 * 6
    assert np.array_equal(read[:, 2:], values[:, 2:20, :20])
    item = data(tmp_path / "a.tif", channels=["B4", "B3", "B2"], tile=20).items("train")[0]
    assert item["channels"] == ("B4", "B3", "B2")
    assert item["crs"] == "EPSG:32617"
    assert (item["array"][:, :2, :3] == 0).all()
    geotiff(tmp_path / "b.tif", values, crs="EPSG:4326")  # degrees are no metres
    assert np.isnan(GeoTiff().planes(str(tmp_path / "b.tif"))[0].pixel_size)


def dicom(path, values, patient="p1", **tags):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.PatientID, file.Modality, file.SeriesInstanceUID = patient, "CT", generate_uid(entropy_srcs=[str(path)])
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.PhotometricInterpretation = tags.pop("kind", "MONOCHROME2")
    if values is not None:
        file.Rows, file.Columns = values.shape[-2:]
        file.NumberOfFrames = len(values) if values.ndim == 3 else 1
        file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit = 1, 16, 16, 15
        file.PixelRepresentation, file.PixelSpacing = 0, [0.8, 0.7]
        file.PixelData = values.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)


def test_dicom_is_in_hounsfield_units(tmp_path):
    values = numbers(20, 30) // 30
    window_of = {"WindowCenter": 40, "WindowWidth": 80}
    dicom(tmp_path / "a.dcm", values, RescaleSlope=2, RescaleIntercept=-1024, **window_of)
    (plane,) = Dicom().planes(str(tmp_path / "a.dcm"))
    assert (plane.subject, plane.pixel_size, plane.window) == ("p1", pytest.approx(0.7e-3), (0, 80))
    hounsfield = values.astype(float) * 2 - 1024
    assert np.array_equal(window(Dicom(), plane, 2, 3, 9, 8)[0], hounsfield[2:11, 3:11])
    shown = data(tmp_path, stretch="window").items("train")[0]["array"][0]
    assert_close(shown, np.clip(hounsfield / 80, 0, 1).astype(np.float32))
    assert_close(data(tmp_path, limits=[[0, 80]]).items("train")[0]["array"][0], shown)


def test_monochrome1_is_inverted(tmp_path):
    values = numbers(20, 30)
    dicom(tmp_path / "a.dcm", values)
    dicom(tmp_path / "b.dcm", values, kind="MONOCHROME1")
    items = data(tmp_path).items("train")
    assert_close(items[0]["array"], 1 - items[1]["array"])


def test_frames_and_numbered_files_without_an_ending(tmp_path):
    values = numbers(4, 20, 30)
    dicom(tmp_path / "IM_0001", values)
    (tmp_path / "LICENSE").write_text("no picture")
    found = data(tmp_path, every=2)
    items = found.items("train")
    assert [items[i]["plane"] for i in range(len(items))] == [0, 2]
    plane = found._planes[1]
    assert np.array_equal(window(Dicom(), plane)[0], values[2])


def nifti(path, values, affine=None):
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 3, 4, 1]) if affine is None else affine), path)
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("plane", "shape", "size"), [("axial", (6, 5), 2e-3), ("coronal", (7, 5), 2e-3),
                                                      ("sagittal", (7, 6), 3e-3)])  # fmt: skip
def test_slices_of_nifti(ending, plane, shape, size, tmp_path):
    x, y, z = np.meshgrid(np.arange(5), np.arange(6), np.arange(7), indexing="ij")
    volume = (x + 10 * y + 100 * z).astype(np.int16)
    reader = Nifti(plane=plane)
    planes = reader.planes(str(nifti(tmp_path / f"a{ending}", volume)))
    assert len(planes) == {"axial": 7, "coronal": 6, "sagittal": 5}[plane]
    assert (planes[0].height, planes[0].width) == shape
    assert planes[0].pixel_size == pytest.approx(size)
    read = window(reader, planes[2])[0]
    # R A S: x grows to the right, y to the front, z to the top. Pictures: patient's right at the left, front or top up.
    expected = {
        "axial": volume[::-1, ::-1, 2].T,
        "coronal": volume[::-1, 2, ::-1].T,
        "sagittal": volume[2, ::-1, ::-1].T,
    }
    assert np.array_equal(read, expected[plane])
    other = str(nifti(tmp_path / f"b{ending}", volume[::-1].copy(), np.diag([-2.0, 3, 4, 1])))  # x grows to the left
    assert np.array_equal(window(reader, reader.planes(other)[2])[0], expected[plane])  # the same place in the head


def test_volumes_and_channels_of_nifti(tmp_path):
    values = numbers(5, 6, 7, 3, dtype=np.uint8)
    path = str(nifti(tmp_path / "sub-07" / "a.nii", values))
    planes = Nifti().planes(path)
    assert len(planes) == 21
    assert planes[0].subject == "sub-07"
    assert np.array_equal(window(Nifti(), planes[8])[0], values[::-1, ::-1, 1, 1].T)
    planes = Nifti("XYZC").planes(path)
    assert len(planes) == 7
    assert np.array_equal(window(Nifti("XYZC"), planes[1]), values[::-1, ::-1, 1].transpose(2, 1, 0))


@pytest.mark.parametrize(("mode", "largest"), [("16", 65535), ("8", 255)])
def test_png(mode, largest, tmp_path):
    values = numbers(20, 30, dtype=np.uint16 if mode == "16" else np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    (plane,) = Picture().planes(str(tmp_path / "a.png"))
    assert plane.largest == largest
    assert np.array_equal(window(Picture(), plane, 1, 2, 9, 9)[0], values[1:10, 2:11])


def test_colours_of_16_bits_stay_16_bits(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    values = numbers(3, 20, 30)
    with rasterio.open(tmp_path / "a.png", "w", driver="PNG", count=3, height=20, width=30, dtype="uint16") as file:
        file.write(values)
    (plane,) = Picture().planes(str(tmp_path / "a.png"))
    assert np.array_equal(window(Picture(), plane), values)


# ---- the data set


def stack(path, n=10, shape=(12, 16), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=numbers(n, *shape), **more)
    return path


def test_tiles_cover_an_image_and_stay_on_one_side(tmp_path):
    for i in range(10):
        np.save(tmp_path / f"{i}.npy", numbers(25, 30, seed=i))
    found = data(tmp_path, tile=10, stride=8, val_share=0.2, test_share=0.2)
    files = {split: {found.items(split)[i]["file"] for i in range(len(found.items(split)))} for split in SPLITS}
    assert {split: len(names) for split, names in files.items()} == {"train": 6, "val": 2, "test": 2}
    assert not any(files[a] & files[b] for a, b in itertools.combinations(SPLITS, 2))
    items = found.items("val")
    covered = np.zeros((25, 30))
    for i in range(len(items) // 2):
        item = items[i]
        assert item["array"].shape == (1, 10, 10)
        top, left = item["tile_row"], item["tile_column"]
        covered[top : top + 10, left : left + 10] += 1
    assert covered.min() == 1
    assert [items[i]["tile_row"] for i in range(0, 12, 4)] == [0, 8, 15]
    whole = np.load(items[0]["file"])[8:18, 8:18].astype(float)
    low, high = np.percentile(np.load(items[0]["file"]), [0.5, 99.5])
    assert_close(items[5]["array"][0], np.clip((whole - low) / (high - low), 0, 1).astype(np.float32))


def test_a_tile_is_read_without_the_rest(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    import tracemalloc

    with tifffile.TiffWriter(tmp_path / "a.tif") as file:  # 128 MB in pixels
        tiles = (np.full((256, 256), i % 7, np.uint16) for i in range(32 * 32))
        file.write(tiles, shape=(8192, 8192), dtype=np.uint16, tile=(256, 256), compression="zlib")
    found = data(tmp_path, tile=256)
    tracemalloc.start()
    item = found.items("train")[33]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # its percentiles come from bands
    assert item["array"].shape == (1, 256, 256)
    assert (item["array"] == np.float32((33 % 7) / 6)).all()


def test_stretches(tmp_path):
    path = stack(tmp_path / "a.npz")
    values = np.load(path)["images"].astype(np.float64)

    def first(**arguments):
        return data(path, **arguments).items("train")[3]["array"][0]

    assert_close(first(stretch="type"), (values[3] / 65535).astype(np.float32))
    low, high = np.percentile(values[3], [0.5, 99.5])
    assert_close(first(), np.clip((values[3] - low) / (high - low), 0, 1).astype(np.float32))
    low, high = np.percentile(values, [5, 95])
    assert_close(
        first(stretch="data", percentiles=(5, 95)), np.clip((values[3] - low) / (high - low), 0, 1).astype(np.float32)
    )
    assert_close(first(limits=[[100, 50000]]), np.clip((values[3] - 100) / 49900, 0, 1).astype(np.float32))
    told = data(path, stretch="data", percentiles=(5, 95)).identity("train")
    assert_close(np.array(told["measured_limits"]), np.array([[low, high]]), rtol=1e-5, atol=0)
    with pytest.raises(MmsaeError, match=r"a\.npz' recommends no window; give limits, or another stretch"):
        first(stretch="window")
    flat = tmp_path / "flat.npy"
    np.save(flat, np.full((8, 8), 7, np.uint8))
    assert np.isfinite(data(flat).items("train")[0]["array"]).all()


def test_limits_of_the_data_are_those_of_training(tmp_path):
    values = np.zeros((10, 8, 8), np.uint16)
    values[:] = np.arange(10)[:, None, None] * 1000 + np.arange(64).reshape(8, 8)
    np.savez(tmp_path / "a.npz", images=values)
    found = data(tmp_path / "a.npz", stretch="data", percentiles=(0, 100), val_share=0.3, test_share=0.3)
    train = [found.items("train")[i]["plane"] for i in range(4)]
    limits = found.identity("val")["measured_limits"]
    assert limits == [[values[train].min(), values[train].max()]]


def test_channels_are_chosen_repeated_or_read_alone(tmp_path):
    np.save(tmp_path / "a.npy", numbers(12, 10, 4))
    both = data(tmp_path, axes="YXC", stretch="type")
    whole = both.items("train")[0]["array"]
    assert whole.shape == (4, 12, 10)
    chosen = data(tmp_path, axes="YXC", stretch="type", channels=[2, 0, 2]).items("train")[0]["array"]
    assert np.array_equal(chosen, whole[[2, 0, 2]])
    each = data(tmp_path, axes="YXC", stretch="type", channels="each")
    items = each.items("train")
    assert len(items) == 4
    assert np.array_equal(items[3]["array"], whole[[3, 3, 3]])
    assert each.factors == {"channel": ("0", "1", "2", "3")}
    assert [items[i]["labels"]["channel"] for i in range(4)] == [0, 1, 2, 3]
    with pytest.raises(MmsaeError, match=r"a\.npy' has no channel 'DAPI'; it has 0 \(0\), 1 \(1\)"):
        _ = data(tmp_path, axes="YXC", channels=["DAPI"]).items("train")[0]


def test_sets_of_channels_are_labels(tmp_path):
    for i in range(2):
        np.save(tmp_path / f"gray{i}.npy", numbers(1, 8, 8, 1))
        np.save(tmp_path / f"pair{i}.npy", numbers(1, 8, 8, 2))
    found = data(tmp_path)
    assert found.factors == {"channel_set": ("0", "0+1")}
    assert [found.items("train")[i]["labels"]["channel_set"] for i in range(4)] == [0, 0, 1, 1]


def table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def labelled(tmp_path, n=12):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(n):
        np.save(folder / f"{i}.npy", numbers(8, 8, seed=i))
        rows.append({"file": f"{i}.npy", "stage": ["early", "late", ""][i % 3], "patient": f"p{i // 2}",
                     "part": SPLITS[i // 2 % 3]})  # fmt: skip
    np.save(folder / "left_out.npy", numbers(8, 8))
    return folder, rows


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_of_labels_and_groups(ending, tmp_path):
    folder, rows = labelled(tmp_path)
    path = table(tmp_path / "t.csv", rows)
    if ending == "parquet":
        pandas = pytest.importorskip("pandas")
        path = str(tmp_path / "t.parquet")
        pandas.DataFrame(rows).to_parquet(path)
    arguments = {"labels": ["stage"], "group_column": "patient", "table": path}
    found = data(folder, **arguments, val_share=0.3, test_share=0.3)
    assert found.factors == {"stage": ("early", "late")}
    seen = {}
    for split in SPLITS:
        items = found.items(split)
        for i in range(len(items)):
            number = int(Path(items[i]["file"]).stem)
            assert items[i]["labels"]["stage"] == [0, 1, -1][number % 3]
            seen.setdefault(number // 2, set()).add(split)
    assert set(seen) == set(range(6))
    assert all(len(splits) == 1 for splits in seen.values())
    own = data(folder, **arguments, split_column="part")
    assert [int(Path(own.items("val")[i]["file"]).stem) for i in range(4)] == [2, 3, 8, 9]
    rows[0]["part"] = "val"
    with pytest.raises(MmsaeError, match="column 'part' puts 'p0' into "):
        data(folder, **{**arguments, "table": table(tmp_path / "u.csv", rows)}, split_column="part").items("val")


def test_a_table_about_the_entries_of_a_stack(tmp_path):
    stack(tmp_path / "a.npz", n=6)
    rows = [{"file": "a.npz", "entry": i, "class": "ab"[i % 2]} for i in (0, 2, 3)]
    found = data(tmp_path, table=table(tmp_path / "t.csv", rows), plane_column="entry", labels=["class"])
    items = found.items("train")
    assert [(items[i]["plane"], items[i]["labels"]["class"]) for i in range(3)] == [(0, 0), (2, 0), (3, 1)]
    assert len(items) == 3


def test_patients_are_not_shared_by_splits(tmp_path):
    for i in range(12):
        dicom(tmp_path / f"{i}.dcm", numbers(8, 8, seed=i), patient=f"p{i // 3}")
    found = data(tmp_path, val_share=0.25, test_share=0.25)
    ids = {split: {found.items(split)[i]["subject_id"] for i in range(len(found.items(split)))} for split in SPLITS}
    assert {split: len(found.items(split)) for split in SPLITS} == {"train": 6, "val": 3, "test": 3}
    assert not any(ids[a] & ids[b] for a, b in itertools.combinations(SPLITS, 2))


def test_masks_follow_their_tiles_into_patches(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    picture, mask = numbers(64, 64), np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 200
    mask[32:, :] = 77
    (tmp_path / "in").mkdir()
    (tmp_path / "masks").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", picture)
    Image.fromarray(mask).convert("P").save(tmp_path / "masks" / "a.png")
    arguments = {"masks": str(tmp_path / "masks"), "tile": 32, "channels": [0, 0, 0]}
    vit = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
    model = Timm("vit_tiny_patch16_224", ["blocks.0"], image_size=64, config=vit, device="cpu")
    made = ScienceImages(str(tmp_path / "in"), source=model, val_share=0, test_share=0, **arguments,
                         mask_values={"0": "left", "100-": "right"})  # fmt: skip
    assert made.factors == {"mask": ("left", "right")}
    rows = model.read(model.collate([made.items("train")[i] for i in range(4)]))
    labels = rows["label.mask"].view(4, 65)
    assert labels[:, 0].tolist() == [-1] * 4  # class token
    assert [labels[i, 1:].unique().tolist() for i in range(4)] == [[0], [1], [-1], [-1]]  # 77 has no name
    shown = model.render(made.items("train")[1])
    assert shown["labels"] == {0: "left", 1: "right"}
    assert np.array(shown["mask"]).max() == 1
    assert shown["image"].size == (32, 32)


def test_arrays_go_into_a_model_as_pictures_do(tmp_path):
    x = RNG(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    vit = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
    model = Timm("vit_tiny_patch16_224", ["blocks.0"], image_size=32, config=vit, device="cpu")
    array = {"array": x.transpose(2, 0, 1).astype(np.float32) / 255, "sample_id": 0}
    read = model.collate([array])["input"][0]
    to_tensor, normalise = model.transform.transforms[-2:]  # those before it cut off the border
    assert_close(read, normalise(to_tensor(Image.fromarray(x))), atol=1e-5, rtol=0)
    model.arrays = None  # as in models that read pictures only
    assert_close(
        model.collate([array])["input"], model.collate([{"image": Image.fromarray(x), "sample_id": 0}])["input"]
    )
    with pytest.raises(MmsaeError, match="item 5 has 4 channels, and a picture 1 or 3"):
        model.collate([{"array": np.zeros((4, 8, 8)), "sample_id": 5}])
    with pytest.raises(MmsaeError, match=r"the array of item 6 has shape \(8, 8\) \(float64\); give numbers"):
        model.collate([{"array": np.zeros((8, 8)), "sample_id": 6}])
    five = Timm(
        "resnet10t", ["layer1"], image_size=64, config={"in_chans": 5}, mean=[0.5] * 5, std=[0.2] * 5, device="cpu"
    )
    assert five.spec.streams == {"layer1": 64}
    batch = five.collate([{"array": np.full((5, 40, 40), 0.7, np.float32), "sample_id": 0}])
    assert_close(batch["input"], torch.ones(1, 5, 64, 64))
    with pytest.raises(MmsaeError, match=r"'resnet10t' reads 5 channels but mean has 3 numbers; give mean and std"):
        Timm("resnet10t", ["layer1"], config={"in_chans": 5}, device="cpu").spec  # noqa: B018
    rgb = Timm("resnet10t", ["layer1"], image_size=64, device="cpu")
    with pytest.raises(MmsaeError, match=r"item 4 has 1 channels but the model reads 3; choose them, e\.g\. --data"):
        rgb.collate([{"array": np.zeros((1, 8, 8)), "sample_id": 4}])


# ---- what goes wrong


def truncated(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", numbers(64, 64))
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:4000])


def truncated_tiles(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", numbers(64, 64), compression="zlib", tile=(16, 16))
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:4000])


def without_pixels(tmp_path):
    dicom(tmp_path / "a.dcm", None)


def cut_pixels(tmp_path):
    dicom(tmp_path / "a.dcm", numbers(64, 64))
    (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:-500])


def wrong_header(tmp_path):
    path = nifti(tmp_path / "a.nii", numbers(5, 6, 7, dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[42:44] = (500).to_bytes(2, "little")  # the first side
    path.write_bytes(content)


def cut_gz(tmp_path):
    path = nifti(tmp_path / "a.nii.gz", numbers(50, 60, 7))
    path.write_bytes(path.read_bytes()[:3000])


def no_nifti(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"nothing" * 100)


def flat_nifti(tmp_path):
    nifti(tmp_path / "a.nii", numbers(5, 6, dtype=np.uint8))


def pickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object))


def broken_png(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")


@pytest.mark.parametrize(("damage", "said"), [
    (truncated, r"a\.tif' is cut off: its pixels need 8192 bytes; replace it or leave it out"),
    (truncated_tiles, r"a\.tif' is cut off in the middle of its pixels"),
    (without_pixels, r"the DICOM file '.*a\.dcm' has no pixels; leave it out"),
    (cut_pixels, r"a\.dcm' cannot be read as DICOM \(.*\); replace it or leave it out"),
    (wrong_header, r"a\.nii' is cut off: its header asks for 21352 bytes, but it has 562"),
    (cut_gz, r"a\.nii\.gz' cannot be read as NIfTI \(.*\); replace it or leave it out"),
    (no_nifti, r"a\.nii' cannot be read as NIfTI \(.*\); replace it or leave it out"),
    (flat_nifti, r"the NIfTI file '.*a\.nii' has shape \(5, 6\); volumes"),
    (pickled, r"a\.npy' cannot be read as arrays of numpy \(.*\); replace it"),
    (broken_png, r"a\.png' cannot be read as a picture \(.*\); replace it"),
])  # fmt: skip
def test_damaged_files_are_named(damage, said, tmp_path):
    damage(tmp_path)
    with pytest.raises(MmsaeError, match=said) as told:
        _ = data(tmp_path, tile=64).items("train")[0]
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("name", "module"), [("a.tif", "tifffile"), ("a.dcm", "pydicom"), ("a.nii", "nibabel")])
def test_a_missing_library_is_told(name, module, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MmsaeError, match=rf"ScienceImages needs {module}: pip install 'mmsae\[science\]'"):
        data(tmp_path).items("train")


def test_a_missing_codec_is_told(tmp_path, monkeypatch):
    tifffile, rasterio = pytest.importorskip("tifffile"), pytest.importorskip("rasterio")
    shape = {"count": 1, "height": 20, "width": 30, "dtype": "uint16"}
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", compress="lzw", **shape) as file:
        file.write(numbers(1, 20, 30))
    (plane,) = Tiff().planes(str(tmp_path / "a.tif"))

    def refuse(*_, **__):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "decode", refuse)  # also where the codecs are installed
    with pytest.raises(MmsaeError, match=r"a\.tif' is packed by LZW: pip install imagecodecs"):
        window(Tiff(), plane)


def test_pictures_of_more_than_8_bits_are_refused_by_the_folder_of_pictures(tmp_path):
    for i in range(10):
        Image.fromarray(numbers(8, 8, seed=i)).save(tmp_path / f"{i}.tif")
    folder = ImageFolder(str(tmp_path), source=source())
    with pytest.raises(
        MmsaeError, match=r"picture '.*\.tif' has more than 8 bits a channel \(mode I;16\); read it with"
    ):
        list(folder.rows("val"))


def test_wrong_settings_are_told_before_any_file_is_read(tmp_path):
    folder, rows = labelled(tmp_path)
    path = table(tmp_path / "t.csv", rows)
    missing = table(tmp_path / "m.csv", [*rows, {**rows[0], "file": "99.npy"}])
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ({"table": missing}, r"m\.csv' names '.*99\.npy' in column 'file', but there is no such file"),
        ({"table": path, "labels": ["stge"]}, r"has no column 'stge'; nearest: stage"),
        ({"table": str(tmp_path / "x.csv")}, r"there is no table '.*x\.csv'"),
        ({"table": table(tmp_path / "d.csv", rows + rows[:1])}, r"d\.csv' has two rows about '.*0\.npy'; tell them by"),
        ({"table": path, "plane_column": "stage"}, r"column 'stage' of '.*t\.csv' holds 'early'; pages and slices are"),
        ({"labels": ["stage"]}, r"data\.labels names columns, but there is no data\.table"),
        ({"percentiles": (90, 10)}, r"percentiles=\[90\.0, 10\.0\] are out of order"),
        ({"limits": [[3, 1]]}, r"limits=\[\[3, 1\]\] should be pairs of a lower and a higher value"),
        ({"tile": 0}, "tile=0 is out of range"),
        ({"mask_values": {"a": "b"}}, "mask_values has 'a'; give a whole number"),
    ):
        with pytest.raises(MmsaeError, match=said):
            data(folder, **arguments)
    with pytest.raises(MmsaeError, match=r"data\.root=.*nowhere does not exist"):
        data(tmp_path / "nowhere")
    with pytest.raises(MmsaeError, match=r"data\.root=.*empty holds no pictures \(\.bmp, .*DICOM\)"):
        data(tmp_path / "empty")
    with pytest.raises(MmsaeError, match=r"data\.masks=none is neither a folder nor a column of the table"):
        _ = data(folder, masks="none").items("train")[0]
    with pytest.raises(MmsaeError, match=r"no file in data\.masks=.*empty is named like one of"):
        _ = data(folder, masks=str(tmp_path / "empty")).items("train")[0]


def test_a_mask_of_another_size_is_named(tmp_path):
    path = stack(tmp_path / "a.npz", masks=numbers(10, 5, 5, dtype=np.uint8))
    with pytest.raises(MmsaeError, match=r"the mask '.*a\.npz' has 5x5 pixels but its picture '.*a\.npz' 16x12"):
        _ = data(path, array="images", masks="masks").items("train")[0]
    with pytest.raises(MmsaeError, match=r"a\.npz' holds the arrays images, masks; choose one with array="):
        _ = data(path).items("train")[0]


# ---- real pictures


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"no {name} beside the repository: set MMSAE_DATA to its folder")
    return DATA / name


def test_real_nuclei():
    names = {"0": "background", "1-": "nucleus"}
    found = data(real("cells_bbbc038/nuclei_60.npz"), array="images", masks="instances", mask_values=names,
                 channels=[0, 0, 0], val_share=0.2, test_share=0.2)  # fmt: skip
    assert {split: len(found.items(split)) for split in SPLITS} == {"train": 36, "val": 12, "test": 12}
    items = found.items("train")
    inside, outside = [], []
    for i in range(12):
        mask, array = items[i]["mask"], items[i]["array"][0]
        inside.append(array[mask == 1].mean())
        outside.append(array[mask == 0].mean())
    assert np.mean(inside) > np.mean(outside) + 0.3  # nuclei are bright: masks and pictures belong together


def test_a_real_geotiff():
    pytest.importorskip("rasterio")
    pytest.importorskip("tifffile")
    found = data(real("tree_crowns/OSBS_029.tif"), tile=100)
    items = found.items("train")
    assert len(items) == 16
    assert items[0]["pixel_size"] == pytest.approx(0.1)
    assert items[0]["crs"] == "EPSG:32617"


def test_real_volumes():
    pytest.importorskip("nibabel")
    found = data(real("connectivity_human"), every=10)
    assert len(found.items("train")) == 80  # 40 volumes of two files, one of ten slices each
    assert found.items("train")[0]["pixel_size"] == pytest.approx(2.0833e-3, rel=1e-3)


def test_real_x_rays_with_a_table(tmp_path):
    root = real("pneumonia_mnist")
    labels = np.load(root / "pneumoniamnist_cut.npz")["train_labels"][:, 0]
    names = ("normal", "pneumonia")
    rows = [{"file": "pneumoniamnist_cut.npz", "entry": i, "class": names[label]} for i, label in enumerate(labels)]
    found = data(root, table=table(tmp_path / "t.csv", rows), plane_column="entry", labels=["class"],
                 array="train_images", stretch="type", channels=[0, 0, 0])  # fmt: skip
    items = found.items("train")
    assert len(items) == 1500
    assert [items[i]["labels"]["class"] for i in range(20)] == labels[:20].tolist()

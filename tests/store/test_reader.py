import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsae.errors import MmsaeError
from mmsae.spec import ACTS
from mmsae.store import DiskChunks, Store, Writer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "train"
    writer = Writer(folder, {}, "float32", rows_per_shard=8)
    writer.resume()
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    writer.add({ACTS: {"x": x}, "sample_id": torch.arange(20)})
    writer.close()
    writer.finish({}, {}, {})
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "train")


def test_missing_shard_is_named(folder):
    (folder / "000-00001.safetensors").unlink()
    with pytest.raises(MmsaeError, match=r"000-00001\.safetensors is missing or damaged"):
        Store(folder)


@pytest.mark.parametrize("verify", ["checksum", "size"])
@pytest.mark.parametrize("left", [0, 4, 100, -1], ids=str)
def test_truncated_shard_is_named(folder, left, verify):
    shard = folder / "000-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(MmsaeError, match=r"000-00002\.safetensors is missing or damaged"):
        Store(folder, verify)


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found_and_its_shard_named(finished, place, bit):
    shard = finished / "000-00000.safetensors"
    good = shard.read_bytes()
    bad = bytearray(good)
    bad[int(place * len(bad))] ^= 1 << bit
    shard.write_bytes(bytes(bad))
    try:
        with pytest.raises(MmsaeError, match=r"000-00000\.safetensors"):
            Store(finished)
    finally:
        shard.write_bytes(good)
    assert len(Store(finished)) == 20


def test_damaged_statistics_are_named(folder):
    (folder / "statistics.safetensors").write_bytes(b"nothing")
    with pytest.raises(MmsaeError, match=r"statistics\.safetensors cannot be read"):
        Store(folder)


def test_missing_manifest_says_that_the_extraction_did_not_finish(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(MmsaeError, match=r"no manifest\.json: its extraction did not finish"):
        Store(folder)
    with pytest.raises(MmsaeError, match="no activation store at"):
        Store(folder / "nowhere")


def test_folder_of_splits_is_told_apart_from_a_store(folder):
    with pytest.raises(MmsaeError, match=r"holds stores by split \(train\)"):
        Store(folder.parent)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, "format 2, newer than the 1 known here: update mmsae"),
        ({"format": None}, "cannot be read"),
        ({"surprise": 1}, "cannot be read"),
    ],
)
def test_manifest_of_another_format_is_refused(folder, change, sentence):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(MmsaeError, match=sentence):
        Store(folder)


def test_manifest_that_is_no_json_is_refused(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(MmsaeError, match="cannot be read"):
        Store(folder)


def test_unknown_column_is_refused(finished):
    with pytest.raises(MmsaeError, match="no column 'label'; it has sample_id"):
        DiskChunks(Store(finished), columns=["label"])

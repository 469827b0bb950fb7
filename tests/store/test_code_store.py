import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mmsae.codes import Codes
from mmsae.errors import MmsaeError
from mmsae.spec import ActivationSpec
from mmsae.store import CodeStore, CodeWriter, Store
from mmsae.store.by_latent import buckets, write_by_latent

PLAN = {"dictionary": {"sha256": "abc"}}
D = 11


def make(n_rows, seed=0, d_latent=D, share=0.4, signed=False):
    """Dense codes, some rows and latents silent, and columns."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(n_rows, d_latent, generator=g)
    dense = torch.where(torch.rand(n_rows, d_latent, generator=g) < share, dense if signed else dense.abs(), 0)
    dense[:, 2] = 0
    return dense, {"sample_id": torch.arange(n_rows) // 3, "flag": torch.rand(n_rows, generator=g) > 0.5}


def batches_of(dense, columns, sizes):
    """Pair lists of different widths, and dense ones."""
    start, found = 0, []
    for i, size in enumerate(sizes):
        codes = Codes(dense[start : start + size], None, dense.shape[1])
        own = {name: column[start : start + size] for name, column in columns.items()}
        found.append((codes.sparse() if i % 2 else codes, own))
        start += size
    return found


def write(folder, batches, d_latent=D, **arguments):
    writer = CodeWriter(folder, PLAN, d_latent, **{"rows_per_shard": 7, **arguments})
    for codes, columns in batches[writer.resume().batches :]:
        writer.add(codes, columns)
    writer.close()
    return writer


def finish(writer, signed=False):
    origin = {"class": "Toy"}, {"class": "Data"}, {"kind": ["a"]}
    return writer.finish({"core": "TopK", "sha256": "abc"}, ActivationSpec({"x": 4}), signed, *origin)


def stored(folder, n_rows=53, signed=False, d_latent=D, **arguments):
    dense, columns = make(n_rows, signed=signed, d_latent=d_latent)
    sizes = [10] * (n_rows // 10) + [n_rows % 10]
    finish(write(folder, batches_of(dense, columns, sizes), d_latent, **arguments), signed)
    return CodeStore(folder), dense, columns


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("d_latent", [D, 70_000])
def test_codes_come_back_as_they_were(tmp_path, dtype, d_latent):
    store, dense, columns = stored(tmp_path / "s", 53, True, d_latent, dtype=dtype)
    want = dense.to(getattr(torch, dtype)).float()
    assert (len(store), store.d_latent, store.n_pairs) == (53, d_latent, int((want != 0).sum()))
    assert torch.equal(store[:].dense(), want)
    assert torch.equal(store[20:33].dense(), want[20:33])
    assert torch.equal(store[-4:].dense(), want[-4:])
    assert len(store[9:9].values) == len(store[60:].values) == 0
    parts = list(store.batches(8))
    assert torch.equal(torch.cat([codes.dense() for codes, _ in parts]), want)
    for name, column in columns.items():
        assert torch.equal(torch.cat([found[name] for _, found in parts]), column)
        assert np.array_equal(store.columns[name], column.numpy())
    assert np.array_equal(store.firings, (want != 0).sum(0).numpy())
    for latent in (0, 2, 5, d_latent - 1):
        rows, values = store.latent(latent)
        assert np.array_equal(rows, want[:, latent].nonzero()[:, 0].numpy())
        assert np.array_equal(values, want[:, latent].numpy()[rows])
    raw = load_file(tmp_path / "s" / store.manifest.shards[0]["file"])  # nothing but arrays
    assert raw["codes.latents"].dtype == (torch.uint16 if d_latent == D else torch.int32)
    assert len(raw["codes.offsets"]) == 8


def test_fixed_k_needs_no_padding_and_rows_keep_the_order_of_the_dictionary(tmp_path):
    indices = torch.stack([torch.randperm(D)[:3] for _ in range(20)])
    values = torch.rand(20, 3) + 0.1
    finish(write(tmp_path / "s", [(Codes(values, indices, D), {})]))
    again = CodeStore(tmp_path / "s")[5:18]
    assert torch.equal(again.values, values[5:18])
    assert torch.equal(again.indices, indices[5:18])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_interrupted_encoding_goes_on_to_the_same_bytes(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum))
    shard, root = data.draw(st.integers(1, 12)), tmp_path_factory.mktemp("codes")
    batches = batches_of(*make(sum(sizes)), sizes)
    finish(write(root / "whole", batches, rows_per_shard=shard))
    again = root / "again"
    for _ in range(data.draw(st.integers(1, 3))):
        writer = CodeWriter(again, PLAN, D, rows_per_shard=shard)
        progress = writer.resume()
        for codes, columns in batches[progress.batches : data.draw(st.integers(progress.batches, len(batches)))]:
            writer.add(codes, columns)
        (again / f"000-{writer.n_shards:05d}.safetensors.part").write_bytes(b"half")
        (again / f"000-{writer.n_shards:05d}.safetensors").write_bytes(b"not committed")
        assert not writer.complete
    finish(write(again, batches, rows_per_shard=shard))
    assert bytes_of(again) == bytes_of(root / "whole")
    shutil.rmtree(root)


@settings(max_examples=25, deadline=None)
@given(n_rows=st.integers(1, 60), limit=st.integers(1, 200), shard=st.integers(1, 30), seed=st.integers(0, 9))
def test_by_latent_equals_a_transposed_matrix_however_little_fits_into_memory(
    tmp_path_factory, n_rows, limit, shard, seed
):
    folder = tmp_path_factory.mktemp("codes")
    dense, columns = make(n_rows, seed, signed=True)
    finish(write(folder / "s", batches_of(dense, columns, [n_rows]), rows_per_shard=shard))
    store = CodeStore(folder / "s")
    write_by_latent(store, folder / "s" / "by_latent.safetensors", limit)
    offsets, rows, values = store.by_latent
    latent, row = dense.T.nonzero(as_tuple=True)
    assert np.array_equal(rows, row.numpy())
    assert np.array_equal(values, dense.T[latent, row].numpy())
    assert np.array_equal(np.diff(offsets), (dense != 0).sum(0).numpy())
    assert not list((folder / "s").glob("*.part"))
    shutil.rmtree(folder)


def test_buckets_fit():
    firings = np.array([3, 0, 4, 50, 1, 1, 0, 0, 9, 2])
    bucket_of, edges = buckets(firings, 8)
    assert edges == [0, 3, 4, 8, 9, 10]
    assert bucket_of.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 4]
    assert buckets(np.zeros(3, int), 8)[1] == [0, 3]


def test_the_strongest_rows_are_found_in_one_pass_and_kept(tmp_path):
    store, dense, _ = stored(tmp_path / "s", signed=True)
    top = store.top(4, batch_size=9)
    order = dense.abs().argsort(dim=0, descending=True, stable=True)[:4].T
    found = dense.T.gather(1, order)
    assert torch.equal(top.values, found)
    assert torch.equal(top.rows, torch.where(found == 0, -1, order))
    assert torch.equal(CodeStore(tmp_path / "s").top(4).rows, top.rows)


def test_two_ranks_write_one_store(tmp_path):
    dense, columns = make(40)
    batches = batches_of(dense, columns, [10] * 4)
    for rank in (1, 0):
        write(tmp_path / "s", batches[rank::2], rank=rank, world_size=2)
    finish(CodeWriter(tmp_path / "s", PLAN, D, rows_per_shard=7, world_size=2))
    store = CodeStore(tmp_path / "s", verify="checksum")
    assert torch.equal(store[:].dense(), torch.cat([dense[0:10], dense[20:30], dense[10:20], dense[30:40]]))


def test_many_shards_hold_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr("mmsae.store.code_store.MAPPED", 3)
    store, dense, _ = stored(tmp_path / "s")
    assert torch.equal(store[:].dense(), dense)
    assert len(store._mapped) == 3


def test_what_is_wrong_with_a_store_is_told(tmp_path):
    store, _, _ = stored(tmp_path / "s")
    shard = tmp_path / "s" / store.manifest.shards[1]["file"]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    CodeStore(tmp_path / "s")
    with pytest.raises(MmsaeError, match=r"000-00001\.safetensors is damaged"):
        CodeStore(tmp_path / "s", verify="checksum")
    shard.write_bytes(data[:-1])
    with pytest.raises(MmsaeError, match=r"000-00001\.safetensors is missing or does not have the size"):
        CodeStore(tmp_path / "s")
    with pytest.raises(MmsaeError, match="holds codes, not activations"):
        Store(tmp_path / "s")
    with pytest.raises(MmsaeError, match=r"no code store at .*: make one with mmsae encode"):
        CodeStore(tmp_path / "nix")
    with pytest.raises(MmsaeError, match="in steps of 2"):
        store[::2]
    raw = json.loads((tmp_path / "s" / "manifest.json").read_text())
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(raw | {"format": 99}))
    with pytest.raises(MmsaeError, match="update mmsae"):
        CodeStore(tmp_path / "s")


def test_codes_that_cannot_be_stored_are_refused(tmp_path):
    dense, columns = make(9)
    dense[7, 1] = 1e5
    write(tmp_path / "wide", batches_of(dense, columns, [9]))
    with pytest.raises(MmsaeError, match=r"not finite as float16 \(sample 2\): store them as float32"):
        write(tmp_path / "narrow", batches_of(dense, columns, [9]), dtype="float16")
    with pytest.raises(MmsaeError, match="dtype='int8' is not one of float32, float16"):
        CodeWriter(tmp_path / "s", PLAN, D, "int8")
    with pytest.raises(MmsaeError, match="begun with another dtype"):
        write(tmp_path / "wide", [], dtype="float16")
    with pytest.raises(MmsaeError, match="no codes were written"):
        finish(write(tmp_path / "empty", []))

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.spec import ACTS
from mmsae.store import Store, Writer

PLAN = {"source": {"class": "Toy"}, "batch_size": 4}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_batches(sizes, seed=0):
    """Batches of two streams and three columns; an int in `sizes` is a number of rows."""
    g = torch.Generator().manual_seed(seed)
    batches, start = [], 0
    for n in sizes:
        a, b = torch.randn(n, 5, generator=g), 3 * torch.randn(n, 2, generator=g) + 1
        batches.append(
            {
                ACTS: {"blocks.0": a, "blocks.1.mlp": b},
                "sample_id": torch.arange(start, start + n),
                "position": torch.randint(0, 9, (n, 2), generator=g, dtype=torch.int32),
                "flag": torch.rand(n, generator=g) > 0.5,
            }
        )
        start += n
    return batches


def write(folder, batches, resume=True, **arguments):
    writer = Writer(folder, PLAN, **{"dtype": "float32", "rows_per_shard": 7, **arguments})
    progress = writer.resume()
    for batch in batches[progress.batches :]:
        writer.add(batch)
    writer.close()
    return writer


def finish(writer):
    return writer.finish({"class": "Toy"}, {"class": "Data"}, {"kind": ["a", "b"]})


def joined(batches, stream):
    return torch.cat([batch[ACTS][stream] for batch in batches])


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [*DTYPES, "auto"])
def test_rows_come_back_exactly_as_stored(tmp_path, dtype):
    batches = make_batches([4, 4, 0, 9, 1, 3])
    manifest = finish(write(tmp_path / "s", batches, dtype=dtype))
    store = Store(tmp_path / "s")
    assert (len(store), manifest.n_rows, len(store.shards)) == (21, 21, 3)
    assert store.spec.streams == {"blocks.0": 5, "blocks.1.mlp": 2}
    assert manifest.columns == {"flag": "bool", "position": "int32", "sample_id": "int64"}
    assert manifest.factors == {"kind": ["a", "b"]}
    read = store.read([(0, 0, 7), (1, 0, 7), (2, 0, 7)])
    for stream in store.spec.streams:
        want = joined(batches, stream).to(DTYPES.get(dtype, torch.float32))
        assert_close(read[ACTS][stream], want, rtol=0, atol=0)
    for column in manifest.columns:
        assert torch.equal(read[column], torch.cat([batch[column] for batch in batches]))
    assert torch.equal(torch.cat([batch["sample_id"] for batch in store.in_order(4)]), torch.arange(21))


def test_pieces_are_read_from_anywhere(tmp_path):
    batches = make_batches([10, 11])
    finish(write(tmp_path / "s", batches))
    read = Store(tmp_path / "s").read([(2, 3, 2), (0, 6, 1)], columns=["sample_id"])
    assert read["sample_id"].tolist() == [17, 18, 6]
    assert set(read) == {ACTS, "sample_id"}
    assert_close(read[ACTS]["blocks.0"], joined(batches, "blocks.0")[[17, 18, 6]], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_equal_numpy_in_float64_over_all_rows(tmp_path, dtype):
    batches = make_batches([13, 30, 8])
    finish(write(tmp_path / "s", batches, dtype=dtype, covariance=True))
    for stream, found in Store(tmp_path / "s").statistics.items():
        x = joined(batches, stream).to(DTYPES[dtype]).double().numpy()
        norms = (x**2).sum(1) ** 0.5
        assert found.mean.numpy() == pytest.approx(x.mean(0), rel=1e-12, abs=1e-12)
        assert found.mean_norm == pytest.approx(norms.mean(), rel=1e-12)
        assert found.mean_square == pytest.approx((norms**2).mean(), rel=1e-12)
        centred = x - x.mean(0)
        assert found.covariance.numpy() == pytest.approx(centred.T @ centred / len(x), rel=1e-10, abs=1e-12)


def test_covariance_is_kept_only_when_asked_for(tmp_path):
    finish(write(tmp_path / "s", make_batches([5])))
    assert Store(tmp_path / "s").statistics["blocks.0"].covariance is None


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_interrupted_extraction_goes_on_to_the_same_bytes(tmp_path_factory, data):
    """Killed after any number of batches, in any state of the files, any number of times."""
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum))
    shard = data.draw(st.integers(1, 12))
    batches, root = make_batches(sizes), tmp_path_factory.mktemp("store")
    finish(write(root / "whole", batches, rows_per_shard=shard, covariance=True))
    again = root / "again"
    for _ in range(data.draw(st.integers(1, 3))):
        writer = Writer(again, PLAN, "float32", shard, covariance=True)
        progress = writer.resume()
        stop = data.draw(st.integers(progress.batches, len(batches)))
        for batch in batches[progress.batches : stop]:
            writer.add(batch)
        if stop == len(batches) and data.draw(st.booleans()):
            writer.close()
        # what a kill can leave behind: half-written files, and a shard without its commit
        (again / f"000-{writer.n_shards:05d}.safetensors.part").write_bytes(b"half")
        (again / f"000-{writer.n_shards:05d}.json.part").write_bytes(b"{")
        left = data.draw(st.sampled_from(["nothing", "part of a shard", "whole shard"]))
        if left == "part of a shard":
            (again / f"000-{writer.n_shards:05d}.safetensors").write_bytes(b"not committed")
        elif left == "whole shard" and writer.n_shards:
            (again / f"000-{writer.n_shards - 1:05d}.json").unlink()
        assert not writer.complete
    finish(write(again, batches, rows_per_shard=shard, covariance=True))
    shard_files = {entry["file"] for entry in json.loads((root / "whole" / "manifest.json").read_text())["shards"]}
    assert set(bytes_of(root / "whole")) == {"manifest.json", "plan.json", "statistics.safetensors", *shard_files}
    assert bytes_of(again) == bytes_of(root / "whole")
    shutil.rmtree(root)


def test_two_ranks_write_one_store(tmp_path):
    batches = make_batches([5, 6, 7, 8])
    for rank in (1, 0):
        write(tmp_path / "s", batches[rank::2], rank=rank, world_size=2)
    manifest = finish(Writer(tmp_path / "s", PLAN, "float32", 7, rank=0, world_size=2))
    store = Store(tmp_path / "s")
    ids = torch.cat([batch["sample_id"] for batch in store.in_order(100)])
    assert manifest.n_rows == 26
    assert torch.equal(ids.sort().values, torch.arange(26))
    assert_close(store.statistics["blocks.0"].mean, joined(batches, "blocks.0").double().mean(0))


def test_another_plan_is_refused(tmp_path):
    write(tmp_path / "s", make_batches([9]))
    with pytest.raises(MmsaeError, match=r"begun with another rows_per_shard \(7, now 8\)"):
        Writer(tmp_path / "s", PLAN, "float32", 8).resume()
    with pytest.raises(MmsaeError, match="begun with another batch_size"):
        Writer(tmp_path / "s", {**PLAN, "batch_size": 5}, "float32", 7).complete  # noqa: B018
    (tmp_path / "s" / "plan.json").write_text("{")
    with pytest.raises(MmsaeError, match=r"plan\.json is damaged"):
        Writer(tmp_path / "s", PLAN, "float32", 7).resume()


def test_finished_store_says_so(tmp_path):
    writer = write(tmp_path / "s", make_batches([9]))
    assert not writer.complete
    finish(writer)
    assert writer.complete


def test_damaged_commit_is_named_when_resuming(tmp_path):
    write(tmp_path / "s", make_batches([9, 9]))
    shard = tmp_path / "s" / "000-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(MmsaeError, match=r"000-00001\.safetensors is missing or damaged"):
        Writer(tmp_path / "s", PLAN, "float32", 7).resume()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e5], ids=["nan", "inf", "beyond float16"])
def test_activations_that_cannot_be_stored_are_refused(tmp_path, value):
    batches = make_batches([3, 3])
    batches[1][ACTS]["blocks.1.mlp"][2, 0] = value
    with pytest.raises(MmsaeError, match=r"activations at blocks\.1\.mlp are not finite .*sample 5"):
        write(tmp_path / "s", batches, dtype="float16")


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(MmsaeError, match="no activations were extracted"):
        finish(write(tmp_path / "s", make_batches([0, 0])))
    with pytest.raises(MmsaeError, match="dtype='int8' is not one of"):
        Writer(tmp_path / "t", PLAN, "int8")


def test_columns_that_are_one_tensor_are_stored_twice(tmp_path):
    """As of pairs, whose `pair_id` is the sample; a shard of a single batch holds the very tensors of the source."""
    ids = torch.arange(6)
    writer = Writer(tmp_path / "train", {}, "float32")
    writer.resume()
    writer.add({ACTS: {"image": torch.randn(6, 4), "text": torch.randn(6, 4)}, "sample_id": ids, "pair_id": ids})
    writer.close()
    writer.finish({}, {}, {})
    store = Store(tmp_path / "train")
    rows = store.read(store.cuts(6))
    assert rows["pair_id"].tolist() == rows["sample_id"].tolist() == list(range(6))

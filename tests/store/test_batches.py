import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsae.errors import MmsaeError
from mmsae.spec import ACTS, ActivationSpec
from mmsae.store import Batches, DiskChunks, LiveChunks, Store, Writer


class Tiny:
    """A model that gives `item % 4` rows per example, so that chunks end anywhere and batches are carried over."""

    spec = ActivationSpec({"x": 2})

    def collate(self, items):
        return {"ids": [item["id"] for item in items]}

    def read(self, batch, gradients=False):
        ids = torch.tensor([i for i in batch["ids"] for _ in range(i % 4)], dtype=torch.int64)
        place = torch.tensor([p for i in batch["ids"] for p in range(i % 4)], dtype=torch.int64)
        acts = torch.stack([ids.float(), place.float()], dim=1)
        return {ACTS: {"x": acts}, "sample_id": ids, "position": place}


def live(n_items=41, chunk_rows=16, forward=3, **arguments):
    return LiveChunks(Tiny(), [{"id": i} for i in range(n_items)], chunk_rows, forward, ["sample_id"], **arguments)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "train"
    writer = Writer(folder, {}, "float32", rows_per_shard=13)
    writer.resume()
    ids = torch.arange(61)
    writer.add({ACTS: {"x": torch.stack([ids.float(), -ids.float()], 1)}, "sample_id": ids})
    writer.close()
    writer.finish({}, {}, {})
    return Store(folder)


def disk(store, chunk_rows=16, block_rows=3, **arguments):
    return DiskChunks(store, chunk_rows, block_rows, ["sample_id"], **arguments)


@pytest.fixture(params=["disk", "live"])
def make(request, store):
    """Makes the same chunks again and again, as a restarted program does."""
    return {"disk": lambda **a: disk(store, **a), "live": live}[request.param]


def rows(batches):
    """Every row of some batches as a tuple."""
    return [tuple(row) for batch in batches for row in batch[ACTS]["x"].tolist()]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a[ACTS]["x"], b[ACTS]["x"]) and torch.equal(a["sample_id"], b["sample_id"])
        for a, b in zip(one, other, strict=True)
    )


def everything(make):
    return sorted(rows(Batches(make(), 1000 if make().n_rows is None else 61)))


def test_each_row_exactly_once_per_epoch(make):
    loader = Batches(make(), 7)
    for _ in range(3):
        assert sorted(rows(loader)) == everything(make)
    assert len(everything(make)) == 61 if make().n_rows else len(everything(make)) == sum(i % 4 for i in range(41))


def test_metadata_stay_with_their_rows(make):
    for batch in Batches(make(), 7):
        assert batch["sample_id"].tolist() == batch[ACTS]["x"][:, 0].long().tolist()


def test_all_batches_but_the_last_are_full(make):
    sizes = [len(batch["sample_id"]) for batch in Batches(make(), 7)]
    assert set(sizes[:-1]) == {7}
    assert 0 < sizes[-1] <= 7
    if make().n_rows:
        assert len(Batches(make(), 7)) == len(sizes)
    else:
        with pytest.raises(TypeError, match="not known"):
            len(Batches(make(), 7))


def test_order_is_another_in_each_epoch_and_a_function_of_the_seed(make):
    loader = Batches(make(), 7, seed=1)
    first, second = list(loader), list(loader)
    again = Batches(make(), 7, seed=1, read_ahead=False)
    assert rows(first) != rows(second)
    assert same(first, list(again))
    assert same(second, list(again))
    assert rows(Batches(make(), 7, seed=2)) != rows(first)


@settings(max_examples=40, deadline=None)
@given(batch_size=st.integers(1, 20), seed=st.integers(0, 5), data=st.data())
@pytest.mark.parametrize("kind", ["disk", "live"])
def test_resuming_at_any_position_gives_the_identical_rest(store, kind, batch_size, seed, data):
    chunk_rows = data.draw(st.integers(1, 30))
    forward = data.draw(st.integers(1, 5))

    def loader():
        chunks = disk(store, chunk_rows, forward) if kind == "disk" else live(chunk_rows=chunk_rows, forward=forward)
        return Batches(chunks, batch_size, seed)

    whole = loader()
    epochs = [list(whole) for _ in range(3)]
    position = data.draw(st.integers(0, len(epochs[0]) + len(epochs[1])))
    running, taken = loader(), 0
    while taken < position:
        for _ in running:
            taken += 1
            if taken == position:
                state = copy.deepcopy(running.state_dict())
                break
    if position == 0:
        state = running.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() is not None
    rest = [batch for epoch in epochs for batch in epoch][position:]
    got = list(resumed)
    ends = np.cumsum([0, *map(len, epochs)])
    assert len(got) in ends - position  # the rest of one epoch, which may be empty
    while len(got) < len(rest):
        got += list(resumed)
    assert same(got, rest)


def test_state_after_a_whole_epoch_begins_the_next(make):
    loader = Batches(make(), 7)
    list(loader)
    second = list(loader)
    fresh = Batches(make(), 7)
    other = Batches(make(), 7)
    list(other)
    fresh.load_state_dict(other.state_dict())
    assert same(list(fresh), second)


def test_state_survives_a_checkpoint_file(make, tmp_path):
    loader = iter_of = Batches(make(), 7)
    running = iter(iter_of)
    for _ in range(4):
        next(running)
    torch.save(loader.state_dict(), tmp_path / "state.ckpt")
    resumed = Batches(make(), 7)
    resumed.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    assert same(list(resumed), list(running))


def test_resuming_with_another_seed_is_refused(make):
    with pytest.raises(MmsaeError, match="another data seed than 2"):
        Batches(make(), 7, seed=2).load_state_dict(Batches(make(), 7, seed=1).state_dict())


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_are_disjoint_and_equally_long(make, world_size):
    shares = [rows(Batches(make(rank=rank, world_size=world_size), 5, seed=3)) for rank in range(world_size)]
    union = [row for share in shares for row in share]
    assert len(set(union)) == len(union)
    assert set(union) <= set(everything(make))
    if make().n_rows:
        assert {len(share) for share in shares} == {61 // world_size}


def test_batch_larger_than_the_data_is_refused(store):
    with pytest.raises(MmsaeError, match=r"batch_size=62 is larger than the data \(61 activation rows\)"):
        Batches(disk(store), 62)
    assert len(list(Batches(disk(store), 61))) == 1


def test_data_without_rows_are_refused_by_the_sample():
    empty = LiveChunks(Tiny(), [{"id": 4}, {"id": 8}], 16, 1)
    with pytest.raises(MmsaeError, match="no activation rows"):
        Batches(empty, 4).sample(10)
    with pytest.raises(MmsaeError, match="2 examples cannot be shared by 3"):
        next(iter(Batches(live(n_items=2, world_size=3), 4)))
    with pytest.raises(MmsaeError, match="no column 'label'"):
        next(iter(Batches(LiveChunks(Tiny(), [{"id": 3}], 16, 1, ["label"]), 1)))


def test_sample_is_the_beginning_of_the_first_epoch_and_moves_nothing(make):
    loader = Batches(make(), 7)
    sample = loader.sample(20)
    assert rows([sample]) == rows(list(Batches(make(), 7)))[:20]
    running = iter(loader)
    next(running)
    state = copy.deepcopy(loader.state_dict())
    loader.sample(20)
    after = loader.state_dict()
    assert (state["cursor"], state["used"], state["epoch"]) == (after["cursor"], after["used"], after["epoch"])
    assert same(list(running), list(Batches(make(), 7))[1:])  # nor the rows that are in memory


def test_no_chunk_holds_more_rows_than_asked_for(store):
    chunks = disk(store, chunk_rows=10, block_rows=4)
    cursor, sizes = 0, []
    while cursor is not None:
        batch, cursor = chunks.read(0, 0, cursor)
        sizes.append(len(batch["sample_id"]))
    assert sizes == [10] * 6 + [1]
    buffer = live(chunk_rows=10, forward=2)
    cursor = 0
    while cursor is not None:
        batch, cursor = buffer.read(0, 0, cursor)
        assert len(batch["sample_id"]) < 10 + 2 * 3  # at most one forward pass above


@pytest.mark.parametrize("block_rows", [1, 16])
def test_rows_of_one_example_are_spread_over_the_batches(tmp_path, block_rows):
    """Neighbours in a batch must not be neighbours in the data: 256 examples of 16 rows each, stored in order."""
    writer = Writer(tmp_path / "s", {}, "float32", 1024)
    writer.resume()
    ids = torch.arange(256).repeat_interleave(16)
    value = torch.randn(256, generator=torch.Generator().manual_seed(0))[ids]
    writer.add({ACTS: {"x": value[:, None]}, "sample_id": ids})
    writer.close()
    writer.finish({}, {}, {})
    chunks = DiskChunks(Store(tmp_path / "s"), 1024, block_rows, ["sample_id"])
    stored = np.corrcoef(value[:-1], value[1:])[0, 1]
    batches = list(Batches(chunks, 64))
    x = torch.cat([batch[ACTS]["x"][:, 0] for batch in batches])
    mixed = np.corrcoef(x[:-1], x[1:])[0, 1]
    distinct = np.mean([len(batch["sample_id"].unique()) for batch in batches])
    assert stored > 0.9
    # 4095 pairs give a standard deviation of 0.016 by chance, and a chunk of 64 examples a correlation of its own mean
    assert abs(mixed) < 0.08
    # of 64 rows chance would draw 56.7 different examples from 256, and 41 from the 64 that blocks of 16 put in a chunk
    assert distinct > (54 if block_rows == 1 else 37)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_batches_are_drawn_where_the_training_runs(make, device):
    """The meta device goes the same way as an accelerator, but for pinned memory."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    here, there = list(Batches(make(), 8)), list(Batches(make(), 8, device=device))
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert other[ACTS]["x"].device.type == device
        assert other[ACTS]["x"].shape == one[ACTS]["x"].shape
        if device == "cuda":
            assert torch.equal(other[ACTS]["x"].cpu(), one[ACTS]["x"])

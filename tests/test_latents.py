import numpy as np
import pytest
import torch

from mmsae.codes import Codes
from mmsae.cores import PCA, Neurons, TopK
from mmsae.errors import MmsaeError
from mmsae.latents import LatentStore, to_csr
from mmsae.spec import ACTS
from mmsae.store import CodeStore, CodeWriter

RNG = np.random.default_rng(0)
X = torch.from_numpy(RNG.normal(size=(57, 6)).astype(np.float32))
SAMPLE = torch.from_numpy(RNG.integers(0, 12, 57) * 10 + 3)  # ids with gaps, rows of a sample not side by side
LABEL = (SAMPLE // 10) % 3


def batches(size=10):
    return [
        {ACTS: {"x": X[i : i + size]}, "sample_id": SAMPLE[i : i + size], "label.kind": LABEL[i : i + size]}
        for i in range(0, len(X), size)
    ]


def core(signed=False):
    torch.manual_seed(0)
    return (Neurons(6, k=3) if signed else TopK(6, 20, k=4)).eval()


@pytest.mark.parametrize("signed", [False, True])
def test_everything_equals_the_dense_matrix(signed):
    one = core(signed)
    store = LatentStore.build(one, batches())
    dense = one.encode(X).dense().detach().numpy()
    assert np.array_equal(store.codes.toarray(), dense)
    assert (store.n_rows, store.d_latent, store.signed) == (*dense.shape, signed)
    assert store.codes.nnz == (dense != 0).sum()  # no explicit zeros
    assert np.array_equal(store.firings, (dense != 0).sum(0))
    assert np.array_equal(store.density, (dense != 0).mean(0))
    ids = np.unique(SAMPLE)
    assert np.array_equal(store.samples[0], ids)
    assert np.array_equal(ids[store.samples[1]], SAMPLE.numpy())
    pooled = np.zeros((len(ids), dense.shape[1]), np.float32)
    for i, sample in enumerate(ids):
        rows = np.flatnonzero(SAMPLE.numpy() == sample)
        assert np.array_equal(store.rows_of_sample[i], rows)
        mine = dense[rows]
        pooled[i] = mine[np.abs(mine).argmax(0), np.arange(dense.shape[1])]
    assert np.array_equal(store.pool(), pooled)
    assert np.array_equal(store.labels()["kind"], (ids // 10) % 3)
    for latent in range(dense.shape[1]):
        rows, values = store.of_latent(latent)
        assert np.array_equal(rows, np.flatnonzero(dense[:, latent]))
        assert np.array_equal(values, dense[rows, latent])
        top = store.top_samples(latent, 5)
        order = np.argsort(-np.abs(pooled[:, latent]), kind="stable")
        order = order[pooled[order, latent] != 0][:5]
        assert [s for s, _, _ in top] == order.tolist()
        for sample, row, value in top:
            assert SAMPLE[row] == ids[sample]
            assert value == dense[row, latent] == pooled[sample, latent]


@pytest.mark.parametrize("signed", [False, True])
def test_codes_on_disk_answer_like_those_in_memory(signed, tmp_path, monkeypatch):
    one = core(signed)
    writer = CodeWriter(tmp_path / "s", {}, one.d_latent, rows_per_shard=20)
    writer.resume()
    for batch in batches():
        writer.add(one.encode(batch[ACTS]["x"]), {k: v for k, v in batch.items() if k != ACTS})
    writer.close()
    writer.finish({"core": "x"}, one.spec, signed, {}, {}, {})
    disk, memory = LatentStore.open(CodeStore(tmp_path / "s"), "test"), LatentStore.build(one, batches(), split="test")
    monkeypatch.setattr("mmsae.latents.PAIRS_AT_ONCE", 30)
    assert (disk.n_rows, disk.signed, disk.split, disk.l0) == (memory.n_rows, signed, "test", memory.l0)
    assert (disk.codes != memory.codes).nnz == 0
    for name in ("firings", "density", "strongest"):
        assert np.array_equal(getattr(disk, name), getattr(memory, name))
    assert np.array_equal(disk.pool(), memory.pool())
    assert np.array_equal(disk.pool(2, 5), memory.pool()[:, 2:5])
    assert np.array_equal(disk.labels()["kind"], memory.labels()["kind"])
    assert disk.top_samples(3, 4) == memory.top_samples(3, 4)


def test_codes_of_a_latent_in_chosen_rows():
    store = LatentStore.build(core(), batches())
    dense, rows = store.codes.toarray(), np.array([56, 0, 13, 13, 40])
    for latent in range(store.d_latent):
        assert np.array_equal(store.at(latent, rows), dense[rows, latent])
        assert store.strongest[latent] == np.abs(dense[:, latent]).max()
    assert store.split == LatentStore.build(core(), batches(), max_rows=15, split="test").split == ""


def test_the_size_of_batches_does_not_matter():
    stores = [LatentStore.build(core(), batches(size)) for size in (1, 7, 100)]
    for store in stores[1:]:
        # a row in another batch may take another path through the matrix product
        assert np.allclose(store.codes.toarray(), stores[0].codes.toarray(), rtol=1e-5, atol=1e-6)
        assert np.array_equal(store.columns["sample_id"], stores[0].columns["sample_id"])


def test_half_precision_activations_are_encoded_in_float32():
    half = [{**b, ACTS: {"x": b[ACTS]["x"].bfloat16()}} for b in batches()]
    found = LatentStore.build(core(), half).codes.toarray()
    want = core().encode(X.bfloat16().float()).dense().detach().numpy()
    assert np.allclose(found, want, rtol=1e-5, atol=1e-6)


def test_rows_are_bounded_and_columns_fit():
    store = LatentStore.build(core(), batches(), max_rows=15)
    assert store.n_rows == 20  # whole batches
    assert {len(c) for c in store.columns.values()} == {20}


def test_rows_without_samples_are_samples_themselves():
    store = LatentStore.build(core(), [{ACTS: {"x": X}}])
    assert np.array_equal(store.pool(), store.codes.toarray())


def test_no_rows_is_told():
    with pytest.raises(MmsaeError, match="no activations to encode"):
        LatentStore.build(core(), [])


def test_a_latent_that_never_fires():
    one = core()
    with torch.no_grad():
        one.b_enc[5] = -1e6
    store = LatentStore.build(one, batches())
    assert store.firings[5] == 0
    assert store.top_samples(5, 3) == []
    assert not store.pool()[:, 5].any()


def test_both_layouts_of_codes_give_the_same_matrix():
    dense = torch.where(torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) < 0.3, X[:9, :1], 0)
    dense[4] = 0
    codes = Codes(dense, None, 7)
    assert np.array_equal(to_csr(codes).toarray(), dense.numpy())
    assert np.array_equal(to_csr(codes.sparse()).toarray(), dense.numpy())
    assert to_csr(codes.sparse()).has_sorted_indices


def test_signed_codes_are_told_apart_from_silence():
    pca = PCA(6)
    pca.partial_fit({ACTS: {"x": X}})
    pca.count(torch.ones(6), len(X))
    pca.finish()
    store = LatentStore.build(pca.eval(), batches())
    assert (store.codes.toarray() < 0).any()
    assert store.firings.tolist() == [57] * 6

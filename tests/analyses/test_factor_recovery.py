"""Dictionaries whose latents are the factors, and neurons that are a rotation of them."""

import numpy as np
import pytest
import torch
from tiny import identity_model, live

from mmsae.analyses import FactorRecovery
from mmsae.analyses.factor_recovery import pooled
from mmsae.cores import ReLU
from mmsae.latents import LatentStore
from mmsae.sources import Custom

FACTORS = {"colour": ("red", "green", "blue"), "size": ("small", "large")}
Q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]  # value to direction
N = 300


def items(split):
    rng = np.random.default_rng(["train", "val", "test"].index(split))
    found = []
    for i in range(N):
        labels = {name: int(rng.integers(len(values))) for name, values in FACTORS.items()}
        x = torch.zeros(4, 16)
        x[rng.integers(4)] += Q[labels["colour"]]  # in one position only
        x[rng.integers(4)] += Q[3 + labels["size"]]
        x += 0.3 * torch.from_numpy(rng.normal(size=(4, 16)).astype(np.float32))
        found.append({"input": x, "sample_id": 5 * i + 2, "labels": labels})
    return found


@pytest.fixture(scope="module")
def data():
    one = live()
    one.source = Custom(identity_model, ["0"], modality="signal", input_shape=[4, 16], device="cpu")
    made = {split: items(split) for split in ("train", "val", "test")}
    one.items = lambda split: made[split]
    one.factors = FACTORS
    return one


def truth():
    core = ReLU({"0": 16}, 16)
    with torch.no_grad():
        core.W_enc.copy_(Q)
        core.W_dec.copy_(Q)
        core.b_enc.fill_(-0.3)
    return core.eval()


def test_latents_that_are_the_factors_win_over_neurons(data):
    core = truth()
    result = FactorRecovery(n_bootstrap=50).run(core, LatentStore.build(core, data.rows("test")), data)
    found = result.numbers
    # noise of 0.3 against a signal of 1 in one of four positions: the best threshold misses a few
    assert found["dictionary/mean_f1"] > 0.9
    assert found["dictionary/mean_auroc"] > 0.97
    assert found["dictionary/recovered"] == 1
    for rival in ("neurons", "random"):
        assert found[f"{rival}/mean_f1"] < found["dictionary/mean_f1"] - 0.15
    table = {(row[0], row[1]): row[2] for row in result.tables[1].rows}
    assert [table["colour", c] for c in FACTORS["colour"]] == [0, 1, 2]
    assert [table["size", s] for s in FACTORS["size"]] == [3, 4]
    low, high = map(float, result.tables[0].rows[0][2].split(" to "))
    assert low <= found["dictionary/mean_f1"] <= high


def test_the_strongest_activation_of_a_sample_counts_however_batches_cut_it(data):
    core = truth()
    whole = pooled({"ours": core}, data.rows("test"), "")
    rows = [{k: v for k, v in b.items() if k != "acts"} | b["acts"] for b in data.rows("test")]
    joined = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
    cut = [
        {"acts": {"0": joined["0"][i : i + 7]}, **{k: v[i : i + 7] for k, v in joined.items() if k != "0"}}
        for i in range(0, 4 * N, 7)
    ]
    again = pooled({"ours": core}, cut, "")
    assert np.allclose(whole[0]["ours"], again[0]["ours"], atol=1e-5)
    for name in FACTORS:
        assert np.array_equal(whole[1][name], again[1][name])
        assert whole[1][name].tolist() == [i["labels"][name] for i in data.items("test")]
    with torch.no_grad():
        dense = core.encode(joined["0"]).dense().view(N, 4, 16).amax(1)
    assert np.allclose(whole[0]["ours"], dense.numpy(), atol=1e-5)


def test_no_labels_no_numbers():
    plain = live()
    core = ReLU({"0": 8}, 4).eval()
    result = FactorRecovery().run(core, LatentStore.build(core, plain.rows("test")), plain)
    assert result.numbers == {}
    assert "no labels" in result.title

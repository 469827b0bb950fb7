import pytest
import torch
from tiny import planted, stored, write_store

from mmsae.analyses import Fidelity
from mmsae.cores import Neurons, TopK
from mmsae.latents import LatentStore

X = planted(600)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return stored(write_store(tmp_path_factory.mktemp("store"), X))


def run(core, data, **arguments):
    core = core.eval()
    return Fidelity(**arguments).run(core, LatentStore.build(core, data.rows("test")), data)


def mean_core():
    core = TopK({"x": 8}, 4, k=1)
    with torch.no_grad():
        core.b_enc.fill_(-1e6)
        core.b_dec.copy_(X.double().mean(0))
    return core


def test_identity_and_mean(data):
    assert run(Neurons({"x": 8}), data).numbers["fvu"] == 0
    found = run(mean_core(), data).numbers
    assert found["fvu"] == pytest.approx(1, abs=1e-6)  # the mean in float32
    assert (found["l0"], found["dead_fraction"]) == (0, 1)


def test_pca_beside_it_has_the_same_l0(data):
    torch.manual_seed(0)
    result = run(TopK({"x": 8}, 16, k=3), data)
    title, *rows = [result.tables[0].columns, *result.tables[0].rows]
    assert title[2] == "L0"
    assert rows[1][0] == "PCA, same L0"
    assert rows[1][2] == pytest.approx(round(rows[0][2]), abs=1e-9)
    # numpy: the three largest of all principal components of each row
    wide = X.double()
    vectors = torch.linalg.eigh(torch.cov(wide.T)).eigenvectors
    z = (wide - wide.mean(0)) @ vectors
    z = torch.where(z.abs() >= z.abs().topk(round(rows[0][2]), dim=1).values[:, -1:], z, 0)
    error = (wide - wide.mean(0) - z @ vectors.T).pow(2).sum() / (wide - wide.mean(0)).pow(2).sum()
    assert result.numbers["PCA, same L0/fvu"] == pytest.approx(float(error), rel=1e-4)


def test_the_histogram_counts_live_latents(data):
    core = TopK({"x": 8}, 16, k=3)
    with torch.no_grad():
        core.b_enc[:5] = -1e6
    result = run(core, data)
    line = result.plots[0].lines[0]
    assert result.numbers["dead_fraction"] >= 5 / 16
    assert sum(line["y"]) == round(16 * (1 - result.numbers["dead_fraction"]))
    assert len(line["x"]) == len(line["y"]) + 1

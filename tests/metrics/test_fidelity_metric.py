"""Acceptance T1a of the analyses, and agreement with numpy."""

import numpy as np
import pytest
import torch
from tiny import planted

from mmsae.codes import Codes
from mmsae.metrics import Fidelity

X = planted(700, d=12, offset=3.0)


def codes_of(x, l0=3):
    values = torch.zeros(len(x), 20)
    values[:, :l0] = -1  # signed codes count as well
    return Codes(values, None, 20)


def measured(x, out, sizes=(700,), codes=None):
    metric = Fidelity(x.shape[1], 20)
    for a, b, c in zip(x.split(sizes), out.split(sizes), (codes or codes_of(x)).values.split(sizes), strict=True):
        metric.update(a, b, Codes(c, None, 20))
    return {k: float(v) for k, v in metric.compute().items()}, metric


def test_identity_loses_nothing_and_the_mean_everything():
    found, _ = measured(X, X)
    assert found["fvu"] == 0
    assert found["explained_variance"] == 1
    assert found["cosine"] == pytest.approx(1, abs=1e-12)
    assert found["shrinkage"] == found["relative_bias"] == pytest.approx(1, abs=1e-12)
    mean = X.double().mean(0).expand(700, 12)
    found, _ = measured(X.double(), mean)
    assert found["fvu"] == pytest.approx(1, abs=1e-12)
    assert found["shrinkage"] == pytest.approx(0, abs=1e-12)


def test_noise_only_makes_it_worse():
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(0)) * X.std(0)
    found = [measured(X, X + sigma * noise)[0]["explained_variance"] for sigma in (0, 0.1, 0.3, 1.0)]
    assert found == sorted(found, reverse=True)
    assert found[1:] == pytest.approx([0.99, 0.91, 0.0], abs=0.05)  # 1 - sigma^2


def test_every_number_is_that_of_numpy_however_the_rows_are_batched():
    out = 0.8 * X + 0.3 + 0.1 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    x, y = X.double().numpy(), out.double().numpy()
    codes = codes_of(X)
    codes.values[::2, 5] = 2
    spread = ((x - x.mean(0)) ** 2).sum()
    want = {
        "fvu": ((x - y) ** 2).sum() / spread,
        "explained_variance": 1 - ((x - y) ** 2).sum() / spread,
        "l0": 3.5,
        "dead_fraction": 16 / 20,
        "cosine": ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean(),
        "shrinkage": ((x - x.mean(0)) * (y - y.mean(0))).sum() / spread,
        "relative_bias": (y**2).sum() / (x * y).sum(),
        "mse": ((x - y) ** 2).sum(1).mean(),
    }
    for sizes in ((700,), (1, 99, 600), (350, 350)):
        found, metric = measured(X, out, sizes, codes)
        assert found == pytest.approx(want, rel=1e-10)  # float64 sums in another order
        assert metric.density().tolist() == [1.0] * 3 + [0.0] * 2 + [0.5] + [0.0] * 14


def test_a_mean_over_batches_would_be_another_number():
    """The 'legacy' explained variance: per batch, about the mean of the batch."""
    x = torch.cat([X[:350], X[350:] + 20])  # documents differ
    out = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    found, _ = measured(x, out, (350, 350))
    legacy = np.mean([measured(x[i], out[i], (350,))[0]["fvu"] for i in (slice(350), slice(350, 700))])
    assert abs(legacy - found["fvu"]) > 5 * found["fvu"]


def test_a_large_offset_does_not_drown_the_variance():
    """Float32 sums would: mean^2 is 10^8 times the variance."""
    x = X.double() + 1e5
    out = x + 0.1 * torch.randn(X.shape, generator=torch.Generator().manual_seed(3)).double()
    want = ((x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()
    assert measured(x, out, (100,) * 7)[0]["fvu"] == pytest.approx(want, rel=1e-4)


def test_half_precision_and_moved_modules_stay_in_float64():
    metric = Fidelity(12, 20).to(torch.bfloat16).half()
    metric.update(X.bfloat16(), X.bfloat16(), codes_of(X))
    assert metric.total.dtype == torch.float64
    assert float(metric.compute()["fvu"]) == 0


def test_reset_forgets():
    _, metric = measured(X, 0 * X)
    metric.reset()
    metric.update(X, X, codes_of(X))
    assert float(metric.compute()["fvu"]) == 0
    assert int(metric.n) == 700


def test_nothing_seen_is_not_a_number():
    with pytest.warns(UserWarning, match="before"):
        assert Fidelity(12, 20).compute()["fvu"].isnan()

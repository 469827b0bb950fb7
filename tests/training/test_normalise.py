import pytest
import torch
from tiny import Fixed, adam, batches_of, planted, stored, trainer, write_store
from torch.testing import assert_close

from mmsae.cores import TopK
from mmsae.errors import MmsaeError
from mmsae.training.module import SAEModule
from mmsae.training.normalise import Normaliser, moments

X = planted(5000) @ torch.diag(torch.linspace(0.1, 4, 8)) + torch.arange(8)


def fitted(mode, x=X):
    normaliser = Normaliser(x.shape[1], mode)
    normaliser.fit(moments(x, covariance=True))
    return normaliser


@pytest.mark.parametrize("mode", ["none", "center", "scale", "center_scale", "whiten"])
def test_what_each_mode_promises(mode):
    y = fitted(mode)(X).double()
    wide = X.double()
    centred = mode in ("center", "center_scale", "whiten")
    assert_close(y.mean(0), torch.zeros(8).double() if centred else y.mean(0), atol=1e-4, rtol=0)
    if mode == "none":
        assert torch.equal(y, wide)
    if mode == "center":
        assert_close(y, wide - wide.mean(0), atol=1e-5, rtol=1e-5)
    if mode in ("scale", "center_scale"):
        assert float(y.pow(2).sum(1).mean()) == pytest.approx(8, rel=1e-5)
    if mode == "scale":
        assert_close(y * (wide[0, 0] / y[0, 0]), wide, atol=1e-5, rtol=1e-5)  # directions are kept
    if mode == "whiten":
        covariance = (y - y.mean(0)).T @ (y - y.mean(0)) / len(y)
        spread = torch.linalg.eigvalsh(torch.cov(wide.T, correction=0))
        # shrinkage leaves lambda / (lambda + 0.001 mean) of each direction's variance
        kept = spread / (spread + 1e-3 * spread.mean())
        assert_close(torch.linalg.eigvalsh(covariance), kept.sort().values, atol=2e-3, rtol=0)


@pytest.mark.parametrize("mode", ["none", "center", "scale", "center_scale", "whiten"])
def test_inverting_gives_the_activations_back(mode):
    normaliser = fitted(mode)
    assert_close(normaliser.invert(normaliser(X)), X, atol=1e-3, rtol=1e-4)  # float32, condition number of ~ 50


def test_half_precision_comes_out_in_float32():
    y = fitted("center_scale")(X.bfloat16())
    assert y.dtype == torch.float32
    assert_close(y, fitted("center_scale")(X.bfloat16().float()))


def test_equal_activations_cannot_be_scaled():
    same = torch.ones(10, 8)
    for mode in ("center_scale", "whiten"):
        with pytest.raises(MmsaeError, match="all activations are equal"):
            fitted(mode, same)
    with pytest.raises(MmsaeError, match="all activations are equal"):
        fitted("scale", 0 * same)
    fitted("center", same)


def test_a_direction_without_variance_does_not_explode_under_whitening():
    flat = X.clone()
    flat[:, 3] = 7
    y = fitted("whiten", flat)(flat)
    assert y.isfinite().all()
    assert y.abs().max() < 100


def test_a_store_gives_the_statistics_of_all_rows_and_a_loader_those_of_its_sample(tmp_path):
    write_store(tmp_path / "with", X, covariance=True)
    module = SAEModule(TopK(8, 16, k=3), normalise="whiten", sample_rows=64, optimizer=adam())
    trainer(max_steps=1).fit(module, stored(tmp_path / "with"))
    assert_close(module._normaliser("x").mean, X.double().mean(0).float(), atol=1e-5, rtol=1e-5)
    module = SAEModule(TopK(8, 16, k=3), sample_rows=200, optimizer=adam())
    trainer(max_steps=1).fit(module, Fixed(batches_of(X, 100)))
    assert_close(module._normaliser("x").mean, X[:200].double().mean(0).float(), atol=1e-5, rtol=1e-5)


def test_whitening_a_store_without_covariance_uses_the_sample(tmp_path):
    write_store(tmp_path / "without", X)
    module = SAEModule(TopK(8, 16, k=3), normalise="whiten", optimizer=adam())
    trainer(max_steps=1).fit(module, stored(tmp_path / "without"))
    scale = module._normaliser("x").scale
    assert not torch.equal(scale, torch.eye(8))
    assert scale.isfinite().all()


def test_a_normaliser_without_covariance_says_what_to_do():
    with pytest.raises(MmsaeError, match=r"extract with --model\.covariance=true"):
        Normaliser(8, "whiten").fit(moments(X, covariance=False))

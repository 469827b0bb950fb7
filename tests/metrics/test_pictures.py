import pytest
import torch

from mmsae.errors import MmsaeError
from mmsae.metrics import pictures
from mmsae.metrics.pictures import frechet_distance, kernel_distance, lpips

pytest.importorskip("torchmetrics")


def features(x):
    return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def test_frechet_distance_is_the_formula():
    g = torch.Generator().manual_seed(0)
    real, drawn = torch.rand(200, 3, 8, 8, generator=g), 0.7 * torch.rand(200, 3, 8, 8, generator=g)
    a, b = features(real).double(), features(drawn).double()
    ca, cb = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    want = float((a.mean(0) - b.mean(0)).pow(2).sum() + ca.trace() + cb.trace() - 2 * root)
    assert frechet_distance(real, drawn, features) == pytest.approx(want, rel=1e-3)
    assert frechet_distance(real, real, features) == pytest.approx(0, abs=1e-5)


def test_kernel_distance_is_about_zero_for_equal_sets_and_larger_for_others():
    g = torch.Generator().manual_seed(0)
    real, more, other = (s * torch.rand(120, 3, 8, 8, generator=g) for s in (1.0, 1.0, 0.5))
    assert abs(kernel_distance(real, more, features)) < 0.02
    assert kernel_distance(real, other, features) > 0.1
    assert kernel_distance(real, other, features) == kernel_distance(real, other, features)


def test_what_is_missing_is_said(monkeypatch):
    x = torch.rand(2, 3, 16, 16)
    with pytest.raises(MmsaeError, match="at least two"):
        frechet_distance(x[:1], x, features)
    with pytest.raises(MmsaeError, match="cannot be compared"):
        lpips(x, x[:1])
    with pytest.raises(MmsaeError, match=r"torch-fidelity|Inception"):
        frechet_distance(x, x)

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline, raising=False)
    with pytest.raises(MmsaeError, match="weights of torchvision's alex"):
        lpips(x, x)


def test_lpips_has_the_axes_of_pairs(monkeypatch):
    class Network(torch.nn.Module):
        def forward(self, a, b, normalize):
            assert normalize
            assert min(a.shape[-2:]) >= 64
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(pictures, "_lpips_network", lambda net: Network())
    x = torch.rand(3, 3, 16, 16)
    assert lpips(x, x).tolist() == [0, 0, 0]
    assert (lpips(x, x.flip(0))[[0, 2]] > 0).all()

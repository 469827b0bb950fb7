"""Effects of latents on a number: first order and integrated, against ablating one latent after the other."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmsae.codes import Codes
from mmsae.cores import PolySAE, TopK
from mmsae.errors import MmsaeError
from mmsae.steering import Ablate, attribute, steer

D, M, N = 32, 64, 60


class Oracle(TopK):
    """A dictionary that knows the codes that the activations were made of."""

    def __init__(self, rows, codes):
        super().__init__(D, M, k=M)
        self.known, self.rows = codes, rows
        with torch.no_grad():
            self.W_dec.copy_(rows)

    def encode(self, x, batch=None):
        table = self.known @ self.rows
        return Codes(self.known[torch.cdist(x, table).argmin(-1)], None, M)


class Net(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.start = nn.Identity()
        first, last = nn.Linear(D, 64), nn.Linear(64, 1)
        for layer in (first, last):
            for weight in layer.parameters():
                weight.data *= 3
        self.rest = nn.Sequential(first, nn.Identity() if linear else nn.GELU(), last)

    def forward(self, x):
        return self.rest(self.start(x))[..., 0]


def made(seed, linear=False):
    torch.manual_seed(seed)
    net = Net(linear).eval().requires_grad_(False)
    rows = nn.functional.normalize(torch.randn(M, D), dim=1)
    codes = (torch.rand(N, M) < 0.15) * (1 + 2 * torch.rand(N, M))
    core = Oracle(rows, codes).eval().requires_grad_(False)
    return net, core, codes, codes @ rows


def exact(net, core, codes, x):
    """What the number loses in each row without one latent, `[N, M]`, through the intervention."""
    effects = torch.zeros(N, M)
    clean = net(x)
    for j in range(M):
        with steer(net, core, "start", Ablate(j)):
            effects[:, j] = clean - net(x)
    return effects


def found(net, core, x, **arguments):
    result = attribute(net, core, "start", lambda: net(x), **arguments)
    return result, result.effects.dense()[:, 0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_follow_the_exact_effects_and_integration_adds_up(seed):
    net, core, codes, x = made(seed)
    truth, active = exact(net, core, codes, x), codes != 0
    change = net(x) - net(torch.zeros_like(x))
    missing = {}
    for method in ("gradient", "integrated"):
        result, effects = found(net, core, x, method=method)
        assert torch.corrcoef(torch.stack([effects[active], truth[active]]))[0, 1] >= 0.9
        missing[method] = (effects.sum(1) - change).abs().sum() / change.abs().sum()
        assert result.value - result.baseline == pytest.approx(float(change.sum()), rel=1e-3, abs=1e-2)
    assert missing["integrated"] <= 0.5 * missing["gradient"]


def test_on_a_linear_readout_all_agree():
    net, core, codes, x = made(0, linear=True)
    truth = exact(net, core, codes, x)
    for method in ("gradient", "integrated"):
        assert_close(found(net, core, x, method=method)[1], truth, atol=1e-4, rtol=1e-4)


def test_a_counterfactual_compares_with_another_input():
    """Codes of both count, and so does the part that the dictionary does not explain."""
    net, core, _, x = made(1, linear=True)
    other, error = x.flip(0), 0.1 * torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    result = attribute(net, core, "start", lambda: net(x + error), counterfactual=other)
    total = result.effects.values.sum() + result.error.sum()
    assert float(total) == pytest.approx(float((net(x + error) - net(other)).sum()), rel=1e-4, abs=1e-2)
    assert float(result.error.abs().sum()) > 0.1


def test_by_latent_and_top():
    net, core, _, x = made(2)
    result, effects = found(net, core, x)
    assert_close(result.by_latent(), effects.sum(0), atol=1e-4, rtol=1e-4)
    ids, values = result.top(3)
    assert ids.tolist() == effects.sum(0).abs().topk(3).indices.tolist()
    assert_close(values, effects.sum(0)[ids], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_attributed_is_said():
    net, core, _, x = made(0)
    with pytest.raises(MmsaeError, match="does not depend on 'start'"):
        attribute(net, core, "start", lambda: net(x).detach())
    with pytest.raises(MmsaeError, match="no linear decoder"):
        attribute(net, PolySAE(D, M, k=4, rank2=4, rank3=4), "start", lambda: net(x))
    with pytest.raises(MmsaeError, match="matches 3 modules"):
        attribute(net, core, "*", lambda: net(x))
    with pytest.raises(MmsaeError, match="counterfactual has the shape"):
        attribute(net, core, "start", lambda: net(x), counterfactual=x[:2])

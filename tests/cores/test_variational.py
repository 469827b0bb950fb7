import pytest
import torch
from synthetic import batch_of, scores, train, zipf
from torch.testing import assert_close

from mmsae.cores import TopK, Variational
from mmsae.errors import MmsaeError

D, M = 10, 24
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


def core_of(**arguments):
    torch.manual_seed(0)
    core = Variational(D, M, **{"k": 4, **arguments}).train()
    with torch.no_grad():
        core.b_enc.normal_(0, 0.1)
        if core.spread == "learned":
            core.W_var.normal_()
    return core


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("spread", ["fixed", "learned"])
def test_losses_follow_the_formula(spread, positive):
    core = core_of(spread=spread, positive=positive, kl_coefficient=0.5, sigma=0.7)
    core.start(batch_of(X))
    torch.manual_seed(7)
    terms = core.losses(batch_of(X)).terms
    torch.manual_seed(7)
    with torch.no_grad():
        mean = X @ core.W_enc.T + core.b_enc  # b_dec is not subtracted
        mean = mean.relu() if positive else mean
        log_variance = torch.full_like(mean, 0.7).log() * 2
        if spread == "learned":
            log_variance = (X @ core.W_var.T + core.b_var).clamp(-6, 2)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        kept = torch.zeros_like(z).scatter_(-1, z.abs().topk(4).indices, 1.0)
        error = (X - (z * kept) @ core.W_dec - core.b_dec).pow(2).sum(-1).mean()
        kl = mean.pow(2) if spread == "fixed" else mean.pow(2) + log_variance.exp() - 1 - log_variance
        assert_close(terms["reconstruction"].detach(), error / core.variance)
        assert_close(terms["sparsity"].detach(), 0.25 * kl.sum(-1).mean() / core.variance)


@torch.no_grad()
def test_without_noise_training_codes_are_those_of_inference():
    core = core_of(sigma=0.0)
    sampled = core.encode(X).dense()
    assert_close(sampled, core.eval().encode(X).dense())
    twin = TopK(D, M, k=4)
    twin.load_state_dict(core.state_dict())
    x = X + twin.b_dec
    assert_close(twin.eval().encode(x).dense(), core.encode(X).dense())
    signed = core_of(sigma=0.0, positive=False)
    assert_close(signed.encode(X).dense(), signed.eval().encode(X).dense())
    assert (signed.encode(X).values < 0).any()


@torch.no_grad()
def test_samples_differ_while_training_and_not_in_eval():
    core = core_of()
    assert not torch.equal(core.encode(X).dense(), core.encode(X).dense())
    assert (core.encode(X).values < 0).any()
    core.eval()
    assert_close(core.encode(X).dense(), core.encode(X).dense(), rtol=0, atol=0)


def test_the_learnt_deviation_has_a_gradient():
    core = core_of(spread="learned", kl_coefficient=0.1)
    torch.stack(list(core.losses(batch_of(X)).terms.values())).sum().backward()
    assert core.W_var.grad.abs().max() > 0
    assert core.b_var.grad.abs().max() > 0


def test_bad_settings_are_refused():
    with pytest.raises(MmsaeError, match="sigma=-1 is out of range"):
        Variational(D, M, k=4, sigma=-1)
    with pytest.raises(MmsaeError, match="spread='wide' is unknown"):
        Variational(D, M, k=4, spread="wide")


@pytest.mark.slow
def test_t12_the_kl_term_kills_latents_and_noise_alone_does_not():
    """Acceptance test T12, the paper's negative result taken apart; AuxK is off, as it would revive what KL kills."""
    seen = []
    settings = {"kl and noise": (0.03, 0.3), "kl": (0.03, 0.0), "noise": (0.0, 0.3)}
    for seed in (0, 1, 2):
        data = zipf(96, 48, 4, seed=seed, offset=0.0)
        pool, held = data.rows(30_000, 100 + seed), data.rows(10_000, 200 + seed)
        figures = {}
        for name in ("topk", *settings):
            torch.manual_seed(300 + seed)
            if name == "topk":
                core = TopK(48, 128, k=4, aux_coefficient=0.0)
            else:
                kl, sigma = settings[name]
                core = Variational(48, 128, k=4, kl_coefficient=kl, sigma=sigma, aux_coefficient=0.0)
            train(core, pool, 2000, 256, seed=400 + seed, lr=2e-3)
            figures[name] = scores(core.eval(), held, data.features)
        seen.append(figures)
        print(figures)

    def mean(what, name):
        return sum(getattr(f[name], what) for f in seen) / 3

    def gate(holds):
        return sum(holds(f) for f in seen) >= 2

    assert gate(lambda f: f["kl and noise"].fvu > 1.3 * f["topk"].fvu)
    assert mean("fvu", "kl and noise") > 1.3 * mean("fvu", "topk")
    assert gate(lambda f: f["kl"].dead > f["topk"].dead)
    assert mean("dead", "kl") > mean("dead", "topk")
    assert gate(lambda f: f["noise"].dead < f["topk"].dead)
    assert mean("dead", "noise") < mean("dead", "topk")

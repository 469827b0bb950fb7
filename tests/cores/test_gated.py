import pytest
import torch
from synthetic import batch_of, flat, scores, train
from torch.testing import assert_close

from mmsae.cores import Gated, ReLU
from mmsae.errors import MmsaeError

D, M = 10, 24
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


def core_with_biases(d_latent=M, shift=0.0, **arguments):
    torch.manual_seed(3)
    core = Gated(D, d_latent, l1_coefficient=3.0, **arguments).train()
    with torch.no_grad():
        for parameter in (core.b_enc, core.b_dec, core.b_mag, core.r_mag):
            parameter.normal_(0, 0.3)
        core.W_enc /= core.W_enc.norm(dim=-1, keepdim=True)
        core.b_enc += shift
        core.b_mag.normal_(shift, 1)
    return core


def slow(core, x):
    """Codes and gate from the formulas."""
    product = (x - core.b_dec) @ core.W_enc.T
    gate = product + core.b_enc
    return (gate > 0) * (product * core.r_mag.exp() + core.b_mag).relu(), gate.relu()


@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize(("shift", "dense"), [(0.0, True), (-3.5, False)], ids=["dense", "pairs"])
def test_losses_and_gradients_are_those_of_the_formulas(norm, shift, dense):
    core = core_with_biases(300, shift, decoder_norm=norm)
    x = 3 * X if dense else 1.5 * X
    assert core.encode(x).is_dense == dense
    codes, gate = slow(core, x)
    assert 0 < (codes > 0).sum() < (gate > 0).sum()
    norms = core.W_dec.norm(dim=-1) if norm == "free" else torch.ones(300)
    want = {
        "reconstruction": (x - codes @ core.W_dec - core.b_dec).pow(2).sum(-1).mean(),
        "sparsity": 3 * (gate * norms).sum(-1).mean(),
        "gate": (x - gate @ core.W_dec.detach() - core.b_dec.detach()).pow(2).sum(-1).mean(),
    }
    losses = core.losses(batch_of(x))
    assert_close(losses.terms, want)
    assert_close(losses.codes.dense(), codes)
    parameters = list(core.parameters())
    for name in want:
        mine = torch.autograd.grad(losses.terms[name], parameters, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(want[name], parameters, retain_graph=True, allow_unused=True)
        for got, other in zip(mine, theirs, strict=True):
            zero = torch.zeros(())
            assert_close(*torch.broadcast_tensors(zero if got is None else got, zero if other is None else other),
                         rtol=1e-3, atol=1e-4)  # fmt: skip


def test_the_step_has_no_gradient_so_the_gate_learns_from_its_own_terms():
    core = core_with_biases()
    core.losses(batch_of(X)).terms["reconstruction"].backward()
    assert core.b_enc.grad is None or core.b_enc.grad.abs().max() == 0
    core.zero_grad()
    terms = core.losses(batch_of(X)).terms
    terms["gate"].backward()
    assert core.b_enc.grad.abs().max() > 0
    assert core.W_dec.grad is None or core.W_dec.grad.abs().max() == 0


def test_bad_settings_are_refused():
    with pytest.raises(MmsaeError, match="l1_coefficient=-1"):
        Gated(D, M, l1_coefficient=-1)


@pytest.mark.slow
def test_t1_gated_does_not_shrink():
    """Acceptance test T1 for Gated; one path for gate and magnitude, which is ReLU with L1, is the ablation."""
    torch.set_num_threads(1)
    makers = {
        "Gated": lambda: Gated(40, 64),
        "L1": lambda: ReLU(40, 64, l1_coefficient=0.05),
        "L1, unit decoder": lambda: ReLU(40, 64, l1_coefficient=0.05, decoder_norm="unit"),
    }
    seen = {name: [] for name in makers}
    for seed in (0, 1, 2):
        data = flat(64, 40, 4, seed=seed)
        pool, held = data.rows(30_000, 100 + seed), data.rows(20_000, 200 + seed)
        for name, make in makers.items():
            torch.manual_seed(300 + seed)
            core = train(make(), pool, 2500, 256, 400 + seed, target_l0=4.0, coefficient="l1_coefficient")
            seen[name].append(scores(core.eval(), held, data.features))
    for name, values in seen.items():
        print(name, *values, sep="\n  ")
    for other in ("L1", "L1, unit decoder"):
        # for the mean over the seeds, and for all seeds but one
        assert sum(s.fvu for s in seen["Gated"]) <= 0.6 * sum(s.fvu for s in seen[other])
        assert sum(a.fvu <= 0.6 * b.fvu for a, b in zip(seen["Gated"], seen[other], strict=True)) >= 2
        assert max(s.shrink for s in seen[other]) < 0.75
    assert min(s.shrink for s in seen["Gated"]) > 0.75
    assert sum(s.found >= 0.85 for s in seen["Gated"]) >= 2
    assert all(abs(s.l0 - 4) < 0.6 for values in seen.values() for s in values)

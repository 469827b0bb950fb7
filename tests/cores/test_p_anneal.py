import pytest
import torch
from synthetic import batch_of, flat, scores, train
from torch.testing import assert_close

from mmsae.codes import Codes
from mmsae.cores import PAnneal, ReLU
from mmsae.errors import MmsaeError

D, M = 10, 24
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


def test_p_falls_in_equal_steps_between_start_and_end():
    core = PAnneal(D, M, anneal_start=100, anneal_end=1000)
    assert [core.p_after(step) for step in (1, 100, 199)] == [1, 1, 1]
    values = sorted({round(core.p_after(step), 9) for step in range(2000)}, reverse=True)
    assert values == pytest.approx([*(1 - j / 9 for j in range(9)), 0.1])
    assert core.p_after(200) == pytest.approx(8 / 9)
    assert core.p_after(999) == pytest.approx(1 / 9)
    assert PAnneal(D, M, p_end=0.5).p_after(10**6) == 0.5


@pytest.mark.parametrize("p", [1.0, 0.5, 0.1])
def test_price_is_the_sum_of_powers_and_has_finite_gradients(p):
    core = PAnneal(D, M, sparsity_coefficient=2.0)
    core.p.fill_(p)
    core.factor.fill_(3.0)
    codes = core.encode(X).dense().detach().double()
    price = core.losses(batch_of(X)).terms["sparsity"]
    assert float(price.detach()) == pytest.approx(6 * float((codes[codes > 0] ** p).sum()) / len(X), rel=1e-4)
    price.backward()
    assert torch.isfinite(core.W_enc.grad).all()
    assert core.W_enc.grad.abs().max() > 0


def test_the_price_stays_what_it_was_when_p_changes():
    core = PAnneal(D, M, anneal_start=10, anneal_end=110, n_updates=6)
    codes = core.encode(X).detach()
    prices = []
    for step in range(1, 130):
        core.after_step(step, codes)
        prices.append(float(core.losses(batch_of(X)).terms["sparsity"].detach()))
    assert core.p == pytest.approx(0.1)
    assert core.factor != 1
    assert prices == pytest.approx([prices[0]] * len(prices), rel=1e-3)


def test_a_dictionary_in_which_nothing_fires_survives_the_updates():
    core = PAnneal(D, M, anneal_start=10, anneal_end=110, n_updates=6)
    for step in range(1, 130):
        core.after_step(step, Codes(torch.zeros(4, M), None, M))
    assert core.factor == 1


def test_ranks_with_different_rows_keep_the_same_factor():
    def run(core, codes):
        for step in range(1, 40):
            for rank, own in zip(core, codes, strict=True):
                rank.after_step(step, own)
            joined = torch.stack([rank.recent for rank in core]).mean(0)
            for rank in core:
                rank.recent.copy_(joined)
        return [rank.factor for rank in core]

    def make():
        torch.manual_seed(0)
        return PAnneal(D, M, anneal_start=10, anneal_end=110, n_updates=6)

    codes = make().encode(X).detach()
    alone = run([make()], [codes])
    apart = run([make(), make()], [codes[:25], codes[25:]])
    assert alone[0] != 1
    assert_close(apart[0], alone[0])
    assert_close(apart[1], alone[0])


@pytest.mark.parametrize("wrong", [{"anneal_end": 15_080}, {"p_end": 1.5}, {"n_updates": 1}], ids=str)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(MmsaeError, match=next(iter(wrong))):
        PAnneal(D, M, **wrong)


@pytest.mark.slow
def test_t1_annealing_beats_l1_at_the_same_l0():
    """Acceptance test T1 for p-annealing; p fixed at 1 is the ablation."""
    torch.set_num_threads(1)
    makers = {
        "PAnneal": (lambda: PAnneal(40, 64, anneal_start=500, anneal_end=2500), "sparsity_coefficient"),
        "p = 1": (lambda: PAnneal(40, 64, anneal_start=500, anneal_end=2500, p_end=1.0), "sparsity_coefficient"),
        "L1": (lambda: ReLU(40, 64, l1_coefficient=0.05), "l1_coefficient"),
    }
    seen = {name: [] for name in makers}
    for seed in (0, 1, 2):
        data = flat(64, 40, 4, seed=seed)
        pool, held = data.rows(30_000, 100 + seed), data.rows(20_000, 200 + seed)
        for name, (make, coefficient) in makers.items():
            torch.manual_seed(300 + seed)
            core = train(make(), pool, 2500, 256, 400 + seed, target_l0=4.0, coefficient=coefficient)
            seen[name].append(scores(core.eval(), held, data.features))
    for name, values in seen.items():
        print(name, *values, sep="\n  ")
    for other in ("L1", "p = 1"):
        # for the mean over the seeds, and for all seeds but one
        assert sum(s.fvu for s in seen["PAnneal"]) <= 0.85 * sum(s.fvu for s in seen[other])
        assert sum(a.fvu <= 0.85 * b.fvu for a, b in zip(seen["PAnneal"], seen[other], strict=True)) >= 2
    assert sum(s.found >= 0.85 for s in seen["PAnneal"]) >= 2

import numpy as np
import pytest
import torch
from synthetic import batch_of, scores, train, zipf
from torch.testing import assert_close

from mmsae.cores import BatchTopK, FeatureChoice, TopK
from mmsae.cores.feature_choice import zipf_shares
from mmsae.errors import MmsaeError

D, M = 10, 24
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


def chooser(**arguments):
    torch.manual_seed(3)
    core = FeatureChoice(D, M, **{"k": 3, "warmup_rows": 0, "dead_after": 100, **arguments}).train()
    with torch.no_grad():
        core.b_dec.fill_(0.3)
        core.b_enc.normal_(0, 0.1)
    core.density.copy_(torch.rand(M, dtype=torch.float64))
    return core


def test_each_latent_keeps_its_best_rows():
    core = chooser()
    budgets = core.budgets(len(X))
    assert budgets.sum() == 3 * len(X)
    assert budgets[0] > 2 * budgets[-1] > 0
    pre, got = core.pre_activations(X).detach(), core.encode(X).dense().detach()
    want = torch.zeros_like(pre)
    for rank, latent in enumerate(core.density.argsort(descending=True).tolist()):
        best = pre[:, latent].argsort(descending=True)[: budgets[rank]]
        want[best, latent] = pre[best, latent].relu()
    assert_close(got, want)


def test_gradients_are_those_of_the_dense_formula():
    core = chooser()
    mine = torch.autograd.grad(core(X).pow(2).sum(), list(core.parameters()))
    kept = core.encode(X).dense().detach() != 0
    dense = (((X - core.b_dec) @ core.W_enc.T + core.b_enc) * kept) @ core.W_dec + core.b_dec
    for got, want in zip(mine, torch.autograd.grad(dense.pow(2).sum(), list(core.parameters())), strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_leading_dimensions_change_nothing():
    core = chooser()
    assert_close(core.encode(X.view(5, 10, D)).dense(), core.encode(X).dense().view(5, 10, M))


def test_shares_below_a_row_per_batch_are_given_on_average():
    core = chooser(k=1)
    total = np.zeros(M)
    for _ in range(400):
        budgets = core.budgets(7)
        assert budgets.sum() == 7
        total += budgets
        core.rows_seen += 7
    assert (core.shares[-1] * 7) < 1
    assert np.abs(total / 400 - core.shares.numpy() * 7).max() < 0.02


@pytest.mark.parametrize(
    ("n", "k", "exponent", "offset"), [(24, 3, 1, 5), (24, 20, 2, 0), (10, 10, 1, 5), (9, 2, 0, 5)]
)
def test_shares_follow_the_law_and_never_exceed_every_row(n, k, exponent, offset):
    shares = zipf_shares(n, k, exponent, offset)
    assert shares.sum() == pytest.approx(k)
    assert shares.max() <= 1
    law = (np.arange(1, n + 1) + offset) ** -float(exponent)
    free = shares < 1 - 1e-9
    assert np.ptp((shares / law)[free]) < 1e-9 if free.any() else k == n


def test_training_begins_with_mutual_choice():
    core, plain = chooser(warmup_rows=51), BatchTopK(D, M, k=3)
    plain.load_state_dict(core.state_dict(), strict=False)
    assert_close(core.encode(X).dense(), plain.encode(X).dense(), rtol=0, atol=0)
    core.count(torch.ones(M), 51)
    assert (core.encode(X).dense() - plain.encode(X).dense()).abs().max() > 0.1


def test_thresholds_are_the_running_means_of_the_smallest_kept():
    core = chooser(threshold_decay=0.9)
    codes = core.encode(X).dense()
    core.after_step(1, core.encode(X).detach())
    least = torch.where(codes > 0, codes, torch.inf).amin(0)
    assert_close(core.thresholds.float(), least)
    core.after_step(2, core.encode(2 * X).detach())
    other = core.encode(2 * X).dense()
    want = (0.09 * least + 0.1 * torch.where(other > 0, other, torch.inf).amin(0)) / 0.19
    both = (codes > 0).any(0) & (other > 0).any(0)
    assert both.any()
    assert_close(core.thresholds.float()[both], want[both])


def test_unset_thresholds_are_an_error_and_a_latent_that_never_fired_stays_silent():
    core = chooser().eval()
    with pytest.raises(MmsaeError, match="no inference thresholds"):
        core.encode(X)
    core.smallest[:, 1] = 0.5  # the threshold of latent 1 is 1, all others have none
    fired = core.encode(3 * X).dense() > 0
    assert fired[:, 1].any()
    assert not fired[:, 2:].any()


def test_two_ranks_average_to_the_thresholds_of_both():
    """A latent that fired on one rank only must not be averaged with a marker for 'never'."""
    ranks = [chooser(), chooser()]
    for rank, core in enumerate(ranks):
        codes = core.encode(X).detach()
        codes.values *= (codes.indices % 2 == rank) * (rank + 1)
        core.after_step(1, codes)
    joined = (ranks[0].smallest + ranks[1].smallest) / 2
    known = [core.thresholds for core in ranks]
    ranks[0].smallest.copy_(joined)
    for latent in range(M):
        assert ranks[0].thresholds[latent] == known[latent % 2][latent]


def test_aux_zipf_teaches_latents_that_fire_less_than_their_share():
    core = chooser()
    core.density.copy_(core.shares)  # as the law says
    assert len(core.idle_latents()) == 0
    core.density[20:] = 0.2 * core.shares[20:]
    assert core.idle_latents().tolist() == [20, 21, 22, 23]
    core.rows_since_fired[2] = 100
    assert core.idle_latents().tolist() == [2, 20, 21, 22, 23]
    core.losses(batch_of(X)).terms["aux"].backward()
    assert (core.W_enc.grad[core.idle_latents()].abs().amax(-1) > 0).any()
    assert core.W_enc.grad[:2].abs().max() == 0
    off = chooser(underused=0.0)
    off.density.copy_(core.density)
    assert len(off.idle_latents()) == 0


@pytest.mark.parametrize("wrong", [{"zipf_offset": -1}, {"underused": 2}, {"k": 30}, {"warmup_rows": -1}], ids=str)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(MmsaeError, match=next(iter(wrong))):
        FeatureChoice(D, M, **{"k": 3, **wrong})


@pytest.mark.slow
def test_t3_no_latent_dies_and_the_zipf_law_is_what_reconstructs():
    """Acceptance test T3: Zipf features, a quarter more latents than features. Ablation: the same share for all."""
    torch.set_num_threads(1)
    makers = {
        "TopK": lambda: TopK(40, 128, k=3, dead_after=20 * 256),
        "MutualChoice": lambda: BatchTopK(40, 128, k=3, dead_after=20 * 256),
        "FeatureChoice": lambda: FeatureChoice(40, 128, k=3, warmup_rows=150 * 256, dead_after=20 * 256),
        "uniform": lambda: FeatureChoice(40, 128, k=3, zipf_exponent=0, warmup_rows=150 * 256, dead_after=20 * 256),
    }
    seen = {name: [] for name in makers}
    in_training = []
    for seed in (0, 1, 2):
        data = zipf(96, 40, 3, seed=seed)
        pool, held = data.rows(30_000, 100 + seed), data.rows(20_000, 200 + seed)
        for name, make in makers.items():
            torch.manual_seed(300 + seed)
            core = train(make(), pool, 1500, 256, seed=400 + seed)
            seen[name].append(scores(core.eval(), held, data.features))
            if name == "FeatureChoice":
                in_training.append(scores(core, held[:256], data.features, mode="train"))
    for name, values in [*seen.items(), ("FeatureChoice in batches", in_training)]:
        print(name, *values, sep="\n  ")

    def gate(high, low, factor=1.0):
        """For the mean over the seeds, and for all seeds but one."""
        high, low = [s.fvu for s in seen[high]], [s.fvu for s in seen[low]]
        assert sum(low) < factor * sum(high)
        assert sum(a < factor * b for a, b in zip(low, high, strict=True)) >= 2

    assert all(s.dead == 0 for s in seen["FeatureChoice"])
    assert sum(s.dead for s in seen["TopK"]) > 0  # so that there was something to keep alive
    gate("TopK", "FeatureChoice")
    gate("uniform", "FeatureChoice", 0.5)
    gate("TopK", "MutualChoice")

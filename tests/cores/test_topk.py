import pytest
import torch
from synthetic import batch_of, scores, train, zipf
from torch.testing import assert_close

from mmsae.cores import TopK
from mmsae.errors import MmsaeError

D, M = 10, 24
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


def core_with_dead(n_dead, **arguments):
    torch.manual_seed(3)
    core = TopK(D, M, k=3, dead_after=100, **arguments).train()
    with torch.no_grad():
        core.b_dec.fill_(0.3)
        core.b_enc.normal_(0, 0.1)
    core.rows_since_fired[:n_dead] = 100
    return core


def slow_auxk(core, x, target):
    """AuxK written from its formula, row by row: the residual explained by the best dead latents, without b_dec."""
    core.requires_grad_(False)
    pre = (x - core.b_dec) @ core.W_enc.T + core.b_enc
    residual = target - core(x)
    dead = [i for i in range(core.d_latent) if core.rows_since_fired[i] >= core.dead_after]
    k_aux = min(core.k_aux or core.spec.d_out // 2, len(dead))
    error = 0.0
    for row in range(len(x)):
        best = sorted(dead, key=lambda i: -float(pre[row, i]))[:k_aux]
        explained = sum(max(float(pre[row, i]), 0.0) * core.W_dec[i] for i in best)
        error += float((residual[row] - explained).pow(2).sum())
    spread = float((residual - residual.mean(0)).pow(2).sum())
    return error / spread


@pytest.mark.parametrize("k_aux", [None, 2, 100])
def test_auxk_equals_the_formula(k_aux):
    core = core_with_dead(12, k_aux=k_aux)
    aux = core.losses(batch_of(X)).terms["aux"]
    assert float(aux.detach()) == pytest.approx(slow_auxk(core, X, X) / 32, rel=1e-4)


def test_auxk_target_is_detached_and_the_encoder_of_dead_latents_learns():
    core = core_with_dead(12)
    core.losses(batch_of(X)).terms["aux"].backward()
    assert core.W_enc.grad[:12].abs().max() > 0
    assert core.b_enc.grad[:12].abs().max() > 0
    assert core.W_dec.grad[:12].abs().max() > 0
    # through the residual the living would learn too
    assert core.W_enc.grad[12:].abs().max() == 0
    assert core.W_dec.grad[12:].abs().max() == 0
    # b_dec takes part only as what is subtracted from the input, not as a part of the explanation
    assert_close(core.b_dec.grad, -(core.b_enc.grad @ core.W_enc))


def test_auxk_is_silent_without_dead_latents_and_in_eval():
    core = core_with_dead(0)
    assert core.losses(batch_of(X)).terms["aux"] == 0
    assert "aux" not in core_with_dead(5).eval().losses(batch_of(X)).terms
    assert "aux" not in core_with_dead(5, aux_coefficient=0).losses(batch_of(X)).terms


@pytest.mark.parametrize("x", [X[:1], X[:1].expand(7, D), torch.zeros(4, D)], ids=["one row", "equal rows", "zeros"])
def test_auxk_of_a_residual_without_variance_has_no_nan_gradient(x):
    """A batch of one row used to turn all weights into NaN once a latent was dead."""
    core = core_with_dead(12)
    terms = core.losses(batch_of(x)).terms
    assert terms["aux"] == 0
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in core.parameters())


@pytest.mark.parametrize("scale", [1e-2, 100.0])
def test_losses_do_not_depend_on_the_scale_of_the_data(scale):
    torch.manual_seed(0)
    one, other = core_with_dead(12), core_with_dead(12)
    with torch.no_grad():
        other.load_state_dict(one.state_dict())
        one.start(batch_of(X))
        other.start(batch_of(X * scale))
        other.b_enc *= scale
    terms, scaled = one.losses(batch_of(X)).terms, other.losses(batch_of(X * scale)).terms
    for name in terms:
        assert_close(scaled[name], terms[name], rtol=1e-3, atol=1e-5)  # the median stops at a relative step of 1e-5


def test_exactly_k_are_kept_when_all_pre_activations_tie():
    core = TopK(D, M, k=5)
    with torch.no_grad():
        core.W_enc.zero_()
        core.b_enc.fill_(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (core.encode(X).l0() == 5).all()


def test_kept_values_are_not_negative():
    core = TopK(D, M, k=20)
    values = core.encode(X).values
    assert (values >= 0).all()
    assert (core.encode(X).l0() < 20).any()


def test_dead_latents_are_counted_in_rows():
    core = TopK(D, M, k=1, dead_after=3)
    core.count(torch.ones(M, dtype=torch.int64), 5)
    fired = torch.zeros(M, dtype=torch.int64)
    fired[0] = 1
    core.count(fired, 2)
    core.count(fired, 2)
    assert core.rows_since_fired.tolist() == [0] + [4] * (M - 1)
    assert core.rows_seen == 9


def test_start_is_the_geometric_median_which_outliers_do_not_move():
    x = torch.cat([X, torch.full((5, D), 1e4)])
    core = TopK(D, M, k=3)
    core.start(batch_of(x))
    assert (core.b_dec - X.mean(0)).norm() < 0.5 < (x.mean(0) - X.mean(0)).norm()
    assert float(core.variance) == pytest.approx(float(x.var(0, correction=0).sum()), rel=1e-4)


def test_k_above_the_dictionary_is_refused():
    with pytest.raises(MmsaeError, match="k=30 is larger than d_latent=24"):
        TopK(D, M, k=30)


@pytest.mark.slow
def test_t2_auxk_revives_dead_latents():
    """Acceptance test T2: Zipf features, more latents than features, an offset."""
    torch.set_num_threads(1)
    seen = {}
    for seed in (0, 1):
        data = zipf(192, 64, 4, seed=seed)
        pool, held = data.rows(40_000, 100 + seed), data.rows(20_000, 200 + seed)
        for aux in (0.0, 1 / 32):
            torch.manual_seed(300 + seed)
            core = TopK(64, 256, k=4, aux_coefficient=aux, dead_after=20 * 512)
            train(core, pool, 2500, 512, seed=400 + seed)
            seen[seed, aux > 0] = scores(core.eval(), held, data.features)
    print(*seen.items(), sep="\n")
    plain, revived = ([seen[seed, aux] for seed in (0, 1)] for aux in (False, True))
    # a gate holds for the mean over the seeds and for all seeds but one
    assert sum(s.dead for s in revived) <= 0.7 * sum(s.dead for s in plain)
    assert any(a.dead <= 0.7 * b.dead for a, b in zip(revived, plain, strict=True))
    assert all(s.found >= 0.97 for s in revived)


def test_dead_latents_are_looked_up_without_waiting_for_an_accelerator_before_any_can_be_dead():
    core = TopK(D, M, k=3, dead_after=100).to("meta")  # where looking at values is an error
    core.rows_counted = 99
    assert core.dead_latents(core.dead_after).shape == (0,)


def test_dead_latents_are_known_after_loading_and_counting():
    core = TopK(D, M, k=3, dead_after=100)
    core.rows_seen.fill_(90)
    core.rows_since_fired[4] = 95
    core.count(torch.ones(M).index_fill(0, torch.tensor([4]), 0), 10)
    assert core.rows_counted == 100
    assert core.dead_latents(100).tolist() == [4]

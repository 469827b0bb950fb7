import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmsae.kernels import cpu, linear_above, linear_batch_topk, linear_topk, pairs
from mmsae.kernels.precision import linear


def problem(rows, d, m, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    return make(rows, d), make(m, d), make(m), make(d)


def matrix(x, table, bias, centre):
    return (x - centre) @ table.T + bias


def dense(values, indices, m):
    return values.new_zeros(*values.shape[:-1], m).scatter_add(-1, indices, values)


# ---- the k largest of each row


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    m=st.sampled_from([5, 16, 100, 160, 512, 520]),
    k=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    signed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_topk_keeps_what_a_sort_keeps(rows, m, k, dtype, signed, seed):
    x, table, bias, centre = problem(rows, 7, m, seed, dtype)
    values, indices = linear_topk(x, table, bias, k, centre, signed)
    scores = matrix(x, table, bias, centre)
    assert values.shape == indices.shape == (rows, k)
    assert all(len(set(row.tolist())) == k for row in indices)
    assert_close(values, scores.gather(1, indices))
    order = scores.abs() if signed else scores.relu()
    got = values.abs() if signed else values.relu()
    assert_close(got.sort(descending=True).values, order.topk(k).values)


def test_topk_without_bias_and_centre_and_with_leading_dimensions():
    x, table, _, _ = problem(12, 7, 64)
    values, indices = linear_topk(x.view(3, 4, 7), table, None, 4)
    assert values.shape == indices.shape == (3, 4, 4)
    assert_close(values.sort().values, (x @ table.T).topk(4).values.view(3, 4, 4).sort().values)


def test_topk_selects_by_index_so_that_ties_do_not_raise_the_l0():
    values, indices = linear_topk(torch.ones(4, 3), torch.ones(160, 3), None, 7)
    assert values.shape == (4, 7)
    assert all(len(set(row.tolist())) == 7 for row in indices)


@pytest.mark.parametrize("signed", [False, True])
def test_topk_has_the_gradients_of_the_dense_formula(signed):
    """Of x, encoder, bias and centre: what other libraries got wrong is that of the centre, and of zeros."""
    problem_ = problem(9, 6, 40)
    values, indices = linear_topk(*problem_[:3], 5, problem_[3], signed)
    weights = torch.randn(9, 40, dtype=torch.float64)
    (values.relu() * weights.gather(1, indices)).sum().backward()
    mine = [t.grad for t in problem_]
    for t in problem_:
        t.grad = None
    scores = matrix(*problem_)
    kept = torch.zeros_like(scores).scatter_(1, (scores.abs() if signed else scores).topk(5).indices, 1.0)
    ((scores * kept).relu() * weights).sum().backward()
    for got, want in zip(mine, [t.grad for t in problem_], strict=True):
        assert_close(got, want)


def test_topk_passes_gradcheck():
    torch.manual_seed(0)
    problem_ = problem(4, 3, 12)
    assert torch.autograd.gradcheck(lambda x, w, b, c: linear_topk(x, w, b, 3, c)[0], problem_)


def test_gradient_of_the_centre_alone_is_the_matrix_times_vector():
    x, table, bias, centre = problem(9, 6, 40)
    linear_topk(x.detach(), table, bias, 5, centre)[0].sum().backward()
    want = centre.grad.clone()
    centre.grad = None
    linear_topk(x, table, bias, 5, centre)[0].sum().backward()
    assert_close(want, centre.grad)


# ---- in low precision


def test_low_precision_chooses_nearly_the_same_and_computes_exactly():
    x, table, bias, centre = problem(300, 64, 1024, dtype=torch.float32)
    scores = matrix(x, table, bias, centre).detach()
    want = torch.zeros_like(scores).scatter_(1, scores.topk(16).indices, 1.0)
    recall = {}
    for spare in (0, None):
        with torch.autocast("cpu", torch.bfloat16):
            values, indices = linear_topk(x, table, bias, 16, centre, spare=spare)
        assert values.dtype == torch.float32
        assert_close(values, scores.gather(1, indices), rtol=1e-5, atol=1e-4)
        recall[spare] = float(want.gather(1, indices).mean())
    assert recall[0] > 0.95
    assert recall[None] > 0.999


def test_low_precision_gradients_are_those_of_the_latents_chosen():
    problem_ = problem(30, 16, 160, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values, indices = linear_topk(*problem_[:3], 4, problem_[3])
    weights = torch.randn(30, 4)
    got = torch.autograd.grad((values * weights).sum(), problem_)
    want = torch.autograd.grad((matrix(*problem_).gather(1, indices) * weights).sum(), problem_)
    for mine, exact in zip(got, want, strict=True):
        assert_close(mine, exact, rtol=1e-4, atol=1e-4)


# ---- the largest of a batch


def identity(scores):
    """Scores as a linear map, so that they can be chosen freely."""
    return scores, torch.eye(scores.shape[-1], dtype=scores.dtype)


def check_batch(scores, budget):
    values, indices = linear_batch_topk(*identity(scores), None, budget)
    assert values.shape == indices.shape
    assert values.shape[:-1] == scores.shape[:-1]
    kept = values != 0
    for row, used in zip(indices.flatten(0, -2), kept.flatten(0, -2), strict=True):
        assert len(set(row[used].tolist())) == int(used.sum())  # no latent twice
    assert_close(values[kept], scores.gather(-1, indices)[kept])
    want = scores.flatten().sort(descending=True).values[:budget]
    assert_close(values[kept].sort(descending=True).values, want[want > 0])


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 6),
    d=st.integers(1, 40),
    budget=st.integers(1, 60),
    levels=st.integers(1, 8),
    seed=st.integers(0, 10**6),
)
def test_batch_topk_keeps_what_a_global_sort_keeps(rows, d, budget, levels, seed):
    """Few levels make many ties."""
    g = torch.Generator().manual_seed(seed)
    check_batch(torch.randint(-1, levels + 1, (rows, d), generator=g).float(), budget)


def test_batch_topk_finds_a_row_that_takes_the_whole_budget():
    scores = torch.rand(16, 64)
    scores[3] += 10  # k = 3 per row gives 6 candidates, but row 3 deserves 48
    check_batch(scores, 48)
    values, _ = linear_batch_topk(*identity(scores), None, 48)
    assert int((values[3] != 0).sum()) == 48


def test_batch_topk_multiplies_matrices_of_few_sizes(monkeypatch):
    """For each size oneDNN compiles and keeps a product: a long training grew by hundreds of megabytes."""
    sizes = set()
    monkeypatch.setattr(cpu, "linear", lambda x, *rest: sizes.add(len(x)) or linear(x, *rest))
    for seed in range(12):
        scores = torch.rand(256, 64, generator=torch.Generator().manual_seed(seed))
        scores[: 1 + 5 * seed] += 1  # this many rows ask for more candidates
        check_batch(scores, 256 * 4)
    assert len(sizes) <= 2


def test_batch_topk_is_as_narrow_as_its_fullest_row():
    scores = torch.rand(64, 256, generator=torch.Generator().manual_seed(0))
    values, _ = linear_batch_topk(*identity(scores), None, 64 * 8)
    assert values.shape[-1] == int((values != 0).sum(-1).max())


def test_batch_topk_never_exceeds_its_budget_when_all_scores_tie():
    values, _ = linear_batch_topk(*identity(torch.ones(8, 32)), None, 24)
    assert int((values != 0).sum()) == 24


def test_batch_topk_with_leading_dimensions_and_a_budget_above_the_matrix():
    check_batch(torch.rand(2, 3, 10), 12)
    check_batch(torch.rand(2, 3, 10), 1000)


def test_batch_topk_of_scores_that_are_not_positive_keeps_nothing():
    values, _ = linear_batch_topk(*identity(-torch.rand(4, 32)), None, 8)
    assert not values.any()


def test_batch_topk_has_the_gradients_of_the_dense_formula():
    problem_ = problem(9, 6, 40)
    values, indices = linear_batch_topk(*problem_[:3], 30, problem_[3])
    weights = torch.randn(9, 40, dtype=torch.float64)
    got = torch.autograd.grad((dense(values, indices, 40) * weights).sum(), problem_)
    scores = matrix(*problem_)
    kept = torch.zeros(360, dtype=torch.float64).scatter_(0, scores.flatten().topk(30).indices, 1.0).view(9, 40)
    want = torch.autograd.grad((scores * kept * weights).sum(), problem_)
    for mine, exact in zip(got, want, strict=True):
        assert_close(mine, exact)


# ---- above a bound


@pytest.mark.parametrize("m", [40, 39])
@pytest.mark.parametrize("shape", [(9,), (3, 3)], ids=str)
def test_above_finds_every_entry_and_its_gradients(m, shape):
    problem_ = problem(9, 6, m)
    lower = torch.linspace(0, 3, m, dtype=torch.float64)
    x = problem_[0].view(*shape, 6)
    found = linear_above(x, *problem_[1:3], lower, problem_[3], densest=1.0)
    values, indices = found
    assert values.shape == indices.shape
    assert values.shape[:-1] == shape
    scores = matrix(*problem_)
    want = scores * (scores > lower)
    flat = dense(values, indices, m).view(9, m)
    assert_close(flat, want)
    got = torch.autograd.grad(flat.pow(3).sum(), problem_)
    for mine, exact in zip(got, torch.autograd.grad(want.pow(3).sum(), problem_), strict=True):
        assert_close(mine, exact)


def test_above_leaves_dense_batches_to_others_and_pads_as_told():
    x, table, bias, centre = problem(9, 6, 40)
    assert linear_above(x, table, bias, torch.zeros(40), centre) is None
    lower = torch.full((40,), 4.0)
    lower[:2] = -1e9  # two entries in every row, more in some
    values, indices = linear_above(x, table, bias, lower, centre, padding=-torch.inf, densest=1.0)
    assert values.isinf().any()
    assert (indices[values.isinf()] == 0).all()


def test_above_in_low_precision_misses_nothing():
    x, table, bias, centre = problem(300, 64, 1024, dtype=torch.float32)
    scores = matrix(x, table, bias, centre).detach()
    with torch.autocast("cpu", torch.bfloat16):
        values, indices = linear_above(x, table, bias, torch.full((1024,), 25.0), centre)
    found = dense(values.detach(), indices, 1024)
    assert found[scores > 25.2].ne(0).all()
    assert_close(found[found != 0], scores[found != 0], rtol=1e-5, atol=1e-4)


# ---- the memory of patterns


def test_a_pattern_is_made_once_and_goes_away_with_its_indices():
    x, table, bias, centre = problem(9, 6, 40)
    gc.collect()
    before = len(pairs._known)
    _, indices = linear_topk(x, table, bias, 5, centre)
    first = pairs.Pairs.of(indices, 40)
    assert pairs.Pairs.of(indices, 40) is first
    indices[0, 0] = (indices[0, 0] + 1) % 40
    assert pairs.Pairs.of(indices, 40) is not first  # changed in place
    with torch.inference_mode():
        codes = linear_topk(x, table, bias, 5, centre)
        assert pairs.Pairs.of(codes[1], 40) is pairs.Pairs.of(codes[1], 40)
    del indices, first, codes
    gc.collect()
    assert len(pairs._known) == before

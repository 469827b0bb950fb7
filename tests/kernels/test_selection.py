import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmsae.kernels import batch_topk, topk


def brute_force(scores, budget):
    """Sum and number of the entries that a global selection keeps."""
    return scores.flatten().sort(descending=True).values[:budget]


def check(scores, budget):
    values, indices = batch_topk(scores, budget)
    d = scores.shape[-1]
    flat, places = values.reshape(-1, values.shape[-1]), indices.reshape(-1, values.shape[-1])
    assert values.shape == indices.shape == (*scores.shape[:-1], values.shape[-1])
    for row in places:
        assert len(set(row.tolist())) == len(row)  # no latent twice
    kept = flat != 0
    assert_close(flat[kept], scores.reshape(-1, d).gather(1, places)[kept])
    want = brute_force(scores, budget)
    assert_close(flat[kept].sort(descending=True).values, want[want != 0])


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
    scores = torch.randint(0, levels + 1, (rows, d), generator=torch.Generator().manual_seed(seed)).float()
    check(scores, budget)


def test_batch_topk_doubles_its_candidates_when_one_row_takes_the_whole_budget():
    scores = torch.rand(16, 64)
    scores[3] += 10  # k = 3 per row gives 12 candidates, but row 3 deserves 48
    values, _ = batch_topk(scores, 48)
    check(scores, 48)
    assert values.shape[-1] == 64
    assert int((values[3] != 0).sum()) == 48


def test_batch_topk_needs_few_candidates_otherwise():
    scores = torch.rand(64, 256, generator=torch.Generator().manual_seed(0))
    assert batch_topk(scores, 64 * 8)[0].shape[-1] == 32


def test_batch_topk_never_exceeds_its_budget_when_all_scores_tie():
    values, _ = batch_topk(torch.ones(8, 32, dtype=torch.bfloat16), 24)
    assert int((values != 0).sum()) == 24


def test_batch_topk_with_leading_dimensions_and_a_budget_above_the_matrix():
    check(torch.rand(2, 3, 10), 12)
    check(torch.rand(2, 3, 10), 1000)


def test_batch_topk_passes_gradients_to_what_it_kept():
    scores = torch.rand(5, 20, requires_grad=True)
    values, indices = batch_topk(scores, 10)
    values.sum().backward()
    kept = torch.zeros(5, 20).scatter_add(1, indices, (values != 0).float())
    assert_close(scores.grad, kept)
    assert kept.sum() == 10


def test_topk_selects_by_index_so_that_ties_do_not_raise_the_l0():
    values, indices = topk(torch.ones(4, 100, dtype=torch.bfloat16), 7)
    assert values.shape == indices.shape == (4, 7)
    assert all(len(set(row.tolist())) == 7 for row in indices)

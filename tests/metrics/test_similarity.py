import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mmsae.metrics.similarity import best_cosine, canonical, components, matched_cosine, svcca

G = torch.Generator().manual_seed(0)
ROWS = torch.randn(1500, 8, generator=G)  # more than are compared at a time


def test_the_same_latents_in_another_order_and_size_are_the_same():
    other = ROWS[torch.randperm(1500, generator=G)] * (0.5 + torch.rand(1500, 1, generator=G))
    assert best_cosine(ROWS, other) == pytest.approx(1, abs=1e-6)
    assert matched_cosine(ROWS, other) == pytest.approx(1, abs=1e-6)


def test_opposite_directions_are_the_same_only_for_signed_codes():
    axes = torch.eye(8)
    assert matched_cosine(axes, -axes, signed=True) == 1
    assert matched_cosine(axes, -axes) == 0  # each takes an orthogonal partner instead of its opposite
    assert best_cosine(axes, -axes, signed=True) == 1


def test_best_looks_both_ways_and_matched_gives_a_partner_once():
    one, other = torch.eye(4)[:2], torch.eye(4)
    assert best_cosine(one, other) == pytest.approx((1 + 0.5) / 2)  # half of the second have nobody
    assert matched_cosine(one, other) == 1
    doubled = torch.stack([torch.eye(4)[0]] * 2)
    assert best_cosine(doubled, torch.eye(4)[:2]) == pytest.approx((1 + 0.5) / 2)
    assert matched_cosine(doubled, torch.eye(4)[:2]) == 0.5


@pytest.mark.parametrize("signed", [False, True])
def test_cosines_by_their_definition(signed):
    one, other = ROWS[:1100], ROWS[1100:] + 0.1
    cosines = torch.nn.functional.cosine_similarity(one[:, None], other[None], dim=-1)
    cosines = cosines.abs() if signed else cosines
    want = (cosines.max(1).values.mean() + cosines.max(0).values.mean()) / 2
    assert best_cosine(one, other, signed) == pytest.approx(float(want), abs=1e-5)
    i, j = linear_sum_assignment(-cosines.numpy())
    assert matched_cosine(one, other, signed) == pytest.approx(float(cosines[i, j].mean()), abs=1e-5)


def test_rows_of_zeros_are_no_latents():
    padded = torch.cat([ROWS[:20], torch.zeros(30, 8)])
    assert best_cosine(padded, ROWS[:20]) == pytest.approx(1, abs=1e-6)
    assert matched_cosine(padded, ROWS[:20]) == pytest.approx(1, abs=1e-6)


def test_components_once_for_many_pairs_give_svcca():
    x, y = ROWS[:, :5], ROWS[:, 3:] @ torch.randn(5, 5, generator=G)
    assert canonical(components(x), components(y)) == svcca(x, y)
    thin = components(torch.cat([x[:, :1], 1e-4 * x[:, 1:]], 1))
    assert thin.shape[1] == 1  # one direction holds 99 % of the variance

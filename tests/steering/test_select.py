"""Which latents are chosen, what a strength of 1 is worth, and what a choice is compared with."""

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.latents import LatentStore
from mmsae.steering import (
    difference_in_means,
    frequency_difference,
    matched_random,
    mean_difference,
    means,
    nearest,
    probe_direction,
    quantiles,
    random_direction,
)

M, SAMPLES, ROWS = 40, 60, 4


def store(seed=0):
    """Latent 7 fires with the first half of the samples, 9 everywhere and stronger there, 11 never."""
    draw = np.random.default_rng(seed)
    dense = draw.exponential(size=(SAMPLES * ROWS, M)) * (draw.random((SAMPLES * ROWS, M)) < 0.1)
    sample = np.repeat(np.arange(SAMPLES), ROWS)
    dense[:, 7] = (sample < SAMPLES // 2) * (1 + draw.random(len(sample)))
    dense[:, 9] = 1 + (sample < SAMPLES // 2) * 0.5 + 0.2 * draw.random(len(sample))
    dense[:, 11] = 0
    dense[:, 20:24] = draw.exponential(size=(len(sample), 4))  # always active
    found = sparse.csc_matrix(dense.astype(np.float32))
    return LatentStore(found.indptr, found.indices, found.data, {"sample_id": sample}, len(sample)), dense


LATENTS, DENSE = store()
FIRST = np.arange(SAMPLES) < SAMPLES // 2


def test_units_are_quantiles_of_what_is_not_zero():
    found = quantiles(LATENTS, 0.9)
    for latent in (3, 7, 21):
        live = DENSE[:, latent][DENSE[:, latent] != 0]
        assert_close(found[latent].item(), float(np.quantile(live, 0.9)), atol=1e-5, rtol=1e-5)
    assert found[11] == 0


def test_means():
    assert_close(means(LATENTS), torch.tensor(DENSE.mean(0), dtype=torch.float32), atol=1e-5, rtol=1e-5)
    some = np.arange(SAMPLES * ROWS) % 3 == 0
    assert_close(means(LATENTS, some), torch.tensor(DENSE[some].mean(0), dtype=torch.float32), atol=1e-5, rtol=1e-5)


def test_what_tells_two_groups_apart_is_found_and_survives_the_choice_among_all():
    by_mean = mean_difference(LATENTS, FIRST, n=3)
    assert set(by_mean.ids[:2].tolist()) == {7, 9}
    assert (by_mean.pvalue[:2] < 1e-6).all()
    assert by_mean.pvalue[2] > 0.05
    by_frequency = frequency_difference(LATENTS, FIRST, n=3, min_effect=0.5)
    assert by_frequency.ids.tolist() == [7], "9 fires everywhere"
    other_way = mean_difference(LATENTS, ~FIRST, n=1)
    assert other_way.ids[0] not in (7, 9)


def test_a_latent_that_always_says_the_same_but_for_rounding_is_not_chosen():
    """Such fire at the start token of every text; their differences of a millionth were two standard deviations."""
    _, dense = store()
    sample = np.repeat(np.arange(SAMPLES), ROWS)
    first = (np.arange(SAMPLES * ROWS) % ROWS == 0).astype(float)
    dense[:, 30] = first * (5 + 2e-6 * (sample < SAMPLES // 2) + 1e-7 * np.random.default_rng(0).random(len(sample)))
    found = sparse.csc_matrix(dense.astype(np.float32))
    latents = LatentStore(found.indptr, found.indices, found.data, {"sample_id": sample}, len(sample))
    chosen = mean_difference(latents, FIRST, n=M)
    place = chosen.ids.tolist().index(30)
    assert place > 1
    assert abs(chosen.score[place]) < 0.01
    assert chosen.pvalue[place] == 1


def test_shuffled_groups_show_nothing():
    shuffled = np.random.default_rng(1).permutation(FIRST)
    assert mean_difference(LATENTS, shuffled, n=1).pvalue[0] > 0.05


def test_nearest_rows():
    rows = torch.eye(6)
    found = nearest(rows, torch.tensor([0, 0, 2.0, 0, 1.0, 0]), n=2)
    assert found.ids.tolist() == [2, 4]
    assert_close(found.score, torch.tensor([2.0, 1.0]) / 5**0.5)


def test_controls_fire_as_often():
    rows = torch.randn(M, 8, generator=torch.Generator().manual_seed(0))
    rows = rows / rows.norm(dim=-1, keepdim=True)
    found = matched_random(LATENTS, [20, 3], rows, n=2, seed=4)
    assert found.shape == (2, 2)
    assert not {20, 3, 11} & set(found.flatten().tolist())
    assert torch.equal(found, matched_random(LATENTS, [20, 3], rows, n=2, seed=4))
    many = matched_random(LATENTS, [3], rows, n=20)
    assert (LATENTS.density[many.flatten()] < 0.3).all(), "a rare latent gets rare controls"


def test_directions_find_the_planted_one():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=draw)
    positive = torch.arange(400) % 2 == 0
    planted = torch.nn.functional.one_hot(torch.tensor(5), 16).float()
    x[positive] += 2 * planted
    for found in (difference_in_means(x, positive), probe_direction(x, positive)):
        assert torch.nn.functional.cosine_similarity(found, planted, dim=0) > 0.9
    assert_close(random_direction(16, 3.0, 1).norm(), torch.tensor(3.0))
    assert not torch.equal(random_direction(16, 1, 1), random_direction(16, 1, 2))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mean_difference(LATENTS, FIRST[:5]), "do not fit the 60 samples"),
        (lambda: mean_difference(LATENTS, np.zeros(SAMPLES, bool)), "at least two samples on each side, not 0 and 60"),
        (lambda: quantiles(LATENTS, 1.5), "q=1.5 is out of range"),
        (lambda: matched_random(LATENTS, [3], torch.ones(M, 2), n=99), "too few for 99 controls"),
        (lambda: difference_in_means(torch.ones(3, 2), torch.ones(3)), "one side is empty"),
        (lambda: difference_in_means(torch.ones(3, 2), torch.ones(4)), "do not fit together"),
    ],
)
def test_wrong_input_is_named(call, said):
    with pytest.raises(MmsaeError) as error:
        call()
    assert said in str(error.value)

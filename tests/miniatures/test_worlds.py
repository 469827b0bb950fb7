import pytest
import torch
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.miniatures.worlds import WORLDS, World, bind, decades, groups, modalities, orthonormal, outliers, tree, zipf

N = 20_000
MADE = {name: make(0) for name, make in WORLDS.items()}


@pytest.mark.parametrize("name", WORLDS)
def test_rows_are_what_the_coefficients_say(name):
    world = MADE[name]
    x, coefficients = world.draw(N, 1)
    assert_close(world.features.norm(dim=1), torch.ones(len(world.features)))
    rest = x - coefficients @ world.features - (0 if world.offset is None else world.offset)
    if world.bound is not None:
        pairs, directions = world.bound
        rest = rest - 2 * coefficients[:, pairs].prod(-1) @ directions
    if world.dense is not None:  # along these anything may be left
        rest = rest - rest @ torch.linalg.pinv(world.dense) @ world.dense
    free = x.shape[1] - (0 if world.dense is None else len(world.dense))
    assert float(rest.pow(2).sum(1).mean() / free) ** 0.5 == pytest.approx(world.noise, rel=0.02, abs=1e-6)


@pytest.mark.parametrize("name", WORLDS)
def test_the_same_seed_gives_the_same_rows_and_another_others(name):
    world, again = MADE[name], WORLDS[name](0)
    assert torch.equal(world.rows(100, 1), again.rows(100, 1))
    assert not torch.equal(world.rows(100, 1), world.rows(100, 2))
    assert not torch.equal(world.features, WORLDS[name](1).features)
    assert world.k - 1 <= world.l0 <= world.k + 0.05
    assert sum(part.shape[1] for part in world.by_stream(world.rows(2, 0)).values()) == world.features.shape[1]


@pytest.mark.parametrize("name", WORLDS)
def test_only_the_bipolar_world_has_either_sign(name):
    _, coefficients = MADE[name].draw(N, 1)
    negative = float((coefficients[coefficients != 0] < 0).float().mean())
    assert negative == (pytest.approx(0.5, abs=0.02) if MADE[name].bipolar else 0)


@pytest.mark.parametrize("name", ["tree", "absorb"])
def test_a_child_is_on_only_beside_its_parent_and_is_orthogonal_to_it(name):
    world = MADE[name]
    on = world.draw(N, 1).on
    children = (world.parents >= 0).nonzero()[:, 0]
    own = world.parents[children]
    assert (on[:, own] | ~on[:, children]).all()
    assert on[:, children].any(0).all()
    assert_close((world.features[children] * world.features[own]).sum(1), torch.zeros(len(children)), atol=1e-5, rtol=0)
    for parent in own.unique():  # siblings exclude each other
        assert on[:, world.parents == parent].sum(1).max() == 1


def test_parents_of_the_tree_resemble_each_other():
    products = tree(0).features[:11] @ tree(0).features[:11].T
    assert_close(products[~torch.eye(11, dtype=torch.bool)], torch.full((110,), 0.1), atol=0.01, rtol=0)


def test_frequencies_fall_as_said():
    rate = zipf(48, 32, 3.0, 0).draw(100_000, 1).on.float().mean(0)
    assert float(rate.sum()) == pytest.approx(3, rel=0.02)
    assert float(rate[10] / rate[36]) == pytest.approx(39 / 13, rel=0.1)
    world = decades(41, 32, 0, highest=0.4)
    rate = world.draw(200_000, 1).on.float().mean(0)
    for i in range(4):
        assert float(rate[10 * i]) == pytest.approx(0.4 * 10**-i, rel=0.15)
    assert rate[40] < 2e-4


def test_features_of_a_group_occur_together():
    on = groups(4, 3, 16, 0, p_group=0.25, p=0.5).draw(100_000, 1).on.float()
    both = on.T @ on / len(on)
    assert float(both[0, 1]) == pytest.approx(0.25 * 0.5**2, rel=0.05)
    assert float(both[0, 3]) == pytest.approx((0.25 * 0.5) ** 2, rel=0.1)


def test_bound_and_control_pairs_both_co_occur_and_only_bound_ones_bind():
    world = bind(0)
    pairs, directions = world.bound
    x, coefficients = world.draw(N, 1)
    rest = (x - coefficients @ world.features) @ torch.linalg.pinv(directions)
    for pair, along in zip(pairs, rest.T, strict=True):
        both = (coefficients[:, pair] > 0).all(1)
        assert along[both].mean() > 1
        assert along[~both].abs().mean() < 0.1
    on = coefficients > 0
    assert on[:, world.control].all(-1).float().mean() > 2 * on[:, pairs].all(-1).float().mean()


def test_outliers_dominate_the_variance_and_the_mean_the_norm():
    world = outliers(48, 32, 3.0, 0)
    x = world.rows(N, 1)
    spread = x.var(0)
    assert spread[:2].min() > 10 * spread[2:].max()
    assert float(x.mean(0).norm()) > 4


def test_private_features_are_in_one_stream_alone():
    world = modalities(4, 2, 12, 0)
    image, text = world.by_stream(world.features).values()
    assert_close(image[:4].norm(dim=1), text[:4].norm(dim=1))
    assert text[4:6].abs().max() == 0
    assert image[6:].abs().max() == 0
    assert list(world.streams) == ["image", "text"]


def test_impossible_worlds_are_refused():
    with pytest.raises(MmsaeError, match="5 features cannot be orthonormal in 4 dimensions"):
        orthonormal(5, 4, 0)
    with pytest.raises(MmsaeError, match="n=0 is out of range"):
        World(torch.eye(2), lambda n, g: torch.zeros(n, 2)).draw(0, 0)

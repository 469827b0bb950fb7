import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmsae.codes import Codes
from mmsae.errors import MmsaeError
from mmsae.metrics import ground_truth as gt
from mmsae.miniatures.worlds import absorb, bipolar, groups, modalities, orthonormal

WORLD = absorb(0)
F = WORLD.features
ROWS = WORLD.draw(4000, 1)
ALL = torch.arange(len(F))


def codes_of(dictionary, coefficients):
    return Codes(coefficients, None, len(dictionary))


def absorbed(share):
    """A dictionary and codes in which a share of the children's latents carry their parent, whose latent is silent."""
    dictionary, z = F.clone(), ROWS.coefficients.clone()
    children = (WORLD.parents >= 0).nonzero()[:, 0]
    for child in children[: round(share * len(children))]:
        parent = WORLD.parents[child]
        dictionary[child] = F[child] + F[parent]
        z[:, parent] *= z[:, child] == 0
    return dictionary, codes_of(dictionary, z)


# ---- dictionaries whose answer is known


def test_a_perfect_dictionary():
    codes = codes_of(F, ROWS.coefficients)
    found = gt.match(3 * F, F)
    assert torch.equal(found.latent, ALL)
    assert_close(found.cosine, torch.ones(32))
    assert gt.recovery_rate(F, F) == 1
    assert gt.splitting(F, F).tolist() == [1] * 32
    f1 = gt.feature_f1(codes, ROWS.on)
    assert torch.equal(f1.latent, ALL)
    assert_close(f1.f1, torch.ones(32))
    composed = gt.composition(F, F, ROWS.on)
    assert composed.share() == 0
    assert composed.size.tolist() == [1] * 32
    rates = gt.absorption(codes, F, F, ROWS.coefficients, WORLD.parents)
    assert rates.parent.tolist() == [0, 1, 2, 3]
    assert torch.equal(rates.latent, rates.parent)
    assert rates.rate.tolist() == rates.silent.tolist() == [0.0] * 4


def test_random_directions_find_nothing():
    rows = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    assert gt.recovery_rate(rows, F) == 0
    assert gt.match(rows, F).cosine.max() < 0.7
    assert gt.composition(rows, F, ROWS.on).share() == 0


def test_a_split_dictionary():
    """Two latents for feature 5, each of which fires in half of its rows."""
    twin = F[5] + 0.3 * F[6]
    dictionary = torch.cat([F, twin[None]])
    assert gt.splitting(dictionary, F)[5] == 2
    assert gt.splitting(dictionary, F).sum() == 33
    z = torch.cat([ROWS.coefficients, torch.zeros(4000, 1)], 1)
    z[::2, 32], z[::2, 5] = z[::2, 5].clone(), 0
    f1 = gt.feature_f1(codes_of(dictionary, z), ROWS.on).f1
    assert float(f1[5]) == pytest.approx(2 / 3, abs=0.15)  # precision 1, recall about a half
    assert_close(f1[[4, 6, 7]], torch.ones(3))


def test_an_absorbed_dictionary():
    for share in (0.0, 0.25, 0.5, 1.0):
        dictionary, codes = absorbed(share)
        assert_close(codes.values @ dictionary, ROWS.x, atol=1.0, rtol=0)  # it does reconstruct, up to coefficients
        found = gt.absorption(codes, dictionary, F, ROWS.coefficients, WORLD.parents)
        assert found.latent.tolist() == [0, 1, 2, 3]
        assert float(found.rate.mean()) == pytest.approx(share, abs=0.02)
        assert_close(found.rate, found.silent)


def test_silence_that_nobody_carries_is_not_absorption():
    _, codes = absorbed(0.5)
    found = gt.absorption(codes, F, F, ROWS.coefficients, WORLD.parents)  # children's latents without the parent
    assert found.rate.tolist() == [0.0] * 4
    assert float(found.silent.mean()) == pytest.approx(0.5, abs=0.02)


def test_absorption_reads_pair_lists_as_well():
    dictionary, codes = absorbed(0.25)
    dense = gt.absorption(codes, dictionary, F, ROWS.coefficients, WORLD.parents)
    pairs = gt.absorption(codes.sparse(), dictionary, F, ROWS.coefficients, WORLD.parents)
    assert_close(dense, pairs)


@pytest.mark.parametrize("weight", [0.2, 0.35, 0.5, 1.0])
def test_a_composed_dictionary(weight):
    """Two orthogonal features that occur together: a sum from a weight of tan(22.5°) on."""
    world = groups(8, 4, 48, 0)
    features, on = orthonormal(32, 48, 0), world.draw(4000, 0).on
    found = gt.composition((features[0] + weight * features[1])[None], features, on)
    if weight > 0.4143:
        assert found.share() == 1
        assert found.parts[0].nonzero()[:, 0].tolist() == [0, 1]
        both = torch.tensor([1.0, weight])
        assert float(found.cosine[0]) == pytest.approx(float(both.sum() / 2**0.5 / both.norm()), abs=1e-5)
    else:
        assert found.size.tolist() == [1]
        assert found.share() == 0


def test_compositions_have_up_to_as_many_parts_as_allowed_and_of_features_that_occur_together():
    features = orthonormal(32, 48, 0)
    on = groups(8, 4, 48, 0).draw(4000, 0).on
    whole = features[:4].sum(0)[None]
    assert gt.composition(whole, features, on).parts[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert gt.composition(whole, features, on, largest=3).size.tolist() == [3]
    assert gt.composition(whole, features, on, largest=1).size.tolist() == [1]
    apart = on.clone()
    apart[apart[:, 0], 1] = False  # feature 1 never beside feature 0
    assert not gt.composition(whole, features, apart).parts[0][[0, 1]].all()


def test_opposites_count_where_features_have_two_directions():
    world = bipolar(16, 16, 2.0, 0)
    flipped = -world.features
    assert gt.recovery_rate(flipped, world.features) == 0
    assert gt.recovery_rate(flipped, world.features, bipolar=True) == 1
    assert_close(gt.match(flipped, world.features, bipolar=True).cosine, torch.ones(16))
    assert gt.splitting(flipped, world.features, bipolar=True).tolist() == [1] * 16
    rows = orthonormal(4, 8, 0)
    difference, on = (rows[0] - rows[1])[None], torch.ones(10, 4, dtype=torch.bool)
    assert gt.composition(difference, rows, on, bipolar=True).share() == 1
    assert gt.composition(difference, rows, on).share() == 0


def test_signed_codes_may_have_flipped_rows():
    dictionary, codes = absorbed(0.25)
    want = gt.absorption(codes, dictionary, F, ROWS.coefficients, WORLD.parents)
    flipped = codes_of(dictionary, -codes.values)
    assert_close(gt.absorption(flipped, -dictionary, F, ROWS.coefficients, WORLD.parents, bipolar=True), want)
    world = modalities(4, 2, 12, 0)
    assert gt.leak(-world.features, world.features, world.streams, bipolar=True) == (0, 1)


def test_fewer_latents_than_features_leave_some_without():
    found = gt.match(F[:20], F)
    assert torch.equal(found.latent[:20], ALL[:20])
    assert found.latent[20:].tolist() == [-1] * 12
    assert float(found.cosine.mean()) == pytest.approx(20 / 32)


def test_matching_is_one_to_one_where_best_cosines_are_not():
    one = torch.nn.functional.normalize(F[0] + F[1], dim=0)[None]
    assert_close(gt.best_cosines(one, F[:2]), torch.full((2,), 0.5**0.5))
    assert sorted(gt.match(one, F[:2]).cosine.tolist()) == pytest.approx([0, 0.5**0.5])


def test_f1_is_the_definition():
    g = torch.Generator().manual_seed(0)
    z = torch.rand(60, 5, generator=g) * (torch.rand(60, 5, generator=g) < 0.4)
    on = torch.rand(60, 3, generator=g) < 0.3
    table = gt.f1_table(Codes(z, None, 5), on)
    assert_close(table, gt.f1_table(Codes(z, None, 5).sparse(), on))
    for feature in range(3):
        for latent in range(5):
            fired = z[:, latent] != 0
            hits = float((fired & on[:, feature]).sum())
            precision, recall = hits / float(fired.sum()), hits / float(on[:, feature].sum())
            want = 2 * precision * recall / (precision + recall) if hits else 0
            assert float(table[feature, latent]) == pytest.approx(want)


def test_f1_is_scored_on_rows_that_did_not_choose():
    on = torch.zeros(8, 2, dtype=torch.bool)
    on[[0, 5], 0] = True
    on[6, 1] = True  # never in the first half
    z = torch.zeros(8, 2)
    z[0, 0] = 1  # best in the first half, silent in the second
    z[5, 1] = 1
    found = gt.feature_f1(Codes(z, None, 2), on)
    assert found.latent[0] == 0
    assert found.f1[0] == 0
    assert found.f1[1].isnan()


def test_leaks_are_of_private_features():
    world = modalities(4, 2, 12, 0)
    assert gt.leak(world.features, world.features, world.streams) == (0, 1)
    leaky = world.features.clone()
    leaky[4:6, 12:] = leaky[4:6, :12] / 3  # a quarter of the summed norms
    found = gt.leak(leaky, world.features, world.streams)
    assert found.private == pytest.approx(0.25 * 2 / 4)
    assert found.told_apart == pytest.approx(6 / 8)


def test_widths_must_fit():
    with pytest.raises(MmsaeError, match="latents of width 7 cannot match features of width 48"):
        gt.match(torch.ones(3, 7), F)
    with pytest.raises(MmsaeError, match="largest=0"):
        gt.composition(F, F, ROWS.on, largest=0)


# ---- what does not depend on the order of latents, nor on their norms


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 40))
def test_the_order_of_latents_does_not_matter(seed, d_latent):
    g = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(d_latent, 48, generator=g) + 3 * F[torch.randint(0, 32, (d_latent,), generator=g)]
    z = torch.rand(500, d_latent, generator=g) * (torch.rand(500, d_latent, generator=g) < 0.2)
    order, scale = torch.randperm(d_latent, generator=g), torch.rand(d_latent, 1, generator=g) + 0.1
    x, on = ROWS.coefficients[:500], ROWS.on[:500]
    best = gt.f1_table(Codes(z[:250], None, d_latent), on[:250]).topk(2, dim=1).values
    no_tie = best[:, 0] > best[:, 1]  # between equals the order decides

    def numbers(dictionary, z):
        codes = Codes(z, None, d_latent)
        absorbed = gt.absorption(codes, dictionary, F, x, WORLD.parents)
        return [
            gt.match(dictionary, F).cosine.sort().values,
            gt.best_cosines(dictionary, F),
            gt.splitting(dictionary, F),
            gt.feature_f1(codes, on).f1.nan_to_num(-1)[no_tie],
            gt.composition(dictionary, F, on).size.sort().values,
            absorbed.rate.nan_to_num(-1),
        ]

    for one, other in zip(numbers(dictionary, z), numbers(dictionary[order], z[:, order]), strict=True):
        assert_close(one, other, atol=1e-5, rtol=0)
    # codes take up the norm that rows lose
    for one, other in zip(numbers(dictionary, z), numbers(dictionary * scale, z / scale.T), strict=True):
        assert_close(one, other, atol=1e-5, rtol=0)

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from synthetic import batch_of, scores, train
from torch.testing import assert_close

from mmsae.cores import Archetypal, TopK
from mmsae.cores.archetypal import centroids
from mmsae.errors import MmsaeError

D, M = 10, 24
X = torch.randn(200, D, generator=torch.Generator().manual_seed(1)) + 0.5


def check_constraints(core):
    assert (core.mixture >= 0).all()
    assert_close(core.mixture.sum(-1), torch.ones(core.d_latent))
    assert (core.offset.norm(dim=-1) <= core.reach * (1 + 1e-5)).all()


@pytest.mark.parametrize("delta", [0.0, 0.2])
def test_constraints_hold_after_every_step_and_points_stay(delta):
    torch.manual_seed(0)
    core = Archetypal(D, M, k=3, delta=delta)
    core.start(batch_of(X))
    points = core.points.clone()
    assert_close(core.reach, delta * points.norm(dim=-1).mean())
    train(core, X, 20, 64, seed=0, each=lambda step: check_constraints(core))
    assert_close(core.points, centroids(X, 48) - core_median(), atol=1e-5, rtol=0)
    assert core.offset.abs().max() > 0 or delta == 0
    moved = core.mixture.detach() - torch.eye(M, 48)
    assert moved.abs().max() > 1e-3
    want = core.scale.exp() * (core.mixture @ core.points + core.offset)
    assert_close(core.dictionary, want)


def core_median():
    torch.manual_seed(0)
    core = TopK(D, M, k=3)
    core.start(batch_of(X))
    return core.b_dec.detach()


def test_archetypes_start_at_points_and_lie_in_the_hull_of_the_data():
    core = Archetypal(D, M, k=3, delta=0.0)
    core.start(batch_of(X))
    assert_close(core.dictionary, core.points[:M])
    assert core.points.abs().max() <= (X - core.b_dec).abs().max()


def test_a_mixture_that_lost_everything_starts_again():
    core = Archetypal(D, M, k=3)
    with torch.no_grad():
        core.mixture[2] = -1.0
    core.after_step(1, core.encode(X))
    check_constraints(core)
    assert core.mixture[2, 2] == 1


def test_centroids_are_means_of_their_rows_and_the_same_each_time():
    clusters = torch.eye(4).repeat(50, 1) * 5 + 0.1 * torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    centres = centroids(clusters, 12)
    nearest = torch.cdist(clusters, centres).argmin(-1)
    for i in nearest.unique():
        assert (centres[i] - clusters[nearest == i].mean(0)).norm() < 0.1
    assert torch.equal(centres, centroids(clusters, 12))
    assert not torch.equal(centres, centroids(clusters, 12, seed=1))


def test_bad_settings_are_refused():
    with pytest.raises(MmsaeError, match="n_points=10 is less than d_latent=24"):
        Archetypal(D, M, k=3, n_points=10)
    with pytest.raises(MmsaeError, match="n_points=48 needs as many rows, but the sample has 20"):
        Archetypal(D, M, k=3).start(batch_of(X[:20]))


def agreement(one, other):
    one, other = (c.dictionary / c.dictionary.norm(dim=-1, keepdim=True).clamp_min(1e-8) for c in (one, other))
    cosines = (one @ other.T).detach().numpy()
    return float(cosines[linear_sum_assignment(-cosines)].mean())


@pytest.mark.slow
def test_t16_dictionaries_agree_better_between_seeds_than_topk():
    """Acceptance test T16, flat data: far more latents than features, two training seeds for each of three draws."""
    seen = []
    for seed in (0, 1, 2):
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(48, 32, generator=g)
        features /= features.norm(dim=-1, keepdim=True)

        def draw(n, seed, features=features):
            g = torch.Generator().manual_seed(seed)
            on = torch.rand(n, 48, generator=g) < 4 / 48
            x = (on * (0.5 + torch.rand(n, 48, generator=g))) @ features
            return x + 0.1 * torch.randn(n, 32, generator=g)

        pool, held = draw(20_000, 100 + seed), draw(5000, 200 + seed)
        figures = {}
        for name in ("ra", "topk"):
            twins = []
            for training_seed in (0, 1):
                torch.manual_seed(300 + 10 * seed + training_seed)
                core = Archetypal(32, 128, k=4, n_points=256, delta=0.1) if name == "ra" else TopK(32, 128, k=4)
                twins.append(train(core, pool, 1500, 256, seed=400 + 10 * seed + training_seed).eval())
            figures[name] = (agreement(*twins), scores(twins[0], held, features).fvu)
        seen.append(figures)
        print(figures)
    assert sum(f["ra"][0] >= f["topk"][0] + 0.05 for f in seen) >= 2
    assert sum(f["ra"][0] - f["topk"][0] for f in seen) / 3 >= 0.05
    assert sum(f["ra"][1] <= 1.15 * f["topk"][1] for f in seen) >= 2
    assert sum(f["ra"][1] for f in seen) <= 1.15 * sum(f["topk"][1] for f in seen)

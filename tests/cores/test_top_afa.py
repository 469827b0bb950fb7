import pytest
import torch
from synthetic import batch_of, low_coherence, scores, train
from torch.testing import assert_close

from mmsae.cores import TopAFA, TopK
from mmsae.cores.top_afa import matching_l0
from mmsae.errors import MmsaeError
from mmsae.spec import TARGET

D, M = 12, 40
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


def make(**arguments):
    torch.manual_seed(3)
    core = TopAFA(D, M, **{"dead_after": 100, **arguments}).train()
    with torch.no_grad():
        core.b_dec.fill_(0.3)
    return core


def exact(features, n, seed, most=8):
    """Rows of 1 to `most` features, their number, and their coefficients."""
    g = torch.Generator().manual_seed(seed)
    count = torch.randint(1, most + 1, (n,), generator=g)
    rank = torch.rand(n, len(features), generator=g).argsort(-1).argsort(-1)
    codes = (rank < count[:, None]) * (0.5 + torch.rand(n, len(features), generator=g))
    return codes @ features, count, codes


@pytest.mark.parametrize("k_max", [None, 5])
def test_the_code_is_as_long_as_the_input(k_max):
    core = make(k_max=k_max)
    core._width = 2  # the search for enough candidates takes part
    codes = core.encode(X)
    pre = ((X - core.b_dec) @ core.W_enc.T).relu().detach()
    want = torch.zeros_like(pre)
    for row in range(len(X)):
        order = pre[row].argsort(descending=True)[:k_max]
        gaps = [abs(float(pre[row, order[:j]].norm() - (X[row] - 0.3).norm())) for j in range(1, len(order) + 1)]
        best = min(range(len(gaps)), key=gaps.__getitem__)
        want[row, order[: best + 1]] = pre[row, order[: best + 1]]
    assert_close(codes.dense(), want)
    assert_close(codes.l0(), codes.extra["k"])
    assert codes.l0().unique().numel() > 1


def test_the_norm_of_the_code_is_drawn_to_that_of_the_input():
    core = make(afa_coefficient=2.0)
    core.start(batch_of(X))
    codes = core.encode(X).dense()
    want = 2 * (codes.norm(dim=-1) - X.norm(dim=-1)).pow(2).mean() * D / X.var(0, correction=0).sum()
    assert_close(core.losses(batch_of(X)).terms["afa"], want)
    assert "afa" not in make(afa_coefficient=0.0).losses(batch_of(X)).terms


def test_dead_latents_learn():
    core = make(k_max=3)
    core.rows_since_fired[:12] = 100
    core.losses(batch_of(X)).terms["aux"].backward()
    assert core.W_enc.grad[:12].abs().max() > 0
    assert core.b_enc.grad is None  # as in the authors' code the encoder has no bias


def test_bad_settings_are_refused():
    with pytest.raises(MmsaeError, match="k_max=41"):
        TopAFA(D, M, k_max=41)
    with pytest.raises(MmsaeError, match="cannot be a transcoder"):
        TopAFA({"x": D, TARGET: D}, M)


def test_matching_l0_is_the_prefix_of_nearest_norm():
    magnitudes = torch.tensor([[4.0, 3.0, 1.0], [4.0, 3.0, 0.0], [2.0, 0.0, 0.0]])
    assert matching_l0(magnitudes, torch.tensor([4.9, 9.0, 0.0])).tolist() == [2, 2, 1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t5_the_true_dictionary_tells_the_number_of_features(seed):
    """Acceptance test T5, first half. Ablation: lengths that say nothing, because rows have changed places."""
    features = low_coherence(128, 64, seed)
    x, count, codes = exact(features, 5000, 100 + seed)

    def correlation(magnitudes, norm):
        found = matching_l0(magnitudes.sort(dim=-1, descending=True).values, norm)
        return float(torch.corrcoef(torch.stack([found.float(), count.float()]))[0, 1])

    norm = x.norm(dim=-1)
    core = TopAFA(64, 128)
    with torch.no_grad():
        core.W_enc.copy_(features)
        core.W_dec.copy_(features)
    k = core.encode(x).extra["k"]
    oracle, encoded = correlation(codes, norm), correlation((x @ features.T).relu(), norm)
    shuffled = correlation((x @ features.T).relu(), norm.roll(1))
    print(oracle, encoded, shuffled)
    assert torch.corrcoef(torch.stack([k.float(), count.float()]))[0, 1] == pytest.approx(encoded, abs=1e-4)
    assert oracle >= 0.9
    assert encoded >= 0.55
    assert shuffled < 0.3


@pytest.mark.slow
def test_t5_training_does_not_find_the_sparsity():
    """Acceptance test T5, second half, a negative: the L0 is far above the truth, where TopK finds the features."""
    torch.set_num_threads(1)
    seen = {"TopAFA": [], "TopAFA without its loss": [], "TopK": []}
    for seed in (0, 1, 2):
        features = low_coherence(64, 32, seed)
        pool, held = exact(features, 30_000, 100 + seed, 6)[0], exact(features, 10_000, 200 + seed, 6)[0]
        makers = {
            "TopAFA": lambda: TopAFA(32, 64, dead_after=20 * 256),
            "TopAFA without its loss": lambda: TopAFA(32, 64, afa_coefficient=0, dead_after=20 * 256),
            "TopK": lambda: TopK(32, 64, k=4, dead_after=20 * 256),
        }
        for name, make_core in makers.items():
            torch.manual_seed(300 + seed)
            core = train(make_core(), pool, 1000, 256, 400 + seed).eval()
            seen[name].append(scores(core, held, features))
    for name, values in seen.items():
        print(name, *values, sep="\n  ")
    truth = 3.5
    for name in ("TopAFA", "TopAFA without its loss"):
        assert all(s.l0 > 5 * truth for s in seen[name]), name
        assert sum(a.found < b.found for a, b in zip(seen[name], seen["TopK"], strict=True)) == 3, name

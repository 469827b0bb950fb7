import pytest
import torch
from synthetic import batch_of, best_cosines, low_coherence, scores, train
from torch.testing import assert_close

from mmsae.cores import GroupMax, TopK
from mmsae.errors import MmsaeError

D, M = 10, 24
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


def make(**arguments):
    torch.manual_seed(3)
    core = GroupMax(D, M, k=4, dead_after=100, **arguments).train()
    with torch.no_grad():
        core.b_dec.fill_(0.3)
        core.b_enc.normal_(0, 0.1)
    return core


@pytest.mark.parametrize("chunk", [1 << 21, 7 * M])
def test_the_best_of_each_group_is_kept(chunk, monkeypatch):
    monkeypatch.setattr("mmsae.cores.group_max.CHUNK", chunk)
    core = make()
    pre = core.pre_activations(X).detach().view(50, 4, 6)
    want = (pre * (pre == pre.amax(-1, keepdim=True))).relu().view(50, M)
    codes = core.encode(X)
    assert_close(codes.dense(), want)
    assert (codes.indices // 6 == torch.arange(4)).all()
    assert_close(core.encode(X.view(5, 10, D)).dense(), want.view(5, 10, M))


def test_gradients_are_those_of_the_dense_formula():
    core = make()
    parameters = list(core.parameters())
    mine = torch.autograd.grad(core(X).pow(2).sum(), parameters)
    pre = (X - core.b_dec) @ core.W_enc.T + core.b_enc
    codes = (pre * (core.encode(X).dense() != 0)).relu()
    theirs = torch.autograd.grad((codes @ core.W_dec + core.b_dec).pow(2).sum(), parameters)
    for got, want in zip(mine, theirs, strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_dead_latents_learn():
    core = make()
    core.rows_since_fired[:8] = 100
    core.losses(batch_of(X)).terms["aux"].backward()
    assert core.W_enc.grad[:8].abs().max() > 0
    assert core.W_enc.grad[8:].abs().max() == 0


def test_groups_of_different_size_are_refused():
    with pytest.raises(MmsaeError, match="d_latent=24 is not a multiple of k=5"):
        GroupMax(D, M, k=5)


def alternatives(features, n, seed):
    """One of each 12 features in turn: rows are sums of 4 symbols."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, 12, (n, 4), generator=g) + 12 * torch.arange(4)
    size = 0.5 + torch.rand(n, 4, generator=g)
    x = (features[chosen] * size[..., None]).sum(1)
    return x + 0.02 * torch.randn(x.shape, generator=g)


def purity(core, features):
    """Mean over groups of 12 latents of the share that stands for the commonest of the 4 alphabets."""
    alphabet = (core.dictionary @ features.T).argmax(-1) // 12
    counts = torch.nn.functional.one_hot(alphabet, 4).view(4, 12, 4).sum(1)
    return float(counts.amax(-1).float().mean() / 12)


@pytest.mark.slow
def test_groups_lean_to_alphabets_and_reconstruct_worse_than_topk():
    """A negative: groups lean only a little to features that exclude each other; TopK is the ablation."""
    torch.set_num_threads(1)
    seen = {"GroupMax": [], "TopK": []}
    for seed in (0, 1, 2):
        features = low_coherence(48, 32, seed)
        pool, held = alternatives(features, 20_000, 100 + seed), alternatives(features, 10_000, 200 + seed)
        for name, values in seen.items():
            torch.manual_seed(300 + seed)
            core = (GroupMax if name == "GroupMax" else TopK)(32, 48, k=4, dead_after=20 * 256)
            train(core, pool, 1500, 256, 400 + seed).eval()
            values.append(
                (purity(core, features), scores(core, held, features), float(best_cosines(core, features).mean()))
            )
    for name, values in seen.items():
        print(name, *values, sep="\n  ")
    for grouped, plain in zip(*seen.values(), strict=True):
        assert grouped[0] > plain[0]
        assert grouped[1].fvu > 3 * plain[1].fvu
        assert grouped[1].found >= 0.85

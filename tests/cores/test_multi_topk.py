import pytest
import torch
from synthetic import batch_of, flat, scores, train
from torch.testing import assert_close

from mmsae.cores import MultiTopK, TopK
from mmsae.errors import MmsaeError

D, M = 10, 24
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


def make(**arguments):
    torch.manual_seed(3)
    core = MultiTopK(D, M, **{"k": 3, "dead_after": 100, **arguments}).train()
    core.start(batch_of(X))
    return core


def test_loss_is_that_of_topk_and_an_eighth_of_the_fvu_of_four_k():
    core, plain, wide = make(), TopK(D, M, k=3, dead_after=100), TopK(D, M, k=12)
    for other in (plain, wide):
        other.load_state_dict(core.state_dict())
    core.rows_since_fired[:8] = plain.rows_since_fired[:8] = 100
    losses, want = core.losses(batch_of(X)), plain.losses(batch_of(X))
    terms = {**want.terms, "multi": wide.losses(batch_of(X)).terms["reconstruction"] / 8}
    assert losses.terms.keys() == terms.keys()
    for name in terms:
        assert_close(losses.terms[name], terms[name])
    assert_close(losses.reconstruction, want.reconstruction)
    assert_close(losses.codes.dense(), want.codes.dense())
    parameters = list(core.parameters())
    mine = torch.autograd.grad(sum(losses.terms.values()), parameters)
    theirs = torch.autograd.grad(sum(want.terms.values()), list(plain.parameters()))
    wider = torch.autograd.grad(terms["multi"], list(wide.parameters()))
    for got, one, other in zip(mine, theirs, wider, strict=True):
        assert_close(got, one + other, rtol=1e-4, atol=1e-5)


def test_latents_that_only_the_wider_code_uses_are_not_counted_as_firing():
    core = make()
    assert core.losses(batch_of(X)).codes.l0().max() == 3


def test_bad_settings_are_refused():
    with pytest.raises(MmsaeError, match="multiple=4 times k=7 is larger than d_latent=24"):
        MultiTopK(D, M, k=7)
    with pytest.raises(MmsaeError, match="multiple=1"):
        MultiTopK(D, M, k=3, multiple=1)


@pytest.mark.slow
def test_k_may_be_raised_afterwards():
    """The claim of progressive codes: beyond the k of training the reconstruction gets better, where TopK's gets worse
    (the ablation)."""
    torch.set_num_threads(1)
    ks = (4, 8, 16)
    seen = {"MultiTopK": [], "TopK": []}
    for seed in (0, 1, 2):
        data = flat(64, 40, 4, seed=seed)
        pool, held = data.rows(20_000, 100 + seed), data.rows(10_000, 200 + seed)
        for name, values in seen.items():
            torch.manual_seed(300 + seed)
            core = (MultiTopK if name == "MultiTopK" else TopK)(40, 64, k=4, dead_after=20 * 256)
            train(core, pool, 1200, 256, 400 + seed).eval()
            fvu = []
            for core.k in ks:
                fvu.append(scores(core, held, data.features).fvu)
            values.append(fvu)
    for name, values in seen.items():
        print(name, *values, sep="\n  ")
    for multi, plain in zip(*seen.values(), strict=True):
        assert multi[0] > multi[1] > multi[2]
        assert plain[2] > plain[1]
        assert multi[2] < 0.75 * plain[2]
        assert multi[0] < 1.05 * plain[0]  # and it costs next to nothing at the k of training

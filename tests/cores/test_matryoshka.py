import pytest
import torch
from synthetic import absorb, batch_of, train
from torch.testing import assert_close

from mmsae.cores import BatchTopK, Matryoshka
from mmsae.errors import MmsaeError

X = torch.randn(50, 10, generator=torch.Generator().manual_seed(1)) + 0.5


def test_loss_is_the_mean_over_prefixes():
    core = Matryoshka(10, 24, k=3, prefixes=(0.25, 0.5, 1)).train()
    core.start(batch_of(X))
    codes = core.encode(X).dense()
    total = 0.0
    for end in (6, 12, 24):
        nested = codes[:, :end] @ core.W_dec[:end] + core.b_dec
        total = total + (X - nested).pow(2).sum(-1).mean() / core.variance / 3
    losses = core.losses(batch_of(X))
    assert_close(losses.terms["reconstruction"], total)
    assert_close(losses.reconstruction, codes @ core.W_dec + core.b_dec)
    mine = torch.autograd.grad(losses.terms["reconstruction"], [core.W_dec, core.W_enc, core.b_dec])
    for got, want in zip(mine, torch.autograd.grad(total, [core.W_dec, core.W_enc, core.b_dec]), strict=True):
        assert_close(got, want)


def test_one_prefix_is_batch_topk():
    torch.manual_seed(0)
    core, plain = Matryoshka(10, 24, k=3, prefixes=(1.0,)), BatchTopK(10, 24, k=3)
    plain.load_state_dict(core.state_dict())
    assert_close(core.losses(batch_of(X)).terms, plain.losses(batch_of(X)).terms)


def test_prefix_decodes_the_first_latents():
    core = Matryoshka(10, 24, k=3, prefixes=(0.25, 1))
    core.threshold.fill_(0.2)
    codes = core.eval().encode(X)
    dense = codes.dense()
    assert_close(core.decode_prefix(codes, 6), dense[:, :6] @ core.W_dec[:6] + core.b_dec)


@pytest.mark.parametrize("prefixes", [(), (0.5, 0.25, 1), (0.5,), (0.01, 1), (0.5, 0.51, 1)], ids=str)
def test_prefixes_must_ascend_to_one(prefixes):
    with pytest.raises(MmsaeError, match="prefixes"):
        Matryoshka(10, 24, k=3, prefixes=prefixes)


def absorption(core, data, seed):
    """Share of rows with a parent and a child on in which the parent's latent is silent, and the parents' places.

    The latent of a parent is the one of best F1 with it over all rows (a latent that misses the rows with children
    still fires for the parent alone).
    """
    drawn = data.draw(20_000, seed)
    x, on = drawn.x, drawn.on
    fired = core.eval().encode(x).dense() > 0
    rates, places = [], []
    for parent in range(4):
        truth = on[:, parent]
        both = (fired & truth[:, None]).sum(0)
        f1 = 2 * both / (fired.sum(0) + truth.sum()).clamp_min(1)
        cosine = core.dictionary @ data.features[parent] / core.dictionary.norm(dim=-1)
        latent = int((f1 * (cosine > 0.3)).argmax()) if (cosine > 0.3).any() else int(cosine.argmax())
        with_child = truth & on[:, 4 + 4 * parent : 8 + 4 * parent].any(1)
        rates.append(float((~fired[with_child, latent]).float().mean()))
        places.append(latent)
    return sum(rates) / 4, places


@pytest.mark.slow
def test_t11_children_do_not_absorb_their_parents():
    """Acceptance test T11; BatchTopK, which is Matryoshka with one prefix, is the ablation."""
    torch.set_num_threads(1)
    seen = {"prefixes": [], "one prefix": []}
    for seed in (0, 1, 2):
        data = absorb(seed)
        drawn = data.draw(30_000, 100 + seed)
        pool, k = drawn.x, round(float(drawn.on.sum(1).float().mean()))
        for name, prefixes in {"prefixes": (4 / 32, 12 / 32, 1), "one prefix": (1,)}.items():
            torch.manual_seed(300 + seed)
            core = Matryoshka(48, 32, k=k, prefixes=prefixes, dead_after=20 * 256)
            train(core, pool, 2000, 256, 400 + seed)
            seen[name].append(absorption(core, data, 200 + seed))
    print(seen)
    nested, flat = [a for a, _ in seen["prefixes"]], [a for a, _ in seen["one prefix"]]
    assert sum(nested) <= 0.5 * sum(flat)
    assert sum(a <= 0.5 * b for a, b in zip(nested, flat, strict=True)) >= 2
    assert sum(max(places) < 12 for _, places in seen["prefixes"]) >= 2

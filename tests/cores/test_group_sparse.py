import pytest
import torch
from synthetic import train
from torch.testing import assert_close

from mmsae.cores import GroupSparse
from mmsae.cores.group_sparse import group_norm
from mmsae.latents import to_csr
from mmsae.metrics.code_retrieval import retrieval
from mmsae.metrics.cross_modal import balanced_share, census, pair_support_jaccard
from mmsae.miniatures.pairs import paired_concepts
from mmsae.spec import ACTS

D, M, N = 6, 30, 50
SPEC = {"image": D, "text": D, "audio": D}


def batch(seed=0, **columns):
    g = torch.Generator().manual_seed(seed)
    return {ACTS: {s: torch.randn(N, D, generator=g) + i for i, s in enumerate(SPEC)}, **columns}


def make(**arguments):
    torch.manual_seed(0)
    core = GroupSparse(SPEC, M, k=5, **arguments)
    with torch.no_grad():
        core.b_enc.normal_(0, 0.1)
        core.b_dec.normal_()
        core.W_enc.normal_()
    return core


def slowly(core, acts, kept=None):
    """The formulas, with dense matrices: codes, reconstructions, group norms `[n]`."""
    codes, out = [], []
    for bias, x in zip(core.b_dec, acts.values(), strict=True):
        h = ((x - bias) @ core.W_enc.T + core.b_enc).relu()
        h = h if kept is None else h * kept
        best = h.topk(core.k, dim=-1).indices
        codes.append(torch.zeros_like(h).scatter(-1, best, h.gather(-1, best)))
        out.append(codes[-1] @ core.W_dec + bias)
    return torch.stack(codes), out, torch.stack(codes).pow(2).sum(0).sqrt().sum(-1)


def test_losses_are_the_formula():
    core, b = make(group_coefficient=0.3), batch()
    codes, out, norms = slowly(core, b[ACTS])
    losses = core.losses(b)
    assert_close(losses.codes.dense(), codes)
    error = sum((x - o).pow(2).sum(-1).mean() for x, o in zip(b[ACTS].values(), out, strict=True))
    assert set(losses.terms) == {"reconstruction", "group"}
    assert_close(losses.terms["reconstruction"], error)
    assert_close(losses.terms["group"], 0.3 * norms.mean())


def test_gradients_are_those_of_the_dense_formula():
    core, b = make(group_coefficient=0.3), batch()
    sum(core.losses(b).terms.values()).backward()
    found = {name: p.grad.clone() for name, p in core.named_parameters()}
    core.zero_grad()
    codes, out, _ = slowly(core, b[ACTS])
    norms = (codes.pow(2).sum(0) + 1e-12).sqrt().sum(-1)
    error = sum((x - o).pow(2).sum(-1).mean() for x, o in zip(b[ACTS].values(), out, strict=True))
    (error + 0.3 * norms.mean()).backward()
    for name, p in core.named_parameters():
        assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5)


def test_group_norm_meets_latents_of_any_order_and_is_flat_at_zero():
    from mmsae.codes import Codes

    values = torch.tensor([[3.0, 1.0, 0.0]], requires_grad=True)
    other = torch.tensor([[2.0, 4.0, 0.0]], requires_grad=True)
    one = Codes(values, torch.tensor([[7, 2, 5]]), 9)
    two = Codes(other, torch.tensor([[8, 7, 5]]), 9)
    total = group_norm([one, two])
    assert_close(total, torch.tensor([5.0 + 1.0 + 2.0]), atol=1e-4, rtol=0)
    total.sum().backward()
    assert_close(values.grad, torch.tensor([[0.6, 1.0, 0.0]]))
    assert_close(other.grad, torch.tensor([[1.0, 0.8, 0.0]]))
    disjoint = group_norm([one, Codes(values.detach(), torch.tensor([[1, 3, 4]]), 9)])
    assert_close(disjoint / group_norm([one, one]), torch.tensor([2**0.5]), atol=1e-4, rtol=0)


def test_unpaired_rows_pay_no_penalty():
    core = make(group_coefficient=0.3)
    pairs = torch.arange(N)
    pairs[::2] = -1
    _, _, norms = slowly(core, batch()[ACTS])
    losses, all_paired = core.losses(batch(pair_id=pairs)), core.losses(batch(pair_id=torch.arange(N)))
    assert_close(losses.terms["group"], 0.3 * norms[1::2].sum() / N)
    assert_close(losses.terms["reconstruction"], all_paired.terms["reconstruction"])
    assert_close(all_paired.terms, core.losses(batch()).terms)


@pytest.mark.parametrize("scope", ["step", "sample"])
def test_masks_are_the_same_in_all_streams_and_only_while_training(scope):
    core, b = make(mask_probability=0.4, mask_scope=scope), batch()
    torch.manual_seed(1)
    losses = core.train().losses(b)
    torch.manual_seed(1)
    if scope == "step":
        kept = (torch.rand(M) >= 0.4)[None].float()
    else:
        kept = (torch.rand(N, M) >= 0.4).float()
    codes, _, _ = slowly(core, b[ACTS], kept)
    assert_close(losses.codes.dense(), codes)
    assert 0.3 < float(kept.mean()) < 0.8
    assert_close(core.eval().losses(b).codes.dense(), slowly(core, b[ACTS])[0])


def test_a_mask_may_leave_fewer_than_k():
    core = make(mask_probability=1.0)
    losses = core.train().losses(batch())
    assert losses.codes.l0().max() == 0
    sum(losses.terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in core.parameters() if p.grad is not None)


def test_start_takes_a_bias_for_each_stream_and_rows_stay_unit():
    core, b = make(), batch()
    core.start(b)
    for bias, x in zip(core.b_dec, b[ACTS].values(), strict=True):
        assert (x - bias).norm(dim=-1).mean() <= (x - x.mean(0)).norm(dim=-1).mean() + 1e-4
    optimizer = torch.optim.Adam(core.parameters(), lr=0.1)
    losses = core.losses(b)
    sum(losses.terms.values()).backward()
    core.before_step()
    assert_close((core.W_dec.grad * core.W_dec).sum(-1), torch.zeros(M), atol=1e-5, rtol=0)
    optimizer.step()
    core.after_step(1, losses.codes)
    assert_close(core.W_dec.norm(dim=-1), torch.ones(M))


# ---- acceptance tests T3, T4 and T18, on the "hard" pairs


def batches(rows):
    return {ACTS: dict(zip(("image", "text"), rows.split(32, -1), strict=True))}


def train_flat(core, pool, steps, seed, lr):
    """Full rate from the first step to the last, which is when latents die; with a warm-up hardly any does."""
    core.train()
    core.start(batches(pool))
    g, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(core.parameter_groups(), lr=lr)
    for step in range(1, steps + 1):
        losses = core.losses(batches(pool[torch.randint(0, len(pool), (128,), generator=g)]))
        optimizer.zero_grad()
        sum(losses.terms.values()).backward()
        core.before_step()
        optimizer.step()
        core.after_step(step, losses.codes)


def learnt(seed, m=128, steps=1000, shuffle=False, flat=False, **arguments):
    """Explained variance, codes of both streams, of a core trained on pairs (or on rows paired at random)."""
    torch.set_num_threads(1)
    world = paired_concepts(seed, "hard")
    pool, held = world.draw(8000, 100 + seed), world.draw(1000, 200 + seed)
    pool = pool.shuffled(300 + seed) if shuffle else pool
    torch.manual_seed(400 + seed)
    core = GroupSparse({"image": 32, "text": 32}, m, k=6, **arguments)
    rows = torch.cat(list(pool.x.values()), -1)
    if flat:
        train_flat(core, rows, steps, seed=500 + seed, lr=2e-3)
    else:
        train(core, rows, steps, 128, seed=500 + seed, lr=2e-3, batches=batches)
    with torch.no_grad():
        codes = core.eval().encode(held.x)
        out = torch.cat(list(core.decode(codes).values()), -1)
    x = torch.cat(list(held.x.values()), -1)
    explained = 1 - float((x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    return explained, to_csr(codes[0]), to_csr(codes[1])


def figures(explained, image, text):
    return {
        "ev": explained,
        "jaccard": pair_support_jaccard(image, text),
        "balanced": balanced_share([image, text]),
        "r@1": retrieval(image, text)["r@1"],
        "shared": census([image, text]).shared,
        "dead": census([image, text]).dead,
    }


PLAIN, GROUP = {"group_coefficient": 0.0}, {"group_coefficient": 0.2}
MASKED = {"group_coefficient": 0.2, "mask_probability": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t3_and_t18_pairs_share_latents_and_find_each_other(seed):
    seen = {
        "SAE": figures(*learnt(seed, **PLAIN)),
        "GSAE": figures(*learnt(seed, **GROUP)),
        "MGSAE": figures(*learnt(seed, **MASKED)),
        "GSAE, shuffled": figures(*learnt(seed, shuffle=True, **GROUP)),
        "MGSAE, shuffled": figures(*learnt(seed, shuffle=True, **MASKED)),
    }
    print(seed, {name: {key: round(value, 3) for key, value in row.items()} for name, row in seen.items()})
    plain = seen["SAE"]
    for name in ("GSAE", "MGSAE"):
        ours, control = seen[name], seen[f"{name}, shuffled"]
        assert ours["jaccard"] >= 2 * plain["jaccard"]
        assert ours["balanced"] >= plain["balanced"] + 0.2
        assert ours["r@1"] >= 3 * plain["r@1"]
        assert ours["ev"] >= plain["ev"] - 0.12
        # the control: what pairs alone can teach is lost, but the census does not notice
        assert control["r@1"] <= 0.5 * ours["r@1"]
        assert control["balanced"] >= ours["balanced"] - 0.1
        assert control["shared"] >= ours["shared"] - 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t4_fewer_latents_die(seed):
    arguments = {"SAE": PLAIN, "GSAE": GROUP, "MGSAE": MASKED}
    dead = {name: figures(*learnt(seed, 1024, 600, flat=True, **own))["dead"] for name, own in arguments.items()}
    print(seed, dead)
    # that masks bring a further gain over the group penalty does not hold on seed 1 (61 dead without, 73 with)
    assert max(dead["GSAE"], dead["MGSAE"]) < dead["SAE"]

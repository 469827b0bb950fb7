import pytest
import torch
from synthetic import batch_of, bipolar, scores, train
from torch.testing import assert_close

from mmsae.cores import AbsTopK, TopK
from mmsae.errors import MmsaeError

D, M = 10, 24
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


def core_with_dead(n_dead, **arguments):
    torch.manual_seed(3)
    core = AbsTopK(D, M, k=3, dead_after=100, **arguments).train()
    with torch.no_grad():
        core.b_dec.fill_(0.3)
        core.b_enc.normal_(0, 0.1)
    core.rows_since_fired[:n_dead] = 100
    return core


def test_the_largest_magnitudes_are_kept_with_their_sign():
    core = core_with_dead(0)
    pre, codes = core.pre_activations(X).detach(), core.encode(X).dense().detach()
    assert (codes != 0).sum(-1).tolist() == [3] * len(X)
    assert (codes < 0).any()
    kept = codes != 0
    assert_close(codes[kept], pre[kept])
    assert (pre.abs().masked_fill(kept, 0).amax(-1) <= pre.abs().masked_fill(~kept, torch.inf).amin(-1)).all()


@pytest.mark.parametrize("k_aux", [2, 100])
def test_auxk_ranks_by_magnitude_and_keeps_the_sign(k_aux):
    core = core_with_dead(12, k_aux=k_aux)
    aux = core.losses(batch_of(X)).terms["aux"]
    core.requires_grad_(False)
    pre = ((X - core.b_dec) @ core.W_enc.T + core.b_enc)[:, :12]
    best = pre.abs().topk(min(k_aux, 12), dim=-1).indices
    residual = X - core(X)
    explained = torch.zeros_like(pre).scatter(-1, best, pre.gather(-1, best)) @ core.W_dec[:12]
    spread = (residual - residual.mean(0)).pow(2).sum()
    assert float(aux.detach()) == pytest.approx(float((residual - explained).pow(2).sum() / spread / 32), rel=1e-4)
    core.requires_grad_(True)
    core.losses(batch_of(X)).terms["aux"].backward()
    assert (core.W_enc.grad[:12].abs().amax(-1) > 0).all()
    assert core.W_enc.grad[12:].abs().max() == 0


def test_k_above_the_dictionary_is_refused():
    with pytest.raises(MmsaeError, match="k=30 is larger than d_latent=24"):
        AbsTopK(D, M, k=30)


def bipolar_share(core, x):
    """Of the latents that fire in 1e-3 of the rows or more, those with a quarter or more of their firings on the
    rarer sign."""
    codes = core.encode(x).dense()
    up, down = (codes > 0).sum(0), (codes < 0).sum(0)
    live = up + down >= 1e-3 * len(x)
    return float((torch.minimum(up, down) >= 0.25 * (up + down))[live].float().mean())


@pytest.mark.slow
def test_t20_two_directions_share_a_latent():
    """Acceptance test T20: features of either sign. TopK is the ablation: it needs twice the latents."""
    torch.set_num_threads(1)
    makers = {
        "AbsTopK": lambda: AbsTopK(24, 32, k=3, dead_after=20 * 256),
        "TopK": lambda: TopK(24, 32, k=3, dead_after=20 * 256),
        "TopK, twice the latents": lambda: TopK(24, 64, k=3, dead_after=20 * 256),
    }
    seen, shares = {name: [] for name in makers}, {name: [] for name in makers}
    for seed in (0, 1, 2):
        world = bipolar(32, 24, s=3, seed=seed)
        pool, held = world.rows(30_000, 100 + seed), world.rows(20_000, 200 + seed)
        for name, make in makers.items():
            torch.manual_seed(300 + seed)
            core = train(make(), pool, 1200, 256, 400 + seed, lr=5e-3).eval()
            seen[name].append(scores(core, held, world.features).fvu)
            shares[name].append(bipolar_share(core, held))
    print(seen, shares)

    def gate(high, low, factor):
        """For the mean over the seeds, and for all seeds but one."""
        assert sum(low) <= factor * sum(high)
        assert sum(a <= factor * b for a, b in zip(low, high, strict=True)) >= 2

    gate(seen["TopK, twice the latents"], seen["AbsTopK"], 1.1)
    gate(seen["TopK"], seen["AbsTopK"], 0.5)
    assert min(shares["AbsTopK"]) >= 0.9
    assert max(shares["TopK"] + shares["TopK, twice the latents"]) == 0

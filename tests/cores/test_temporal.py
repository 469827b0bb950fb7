"""T16: activations whose mean and scale drift over the steps of denoising."""

import pytest
import torch
from torch.testing import assert_close

from mmsae import artifact
from mmsae.cores import Affine, Temporal, TopK
from mmsae.errors import MmsaeError
from mmsae.spec import ACTS

D, M, STEPS = 32, 128, 10


def drifting(seed, n=8000, k=3, n_concepts=32):
    """G4: sums of a few of 32 concepts, times `exp(s_t)` and moved by `beta_t`, at ten timesteps; the concepts."""
    g = torch.Generator().manual_seed(seed)
    atoms = torch.randn(n_concepts, D, generator=g)
    atoms /= atoms.norm(dim=-1, keepdim=True)
    chosen = torch.rand(n, n_concepts, generator=g).topk(k).indices
    concepts = torch.zeros(n, n_concepts).scatter(-1, chosen, 0.5 + torch.rand(n, k, generator=g))
    log_scale = 0.5 * torch.randn(STEPS, D, generator=g)
    shift = torch.randn(STEPS, D, generator=g)
    step = torch.randint(STEPS, (n,), generator=g)
    x = (concepts @ atoms + 0.01 * torch.randn(n, D, generator=g)) * log_scale[step].exp() + shift[step]
    return x, step * 100 + 49, concepts


def trained(modulation, seed, x, timestep, steps=400, k=3):
    torch.manual_seed(seed)
    core = Temporal(D, M, k=k, modulation=modulation, n_buckets=STEPS, dead_after=20_000).train()
    core.start({ACTS: {"x": x[:4096]}, "timestep": timestep[:4096]})
    optimizer = torch.optim.Adam(core.parameter_groups(), lr=3e-3)
    g = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50, (steps - step + 1) / (0.3 * steps))
        rows = torch.randint(len(x), (256,), generator=g)
        losses = core.losses({ACTS: {"x": x[rows]}, "timestep": timestep[rows]})
        optimizer.zero_grad()
        sum(losses.terms.values()).backward()
        core.before_step()
        torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        core.after_step(step, losses.codes.detach())
        core.count(losses.codes.firings(), len(rows))
    return core.eval()


@torch.no_grad()
def measured(core, x, timestep, concepts):
    """NMSE, and how well each concept is told by its best latent (correlation)."""
    codes = core.encode(x, {"timestep": timestep})
    nmse = (core.decode(codes) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    both = torch.corrcoef(torch.cat([concepts, codes.dense()], 1).T)[: concepts.shape[1], concepts.shape[1] :]
    return float(nmse), float(both.nan_to_num().max(1).values.mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_drifting_data_the_modulation_explains_more_and_finds_the_concepts(seed):
    x, timestep, concepts = drifting(seed)
    plain, statistics, learned = (
        measured(trained(kind, seed, x[:6000], timestep[:6000]), x[6000:], timestep[6000:], concepts[6000:])
        for kind in ("none", "statistics", "learned")
    )
    assert learned[0] < 0.7 * plain[0]
    assert learned[1] > plain[1] + 0.05
    assert statistics[0] < 0.7 * plain[0]  # the cheap control does it, too
    print(seed, plain, statistics, learned)


def test_it_begins_as_topk():
    torch.manual_seed(0)
    core = Temporal(D, M, k=3)
    plain = TopK(D, M, k=3)
    plain.load_state_dict(core.state_dict(), strict=False)
    x = torch.randn(20, D)
    codes = core.encode(x, {"timestep": torch.arange(20) * 50})
    assert_close(codes.dense(), plain.encode(x).dense())
    assert_close(core.decode(codes), plain(x))


def test_rows_without_a_timestep_are_refused():
    core, x = Temporal(D, M, k=3), torch.randn(4, D)
    with pytest.raises(MmsaeError, match="timestep of every row"):
        core.encode(x)
    with pytest.raises(MmsaeError, match="without a timestep"):
        core.encode(x, {"timestep": torch.tensor([5, -1, 5, 5])})
    with pytest.raises(MmsaeError, match="lost their timesteps"):
        core.decode(TopK(D, M, k=3).encode(x))
    with pytest.raises(MmsaeError, match="modulation='warm'"):
        Temporal(D, M, modulation="warm")


@pytest.mark.parametrize("whiten", [False, True])
def test_a_folded_core_keeps_its_timesteps_through_a_file(whiten, tmp_path):
    x, timestep, _ = drifting(5, n=2000)
    core = trained("learned", 5, x, timestep, steps=30)
    batch = {"timestep": timestep[:50]}
    want = core.decode(core.encode(x[:50], batch))
    scale = torch.eye(D) + 0.1 * torch.randn(D, D) if whiten else torch.tensor(3.0)
    affine = Affine(torch.randn(D), scale)
    core.fold({"x": affine})
    raw = affine.invert(x[:50])
    again = artifact.load(artifact.save(core, tmp_path / "sae"))
    assert_close(again.decode(again.encode(raw, batch)), affine.invert(want), rtol=1e-4, atol=1e-4)
    assert again.dictionary.shape == (M, D)
    assert not torch.allclose(again.rows_at(0), again.rows_at(900))


def test_one_timestep_for_each_example_serves_all_its_positions():
    x, timestep, _ = drifting(6, n=600)
    core = trained("learned", 6, x, timestep, steps=20)
    each = core.encode(x[:12], {"timestep": torch.tensor([49] * 4 + [549] * 4 + [949] * 4)})
    examples = core.encode(x[:12].view(3, 4, D), {"timestep": torch.tensor([49, 549, 949])})
    assert_close(examples.dense().view(12, M), each.dense())
    assert_close(core.decode(examples).view(12, D), core.decode(each))

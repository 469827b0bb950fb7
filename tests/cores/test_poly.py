import pytest
import torch
from synthetic import best_cosines, bind, scores, train
from torch.testing import assert_close

from mmsae.codes import Codes
from mmsae.cores import PolySAE
from mmsae.errors import MmsaeError

D, M = 10, 24
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1))


def core_of(**arguments):
    torch.manual_seed(0)
    return PolySAE(D, M, **{"k": 4, "rank": 9, "rank2": 5, "rank3": 3, **arguments})


@torch.no_grad()
def test_decode_is_the_polynomial():
    core = core_of()
    core.b_dec.normal_()
    codes = core.encode(X)
    for row, z in zip(core.decode(codes), codes.dense(), strict=True):
        a = z @ core.U
        want = core.b_dec.clone()
        for r in range(9):
            want += a[r] * core.C1[:, r]
            want += core.l2 * a[r] ** 2 * core.C2[:, r] if r < 5 else 0
            want += core.l3 * a[r] ** 3 * core.C3[:, r] if r < 3 else 0
        assert_close(row, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_first_order_alone_is_a_linear_dictionary():
    core = core_of(rank2=0, rank3=0)
    codes = core.encode(X)
    assert_close(core.decode(codes), codes.dense() @ core.dictionary + core.b_dec, atol=1e-5, rtol=1e-5)
    curved = core_of()
    codes = curved.encode(X)
    assert (curved.decode(codes) - codes.dense() @ curved.dictionary - curved.b_dec).abs().max() > 1e-2


@torch.no_grad()
def test_interactions_are_the_mixed_derivative_of_the_second_order():
    core = core_of(rank3=0)

    def at(*on):
        z = torch.zeros(1, M)
        z[0, list(on)] = 1
        return core.decode(Codes(z, None, M))[0]

    mixed = at(2, 7) - at(2) - at(7) + at()
    assert_close(core.interactions(torch.tensor([2]), torch.tensor([7]))[0], mixed, atol=1e-5, rtol=1e-5)


def test_gradients_agree_with_finite_differences():
    core = core_of().double()
    indices = torch.randint(0, M, (6, 1)) + torch.tensor([0, 3, 5])
    values = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    parts = [t.detach().clone().requires_grad_() for t in (core.U, core.C1, core.C2, core.C3, core.l2, core.l3)]

    def decoded(values, *parts):
        state = dict(zip(("U", "C1", "C2", "C3", "l2", "l3"), parts, strict=True))
        codes = (values, indices % M)
        return torch.func.functional_call(_Decode(core), {f"core.{k}": v for k, v in state.items()}, codes)

    assert torch.autograd.gradcheck(decoded, (values, *parts))


class _Decode(torch.nn.Module):
    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, values, indices):
        return self.core.decode(Codes(values, indices, M))


def test_columns_stay_orthonormal_and_do_not_flip():
    core = core_of()
    before = core.U.detach().clone()
    train(core, X, 30, 20, seed=0)
    assert_close(core.U.T @ core.U, torch.eye(9), atol=1e-4, rtol=0)
    assert ((core.U * before).sum(0) > 0.5).all()
    rare = core_of(retract_every=100)
    train(rare, X, 30, 20, seed=0)
    assert (rare.U.T @ rare.U - torch.eye(9)).abs().max() > 1e-3
    rare.finish()
    assert_close(rare.U.T @ rare.U, torch.eye(9), atol=1e-4, rtol=0)


def test_the_encoder_starts_along_the_dictionary_and_no_decoder_is_stored():
    core = core_of()
    assert_close(core.W_enc, core.dictionary / core.dictionary.norm(dim=-1, keepdim=True))
    assert "W_dec" not in core.state_dict()


def test_bad_ranks_are_refused():
    with pytest.raises(MmsaeError, match="d_latent=8 is less than rank=10"):
        PolySAE(10, 8, k=2, rank2=4, rank3=4)
    with pytest.raises(MmsaeError, match="rank2=12 is out of range"):
        PolySAE(10, 24, k=2, rank2=12, rank3=4)


def strengths(core, features, pairs):
    """Norm of the interaction of each pair of features, in units of their mean codes; and how often both fire."""
    rows = core.dictionary / core.dictionary.norm(dim=-1, keepdim=True)
    latent = (features @ rows.T).argmax(-1)[pairs]
    return core.interactions(latent[:, 0], latent[:, 1]).norm(dim=-1), latent


@pytest.mark.slow
def test_t10_bound_pairs_need_no_latents_of_their_own():
    """Acceptance test T10: as many latents as features; the linear twin has rank2=0."""
    seen = []
    for seed in (0, 1, 2):
        world = bind(seed)
        features, (bound, _), control = world.features, world.bound, world.control
        pool, held = world.rows(40_000, 100 + seed), world.rows(10_000, 200 + seed)
        figures = {}
        for rank2 in (16, 0):
            torch.manual_seed(300 + seed)
            core = PolySAE(32, 24, k=4, rank=24, rank2=rank2, rank3=0)
            train(core, pool, 3000, 256, seed=400 + seed)
            figures[rank2] = scores(core.eval(), held, features)
            if rank2:
                with torch.no_grad():
                    z = core.encode(held).dense()
                    mean = z.sum(0) / (z > 0).sum(0).clamp_min(1)  # of each latent where it fires
                    both = ((z > 0).float().T @ (z > 0).float()) / len(z)
                    for name, pairs in (("bound", bound), ("control", control)):
                        strength, latent = strengths(core, features, pairs)
                        figures[name] = float((strength * mean[latent].prod(-1)).mean())
                    one, other = torch.triu_indices(24, 24, 1)
                    strength = core.interactions(one, other).norm(dim=-1) * mean[one] * mean[other]
                    figures["corr"] = float(torch.corrcoef(torch.stack([strength, both[one, other]]))[0, 1])
                    figures["cosine"] = float(best_cosines(core, features).mean())
        seen.append(figures)
        print(figures)

    def gate(holds):  # a gate holds for the mean over the seeds, below, and for all seeds but one
        return sum(holds(f) for f in seen) >= 2

    assert gate(lambda f: f[16].fvu <= 0.8 * f[0].fvu)
    assert gate(lambda f: f[16].found >= f[0].found + 0.05)
    assert gate(lambda f: f["bound"] >= 3 * f["control"])
    assert gate(lambda f: f["corr"] < 0.3)
    assert sum(f[16].fvu for f in seen) <= 0.8 * sum(f[0].fvu for f in seen)
    assert sum(f[16].found - f[0].found for f in seen) / 3 >= 0.05
    assert sum(f["bound"] for f in seen) >= 3 * sum(f["control"] for f in seen)
    assert sum(f["corr"] for f in seen) / 3 < 0.3

import pytest
import torch
from synthetic import low_coherence
from torch.testing import assert_close

from mmsae.cores import ReLU, TopK
from mmsae.errors import MmsaeError
from mmsae.metrics.afa import afa, coherence
from mmsae.spec import TARGET

X = torch.randn(50, 10, generator=torch.Generator().manual_seed(1)) + 0.5


def test_coherence_is_the_largest_cosine_between_two_rows():
    rows = torch.randn(1500, 10, generator=torch.Generator().manual_seed(0))  # more than are compared at a time
    unit = rows / rows.norm(dim=-1, keepdim=True)
    cosines = (unit @ unit.T).abs().fill_diagonal_(0)
    assert coherence(rows) == pytest.approx(float(cosines.max()), abs=1e-6)
    assert coherence(torch.eye(5) * 3) == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t5_coherence_bounds_the_difference_of_the_norms(seed):
    """No violation over codes of 1 to 8 latents; with a smaller coherence there are some."""
    features = low_coherence(128, 64, seed)
    g = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 9, (20_000, 1), generator=g)
    rank = torch.rand(20_000, 128, generator=g).argsort(-1).argsort(-1)
    codes = (rank < count) * (0.5 + torch.rand(rank.shape, generator=g))
    gap = ((codes @ features).pow(2).sum(-1) - codes.pow(2).sum(-1)).abs()
    bound = coherence(features) * (count[:, 0] - 1) * codes.pow(2).sum(-1)
    slack = 1e-4  # float32 sums of up to 18
    assert (gap <= bound + slack).all()
    assert (gap > bound / 4 + slack).any()


def test_of_orthonormal_rows_the_estimate_is_the_norm_of_the_reconstruction():
    core = TopK(10, 10, k=3)
    with torch.no_grad():
        core.W_dec.copy_(torch.linalg.qr(torch.randn(10, 10))[0])
        core.W_enc.copy_(core.W_dec)
    found = afa(core, X)
    assert_close(found.estimate, core(X).detach().norm(dim=-1))
    assert_close(found.norm, X.norm(dim=-1))
    assert_close(found.error, 1 - (found.estimate / found.norm) ** 2)
    assert_close(found.epsilon, ((found.norm**2 - found.estimate**2).abs() / (9 * found.estimate**2)))


@pytest.mark.parametrize("dense", [True, False])
def test_the_estimate_weighs_codes_by_decoder_norms_and_adds_the_bias(dense):
    torch.manual_seed(0)
    core = ReLU(10, 300)
    with torch.no_grad():
        core.W_enc *= 10
        core.W_dec *= torch.rand(300, 1) + 0.5
        core.b_dec.normal_()
        core.b_enc.fill_(0.0 if dense else -2.5)
        codes = core.encode(X)
        assert codes.is_dense == dense
        weighted = codes.dense() * core.W_dec.norm(dim=-1)
        want = torch.cat([weighted, core.b_dec.norm().expand(50, 1)], dim=1).norm(dim=-1)
    assert_close(afa(core, X).estimate, want)


def test_transcoders_are_refused():
    with pytest.raises(MmsaeError, match="AFA compares norms"):
        afa(TopK({"x": 10, TARGET: 4}, 20, k=2), X)

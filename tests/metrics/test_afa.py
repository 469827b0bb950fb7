import pytest
import torch
from synthetic import low_coherence
from torch.testing import assert_close

from mmsae.cores import ITDA, VLSAE, AbsTopK, Crosscoder, PolySAE, ReLU, TopK
from mmsae.errors import MmsaeError
from mmsae.metrics.afa import afa, coherence, decoder_norms
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
    found = afa(core, X)["x"]
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
    assert_close(afa(core, X)["x"].estimate, want)


def test_signs_of_codes_do_not_matter():
    torch.manual_seed(0)
    core = AbsTopK(10, 30, k=4)
    with torch.no_grad():
        assert (core.encode(X).values < 0).any()
        want = (core.encode(X).dense() * core.W_dec.norm(dim=-1)).norm(dim=-1)
    assert_close(afa(core, X)["x"].estimate, want)


def test_norms_are_read_off_the_decoder():
    torch.manual_seed(0)
    core = ReLU(10, 1500)  # more than are looked at at a time
    with torch.no_grad():
        core.W_dec *= torch.rand(1500, 1)
        core.b_dec.normal_()
    found = decoder_norms(core)["x"]
    assert_close(found.rows, core.W_dec.detach().norm(dim=-1))
    assert_close(found.bias, core.b_dec.detach().norm())


def test_each_stream_of_a_crosscoder_has_its_own():
    torch.manual_seed(0)
    core = Crosscoder({"a": 10, "b": 7}, 40, init_norm=1.0)
    x = {"a": X, "b": torch.randn(50, 7)}
    found = afa(core, x)
    with torch.no_grad():
        z = core.encode(x).dense()
        want = {stream: (z * rows.norm(dim=-1)).norm(dim=-1) for stream, rows in core.dictionaries.items()}
    assert set(found) == {"a", "b"}
    for stream in want:
        assert_close(found[stream].estimate, want[stream])
        assert_close(found[stream].norm, x[stream].norm(dim=-1))


def test_places_that_itda_did_not_need_are_no_vectors():
    core = ITDA(10, 500, k=3, threshold=0.5)
    core.partial_fit({"acts": {"x": X}})
    found, n = afa(core.eval(), X)["x"], int(core.n_atoms)
    assert n < 50
    assert_close(found.epsilon, (found.norm**2 - found.estimate**2).abs() / ((n - 1) * found.estimate**2))


def test_transcoders_are_refused():
    with pytest.raises(MmsaeError, match="AFA compares norms"):
        afa(TopK({"x": 10, TARGET: 4}, 20, k=2), X)


def test_decoders_with_products_are_refused():
    with pytest.raises(MmsaeError, match="PolySAE also act in products"):
        afa(PolySAE(10, 20, k=2, rank2=4, rank3=2), X)


def test_a_code_for_each_stream_is_compared_with_that_stream():
    torch.manual_seed(0)
    core = VLSAE({"image": 6, "text": 6}, 20, k=4).requires_grad_(False).eval()
    x = {stream: torch.randn(9, 6) for stream in ("image", "text")}
    found = afa(core, x)
    for number, stream in enumerate(x):
        codes = core.encode(x).dense()[number]
        bias = core.b_dec[number].norm()
        want = ((codes * core.decoders[number].norm(dim=-1)).pow(2).sum(-1) + bias**2).sqrt()
        assert_close(found[stream].estimate, want)
        assert_close(found[stream].norm, x[stream].norm(dim=-1))

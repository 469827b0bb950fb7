import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from mmsae.analyses.strongest_tokens import CrossModal, StrongestTokens
from mmsae.codes import Codes
from mmsae.errors import MmsaeError

N, D, M, K = 600, 8, 20, 5


def stream(seed=0, batch=70):
    g = torch.Generator().manual_seed(seed)
    x, kinds = torch.randn(N, D, generator=g) + 0.3, torch.randint(2, (N,), generator=g)
    z = (torch.randn(N, M, generator=g) - 0.8).clamp_min(0)
    z[:, 0] *= kinds == 0  # a latent of words alone
    z[:, 1] = 0
    found = StrongestTokens(M, K, n_random=100)
    found.limit = 50  # forgets as it goes
    for start in range(0, N, batch):
        part = slice(start, start + batch)
        found.update(x[part], Codes(z[part], None, M), kinds[part])
    return x, z, kinds, found


@pytest.mark.parametrize("batch", [70, 600])
def test_weights_are_those_of_a_slow_loop_over_everything(batch):
    x, z, kinds, stream_ = stream(batch=batch)
    found = stream_.conclude(delta=0.1)
    means = [x[kinds == kind].mean(0) for kind in (0, 1)]
    for j in range(M):
        best = [z[:, j].masked_fill(kinds != kind, -1).argsort(descending=True)[:K] for kind in (0, 1)]
        if any((z[rows, j] <= found.threshold[j]).any() for rows in best):
            assert found.weights[j] == found.centred[j] == 0
            continue
        pairs = list(zip(*best, strict=True))  # by rank
        omega = sum(cosine_similarity(x[t], x[v], 0) for t, v in pairs) / K
        centred = sum(cosine_similarity(x[t] - means[0], x[v] - means[1], 0) for t, v in pairs) / K
        assert_close(found.weights[j], omega)
        assert_close(found.centred[j], centred)
        assert found.rows[0, j].tolist() == best[0].tolist()
    assert not found.bimodal[:2].any()
    assert found.bimodal[2:].all()
    assert found.firings[0, 0] == (z[:, 0] > 0).sum()
    assert found.firings[1, 0] == found.firings[:, 1].sum() == 0
    assert found.n_tokens.tolist() == [(kinds == 0).sum(), (kinds == 1).sum()]


def test_only_what_is_among_the_strongest_stays_in_memory():
    *_, found = stream()
    assert sum(len(rows) for rows, _ in found.kept) < 0.8 * N
    found.conclude()
    assert len(found.kept[0][0]) <= 2 * K * M


def test_the_percentile_is_near_the_exact_one():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 3, generator=g).exp() * torch.tensor([1e-3, 1.0, 300.0])
    z[torch.rand(z.shape, generator=g) < 0.5] = 0
    found = StrongestTokens(3, 2)
    found.update(torch.randn(len(z), 2, generator=g), Codes(z, None, 3), torch.arange(len(z)) % 2)
    exact = torch.stack([column[column > 0].quantile(0.999) for column in z.T])
    assert_close(found.quantile(), exact, rtol=0.07, atol=0)  # half of an eighth of an octave


def test_the_null_is_that_of_random_pairs():
    x, _, kinds, found = stream()
    every = cosine_similarity(x[kinds == 0][:, None], x[kinds == 1][None], dim=-1)
    null = found.conclude()
    assert null.null[0] == pytest.approx(float(every.mean()), abs=4 * float(every.std()) / 100**0.5)
    assert abs(null.null[1]) < 4 * float(every.std()) / 100**0.5
    assert len(null.null_draws) == int(null.bimodal.sum())


def test_too_few_tokens_of_a_kind_are_refused():
    found = StrongestTokens(M, K)
    found.update(torch.randn(30, D), Codes(torch.rand(30, M), None, M), torch.zeros(30, dtype=torch.int64))
    with pytest.raises(MmsaeError, match="there are 0 image tokens, too few for the 5 strongest"):
        found.conclude()


def test_stored_weights_are_read_for_the_same_things_only(tmp_path):
    *_, found = stream()
    weights = found.conclude()
    path = tmp_path / "cross_modal.safetensors"
    assert CrossModal.load(path, {"a": 1}) is None
    weights.save(path, {"a": 1, "b": 2})
    again = CrossModal.load(path, {"b": 2, "a": 1})
    assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True))
    assert CrossModal.load(path, {"a": 2, "b": 2}) is None
    path.write_bytes(b"torn")
    assert CrossModal.load(path, {"a": 1, "b": 2}) is None

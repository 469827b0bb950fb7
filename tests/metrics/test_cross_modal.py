"""Every closed form against a slow loop written from the formula."""

import numpy as np
import pytest
import torch
from scipy import sparse

from mmsae.errors import MmsaeError
from mmsae.metrics.code_retrieval import modality_gap, pair_cosine, retrieval, zero_shot
from mmsae.metrics.concept_sets import inter_similarity, intra_similarity, set_means, top_rows
from mmsae.metrics.cross_modal import (
    balanced_share,
    by_stream,
    census,
    firing_rates,
    modality_score,
    pair_support_jaccard,
)
from mmsae.metrics.monosemanticity import monosemanticity, multimodal_monosemanticity

N, M, D = 40, 12, 7


def some_codes(seed, n=N, density=0.2, dead=(0,)):
    codes = sparse.random(n, M, density, "csr", np.float32, random_state=seed).toarray()
    codes[:, list(dead)] = 0
    return sparse.csr_matrix(codes)


A, B = some_codes(0), some_codes(1, dead=(0, 3))
E = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
F = torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def cosine(x, y):
    nx, ny = np.linalg.norm(x), np.linalg.norm(y)
    return float(x @ y / (nx * ny)) if nx and ny else 0.0


# ---- who shares what


def test_census_and_balance_count_latents():
    a, b = A.toarray(), B.toarray()
    counts = {"a": 0, "b": 0, "both": 0, "dead": 0}
    balanced = []
    for i in range(M):
        in_a, in_b = (a[:, i] != 0).sum(), (b[:, i] != 0).sum()
        counts["both" if in_a and in_b else "a" if in_a else "b" if in_b else "dead"] += 1
        if in_a or in_b:
            balanced.append(min(in_a, in_b) / max(in_a, in_b) > 0.5)
    found = census([A, B])
    assert (*found.only, found.shared, found.dead) == (counts["a"], counts["b"], counts["both"], counts["dead"])
    assert found.only == (1, 0)
    assert found.dead == 1
    assert balanced_share([A, B], 0.5) == pytest.approx(np.mean(balanced))
    assert 0 < balanced_share([A, B], 0.5) < 1
    third = census([A, B, some_codes(2, dead=())])
    assert sum(third.only) + third.shared + third.dead == M
    assert third.only[2] == 1
    assert firing_rates([A, B]).shape == (2, M)


def test_modality_score_is_the_share_of_the_first():
    a, b = A.toarray(), B.toarray()
    score = modality_score(A, B)
    assert np.isnan(score[0])
    assert score[3] == 1
    assert score[5] == pytest.approx(a[:, 5].mean() / (a[:, 5].mean() + b[:, 5].mean()))


def test_jaccard_of_supports():
    want = []
    for x, y in zip(A.toarray() != 0, B.toarray() != 0, strict=True):
        want.append((x & y).sum() / (x | y).sum() if (x | y).any() else 0)
    assert pair_support_jaccard(A, B) == pytest.approx(np.mean(want))
    assert pair_support_jaccard(A, A) == pytest.approx((A.toarray() != 0).any(1).mean())


def test_rows_are_matched_by_pair_not_by_order():
    order = np.random.default_rng(0).permutation(N)
    stream = np.r_[np.zeros(N), np.ones(N), np.ones(2)].astype(int)
    pairs = np.r_[np.arange(N), order, [-1, 3]]  # an unpaired row, and a second caption of pair 3
    pairs[5] = -1
    rows = sparse.vstack([A, B[order], some_codes(5, 2)]).tocsc()
    first, second = by_stream(rows, stream, pairs)
    kept = np.delete(np.arange(N), 5)
    assert (first != A[kept]).nnz == 0
    assert (second != B[kept]).nnz == 0
    with pytest.raises(MmsaeError, match="no pair has codes in two streams"):
        by_stream(A, np.zeros(N, int), np.arange(N))


# ---- retrieval


@pytest.mark.parametrize("dense", [False, True])
def test_retrieval_ranks_partners(dense, monkeypatch):
    monkeypatch.setattr("mmsae.metrics.code_retrieval.CHUNK", 7)
    a, b = (E.numpy(), F.numpy() + E.numpy()) if dense else (A.toarray(), B.toarray())
    ranks = []
    for i in range(N):
        similar = [cosine(a[i], b[j]) for j in range(N)]
        higher = sum(s > similar[i] + 1e-9 for s in similar)
        ties = sum(abs(s - similar[i]) <= 1e-9 for s in similar) - 1
        ranks.append(1 + higher + ties / 2)
    ranks = np.array(ranks)
    found = retrieval(torch.from_numpy(a) if dense else A, b if dense else B, ks=(1, 5))
    assert found == pytest.approx({"r@1": (ranks <= 1).mean(), "r@5": (ranks <= 5).mean(), "mrr": (1 / ranks).mean()})


def test_codes_that_are_all_alike_retrieve_nothing():
    assert retrieval(np.ones((9, 3)), np.ones((9, 3)))["r@1"] == 0
    assert retrieval(np.zeros((9, 3)), np.zeros((9, 3)))["mrr"] == pytest.approx(1 / 5)
    assert zero_shot(np.ones((6, 3)), np.ones((3, 3)), np.arange(6) % 3) == pytest.approx(1 / 3)


def test_zero_shot_names_the_nearest_prompt():
    prompts, labels = B[:4].toarray(), np.arange(N) % 4
    want = []
    for i, row in enumerate(A.toarray()):
        similar = np.array([cosine(row, p) for p in prompts])
        best = similar >= similar.max() - 1e-12
        want.append(best[labels[i]] / best.sum())
    assert zero_shot(A, B[:4], labels) == pytest.approx(np.mean(want))
    assert zero_shot(E, E[:4], np.array([0, 1, 2, 3] + [0] * (N - 4))) >= 4 / N


def test_gap_and_pair_cosine():
    e, f = ([row / np.linalg.norm(row) for row in x.numpy()] for x in (E, F))
    assert modality_gap(E, F) == pytest.approx(np.linalg.norm(np.mean(e, 0) - np.mean(f, 0)), rel=1e-5)
    assert modality_gap(A, A) == 0
    assert pair_cosine(A, B) == pytest.approx(
        np.mean([cosine(x, y) for x, y in zip(A.toarray(), B.toarray(), strict=True)])
    )
    assert pair_cosine(E, F) == pytest.approx(np.mean([x @ y for x, y in zip(e, f, strict=True)]), rel=1e-5)


# ---- T6: monosemanticity


def slow_ms(a, e, scaled):
    if scaled:
        if a.max() == a.min():
            return np.nan
        a = (a - a.min()) / (a.max() - a.min())
    top = bottom = 0.0
    for i in range(len(a)):
        for j in range(i):
            top += abs(a[i] * a[j]) * cosine(e[i], e[j])
            bottom += abs(a[i] * a[j])
    return top / bottom if bottom else np.nan


@pytest.mark.parametrize("everywhere", [False, True], ids=["sparse", "fires everywhere"])
def test_t6_ms_is_the_double_loop(everywhere):
    codes = A.toarray().astype(np.float64)
    if everywhere:  # as the codes of a distance encoder may: the least activation is not 0
        codes[:, 4] += 0.6
        codes[:, 5] = 0.7
    codes[:, 6] = 0
    codes[3, 6] = 1.0  # one sample alone
    found = monosemanticity(sparse.csr_matrix(codes), E)
    want = np.array([slow_ms(codes[:, i], E.double().numpy(), scaled=True) for i in range(M)])
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert np.isnan(found[[0, 6]]).all()


def test_t6_mms_is_the_double_loop():
    a, b, e, f = A.toarray(), B.toarray(), E.double().numpy(), F.double().numpy()
    across = multimodal_monosemanticity(A, E, B, F)
    within = multimodal_monosemanticity(A, E)
    for i in range(M):
        weights = np.abs(np.outer(a[:, i], b[:, i]))
        similar = np.array([[cosine(x, y) for y in f] for x in e])
        want = (weights * similar).sum() / weights.sum() if weights.sum() else 0
        assert across[i] == pytest.approx(want, abs=1e-6)
        assert within[i] == pytest.approx(np.nan_to_num(slow_ms(a[:, i], e, scaled=False)), abs=1e-6)
    with pytest.raises(MmsaeError, match="both, or neither"):
        multimodal_monosemanticity(A, E, B)
    with pytest.raises(MmsaeError, match="codes of 40 samples, but 7 embeddings"):
        monosemanticity(A, E[:7])


def test_t6_one_concept_against_none():
    g = torch.Generator().manual_seed(0)
    concept = torch.randint(0, 8, (2000,), generator=g)
    centres = torch.randn(8, 32, generator=g)
    e = centres[concept] + 0.5 * torch.randn(2000, 32, generator=g)
    unit = torch.nn.functional.normalize(e, dim=-1)
    similar = (unit @ unit.T).numpy()
    own = (concept == 3).float()
    codes = sparse.csr_matrix(torch.stack([own, torch.rand(2000, generator=g)], 1).numpy())
    one, random = monosemanticity(codes, e)
    inside = similar[own.bool()][:, own.bool()]
    assert one == pytest.approx((inside.sum() - len(inside)) / (len(inside) * (len(inside) - 1)), abs=1e-5)
    assert random == pytest.approx((similar.sum() - 2000) / (2000 * 1999), abs=0.01)
    assert one > 0.7
    assert random < 0.2


# ---- concept sets


def test_concept_sets_are_the_strongest_rows():
    rows, a = top_rows(A, 5), A.toarray()
    assert (rows[0] == -1).all()
    for i in range(1, M):
        fired = int((a[:, i] > 0).sum())
        assert (rows[i, : min(5, fired)] == np.argsort(-a[:, i], kind="stable")[: min(5, fired)]).all()
        assert (rows[i, fired:] == -1).all()
    means = set_means(A, E, 5, complete=False)
    assert np.isnan(means[0]).all()
    whole = set_means(A, E, 8)
    assert (np.isnan(whole).all(1) == ((a > 0).sum(0) < 8)).all()
    assert np.isnan(whole).all(1).sum() > 1
    np.testing.assert_allclose(means[2], E.double().numpy()[rows[2][rows[2] >= 0]].mean(0))


def test_intra_and_inter_similarity_are_the_loops():
    one, other = set_means(A, E, 5, complete=False), set_means(B, F, 5, complete=False)
    both = [i for i in range(M) if np.isfinite(one[i]).all() and np.isfinite(other[i]).all()]
    assert len(both) == M - 2
    assert intra_similarity(one, other) == pytest.approx(np.mean([cosine(one[i], other[i]) for i in both]))
    pairs = [cosine(one[i], other[j]) for n, i in enumerate(both) for j in both[n + 1 :]]
    assert inter_similarity(one, other) == pytest.approx(np.mean(pairs))
    every = [cosine(one[i], other[j]) for i in both for j in both if i != j]
    assert inter_similarity(one, other, symmetric=True) == pytest.approx(np.mean(every))
    assert np.isnan(intra_similarity(one * np.nan, other))

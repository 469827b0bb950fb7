import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as ReferenceKMeans
from sklearn.decomposition import NMF as ReferenceNMF
from sklearn.decomposition import FastICA
from synthetic import batch_of, low_coherence, train
from torch.testing import assert_close

from mmsae.cores import ICA, NMF, PCA, KMeans, TopK
from mmsae.errors import MmsaeError

X = torch.rand(400, 8, generator=torch.Generator().manual_seed(0)).pow(3) @ torch.rand(
    8, 8, generator=torch.Generator().manual_seed(1)
)


def fitted(core, x):
    for rows in x.split(500):
        core.partial_fit(batch_of(rows))
        core.count(torch.ones(core.d_latent, dtype=torch.int64), len(rows))
    core.finish()
    return core.eval()


def test_kmeans_gives_scikit_learns_labels_and_centres():
    core = fitted(KMeans(8, 5, seed=3), X)
    reference = ReferenceKMeans(5, n_init=1, random_state=3).fit(X.numpy())
    codes = core.encode(X)
    np.testing.assert_array_equal(codes.indices[:, 0].numpy(), reference.labels_)
    assert (codes.values == 1).all()
    np.testing.assert_allclose(core(X).numpy(), reference.cluster_centers_[reference.labels_], atol=1e-5)


def test_nmf_gives_scikit_learns_reconstruction():
    core = fitted(NMF(8, 4, max_iterations=2000, encode_iterations=3000), X)
    reference = ReferenceNMF(4, max_iter=2000, random_state=0)
    weights = reference.fit(X.numpy()).transform(X.numpy())
    np.testing.assert_allclose(core(X).numpy(), reference.inverse_transform(weights), atol=5e-3)
    assert (core.encode(X).values >= 0).all()
    assert (core.dictionary >= 0).all()


def test_nmf_says_what_it_does_to_negative_activations():
    with pytest.warns(UserWarning, match="50% are negative and were taken as 0"):
        fitted(NMF(8, 4, max_iterations=2000), torch.randn(10_000, 8, generator=torch.Generator().manual_seed(0)))


def test_ica_gives_scikit_learns_sources():
    core = fitted(ICA(8, seed=1), X)
    reference = FastICA(8, whiten="unit-variance", random_state=1)
    theirs = reference.fit_transform(X.double().numpy())
    norms = np.linalg.norm(reference.mixing_, axis=0)
    np.testing.assert_allclose(core.encode(X).dense().numpy(), theirs * norms, atol=1e-3)
    assert_close(core(X), X, atol=1e-4, rtol=1e-4)  # as many components as dimensions
    assert_close(core.dictionary.norm(dim=-1), torch.ones(8))


def test_too_few_iterations_are_said():
    with pytest.warns(UserWarning, match="ICA did not converge in 1 iterations"):
        fitted(ICA(8, max_iterations=1), X)


def test_k_keeps_the_largest():
    for cls, size in ((ICA, torch.abs), (NMF, torch.clone)):
        every, cut = fitted(cls(8, 6, max_iterations=1000), X), fitted(cls(8, 6, k=2, max_iterations=1000), X)
        best = size(every.encode(X).dense()).topk(2, dim=-1).values
        assert_close(size(cut.encode(X).values).sort(-1, descending=True).values, best)


def test_bad_settings_are_refused():
    with pytest.raises(MmsaeError, match="d_latent=9"):
        ICA(8, 9)
    with pytest.raises(MmsaeError, match="k=9"):
        NMF(8, 4, k=9)
    with pytest.raises(MmsaeError, match="fewer than d_latent=500"):
        fitted(KMeans(8, 500), X)


def test_a_row_limit_is_kept():
    assert_close(fitted(KMeans(8, 5, max_rows=100), X).dictionary, fitted(KMeans(8, 5), X[:100]).dictionary)


# ---- acceptance test T19


def found(core, features):
    """Share of features with a direction of either sign at a cosine of 0.9."""
    rows = core.dictionary.detach() / core.dictionary.detach().norm(dim=-1, keepdim=True)
    return float(((features @ rows.T).abs().amax(1) > 0.9).float().mean())


def sparse(features, s, n_rows, seed):
    g = torch.Generator().manual_seed(seed)
    on = torch.rand(n_rows, len(features), generator=g) < s / len(features)
    codes = on * (0.5 + torch.rand(on.shape, generator=g))
    return codes @ features + 0.02 * torch.randn(n_rows, features.shape[1], generator=g)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:ICA did not converge")
def test_t19_ica_needs_a_complete_basis_and_topk_does_not(seed):
    torch.set_num_threads(1)
    seen = {}
    for n in (24, 48):
        features = low_coherence(n, 24, seed) if n > 24 else torch.nn.functional.normalize(
            torch.randn(24, 24, generator=torch.Generator().manual_seed(seed)))  # fmt: skip
        x = sparse(features, 3, 10_000, 100 + seed)
        torch.manual_seed(300 + seed)
        topk = train(TopK(24, n, k=3), x, 1500, 256, seed=400 + seed)
        cores = {"ICA": fitted(ICA(24, seed=seed), x), "PCA": fitted(PCA(24), x),
                 "KMeans": fitted(KMeans(24, n, seed=seed), x), "TopK": topk}  # fmt: skip
        for name, core in cores.items():
            seen[n, name] = round(found(core, features), 3)
    print(seed, seen)
    assert seen[24, "ICA"] >= 0.95
    assert seen[48, "TopK"] > seen[48, "ICA"]
    assert seen[24, "PCA"] <= 0.05
    assert seen[48, "PCA"] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:NMF did not converge")
def test_t19_nmf_finds_parts_and_kmeans_clusters(seed):
    """Non-negative parts are for NMF, rows of one feature each for k-means; components of largest variance are not."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(seed)
    parts = (torch.rand(12, 32, generator=g) < 0.2) * (0.5 + torch.rand(12, 32, generator=g))
    parts = parts / parts.norm(dim=-1, keepdim=True)
    on = torch.rand(5000, 12, generator=g) < 0.25
    x = (on * (0.5 + torch.rand(5000, 12, generator=g))) @ parts
    seen = {
        "NMF": found(fitted(NMF(32, 12, seed=seed), x), parts),
        "PCA on parts": found(fitted(PCA(32, 12), x), parts),
    }
    features = low_coherence(32, 24, seed)
    one = torch.randint(0, 32, (5000,), generator=g)
    clusters = (0.5 + torch.rand(5000, 1, generator=g)) * features[one] + 0.02 * torch.randn(5000, 24, generator=g)
    seen["KMeans 4n"] = found(fitted(KMeans(24, 128, seed=seed), clusters), features)
    seen["KMeans n"] = found(fitted(KMeans(24, 32, seed=seed), clusters), features)
    seen["PCA on clusters"] = found(fitted(PCA(24), clusters), features)
    print(seed, {name: round(value, 3) for name, value in seen.items()})
    assert seen["NMF"] >= 0.8
    assert seen["PCA on parts"] <= 0.2
    assert seen["KMeans 4n"] >= 0.9
    assert seen["PCA on clusters"] <= 0.05

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as Reference
from synthetic import batch_of
from torch.testing import assert_close

from mmsae.cores import PCA, Neurons, RandomDictionary
from mmsae.errors import MmsaeError

X = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.arange(1.0, 9)) + 2


def fitted(d_latent=None, k=None):
    core = PCA(8, d_latent, k)
    for part in X.split(70):
        core.partial_fit(batch_of(part))
        core.count(torch.ones(core.d_latent, dtype=torch.int64), len(part))
    core.finish()
    return core


def test_pca_equals_scikit_learn():
    core, reference = fitted(3), Reference(3).fit(X.double().numpy())
    mine, theirs = core.encode(X).dense().numpy(), reference.transform(X.double().numpy())
    signs = np.sign((mine * theirs).sum(0))
    np.testing.assert_allclose(mine * signs, theirs, atol=1e-4)
    np.testing.assert_allclose(core(X).detach().numpy(), reference.inverse_transform(theirs), atol=1e-4)


def test_all_components_reconstruct_everything():
    assert_close(fitted()(X), X, atol=1e-4, rtol=1e-4)


def test_k_keeps_the_largest_magnitudes_with_their_sign():
    codes, every = fitted(k=2).encode(X), fitted().encode(X).dense()
    assert (codes.l0() == 2).all()
    assert (codes.values < 0).any()
    assert_close(codes.values.abs().sort(-1).values, every.abs().topk(2).values.flip(-1))


def test_pca_without_rows_is_refused():
    with pytest.raises(MmsaeError, match="no rows"):
        PCA(8).finish()


def test_neurons_are_the_activations():
    assert_close(Neurons(8).encode(X).dense(), X)
    assert_close(Neurons(8)(X), X)
    with pytest.raises(MmsaeError, match="d_latent=9"):
        Neurons(8, 9)


def test_random_directions_come_from_their_seed():
    one, same, other = RandomDictionary(8, 20, seed=1), RandomDictionary(8, 20, seed=1), RandomDictionary(8, 20, seed=2)
    assert_close(one.dictionary, same.dictionary)
    assert not torch.equal(one.dictionary, other.dictionary)
    assert_close(one.dictionary.norm(dim=-1), torch.ones(20))

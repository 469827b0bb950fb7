from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmsae.kernels import sparse_decode, sparse_decode_groups

M, D = 15, 6


def pairs(shape, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(M, generator=g)[:n] for _ in range(torch.Size(shape).numel())])
    values = torch.randn(*shape, n, generator=g, dtype=torch.float64)
    return values, indices.view(*shape, n), torch.randn(M, D, generator=g, dtype=torch.float64)


def dense(values, indices):
    return values.new_zeros(*values.shape[:-1], M).scatter_add(-1, indices, values)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (1,)], ids=str)
def test_sparse_decode_is_the_dense_product(shape):
    values, indices, dictionary = pairs(shape, 4)
    assert_close(sparse_decode(values, indices, dictionary), dense(values, indices) @ dictionary)


def test_sparse_decode_has_exact_gradients():
    values, indices, dictionary = pairs((5,), 4)
    values.requires_grad_(), dictionary.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(v, indices, w), (values, dictionary))


def test_padding_with_zeros_gets_the_gradient_of_its_value():
    """A kept place with value 0 still tells the encoder which way is up, as in the dense product."""
    values, indices, dictionary = pairs((5,), 4)
    values[:, 2] = 0
    twin = values.clone()
    (sparse_decode(values.requires_grad_(), indices, dictionary) ** 2).sum().backward()
    ((dense(twin.requires_grad_(), indices) @ dictionary) ** 2).sum().backward()
    assert_close(values.grad, twin.grad)


@settings(max_examples=60, deadline=None)
@given(ends=st.sets(st.integers(1, M - 1), max_size=4), n=st.integers(1, M), seed=st.integers(0, 10**6))
def test_groups_decode_their_own_latents(ends, n, seed):
    values, indices, dictionary = pairs((6,), n, seed)
    bounds = [0, *sorted(ends), M]
    groups = sparse_decode_groups(values, indices, dictionary, torch.tensor(bounds[1:]))
    whole = dense(values, indices)
    for number, (low, high) in enumerate(pairwise(bounds)):
        assert_close(groups[:, number], whole[:, low:high] @ dictionary[low:high])
    assert_close(groups.sum(1), sparse_decode(values, indices, dictionary))


def test_groups_have_exact_gradients():
    values, indices, dictionary = pairs((4,), 5)
    values.requires_grad_(), dictionary.requires_grad_()
    ends = torch.tensor([3, 4, 10, M])
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode_groups(v, indices, w, ends), (values, dictionary))

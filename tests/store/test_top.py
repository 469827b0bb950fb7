import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsae.codes import Codes
from mmsae.errors import MmsaeError
from mmsae.store import TopActivations

D = 7
VALUES = st.sampled_from([0.0, -2.0, -1.0, 0.5, 1.0, 1.0, 2.0, 3.5e-40, 65504.0])


@st.composite
def pair_lists(draw):
    """Rows of distinct latents with values that often tie, some of them 0."""
    n_rows, width = draw(st.integers(0, 40)), draw(st.integers(1, D))
    indices = [draw(st.permutations(range(D)))[:width] for _ in range(n_rows)]
    values = draw(st.lists(st.lists(VALUES, min_size=width, max_size=width), min_size=n_rows, max_size=n_rows))
    shape = (n_rows, width)
    return Codes(torch.tensor(values).reshape(shape), torch.tensor(indices, dtype=torch.int64).reshape(shape), D)


def brute_force(codes, n):
    """Sorted, one latent after the other."""
    dense = codes.dense().numpy()
    rows, values = np.full((D, n), -1), np.zeros((D, n), np.float32)
    for latent in range(D):
        column = dense[:, latent]
        order = sorted(np.flatnonzero(column), key=lambda row, c=column: (-abs(c[row]), row))[:n]
        rows[latent, : len(order)], values[latent, : len(order)] = order, column[order]
    return rows, values


def agrees(top, codes, n):
    rows, values = brute_force(codes, n)
    assert np.array_equal(top.rows.numpy(), rows)
    assert np.array_equal(top.values.numpy(), values)
    assert np.array_equal(top.firings.numpy(), (codes.dense() != 0).sum(0).numpy())
    assert top.n_rows == len(codes.values)


@settings(max_examples=150, deadline=None)
@given(codes=pair_lists(), n=st.integers(1, 9), data=st.data())
def test_a_stream_gives_what_sorting_everything_gives(codes, n, data):
    top, start = TopActivations(D, n), 0
    while start < len(codes.values):
        size = data.draw(st.integers(1, 17))
        top.update(codes[start : start + size])
        start += size
    agrees(top, codes, n)


@settings(max_examples=80, deadline=None)
@given(codes=pair_lists(), n=st.integers(1, 5), data=st.data())
def test_neither_order_nor_devices_matter(codes, n, data):
    parts = [TopActivations(D, n), TopActivations(D, n)]
    starts = data.draw(st.permutations(range(0, len(codes.values), 6)))
    for start in starts:
        parts[data.draw(st.integers(0, 1))].update(codes[start : start + 6], first_row=start)
    parts[0].merge(parts[1])
    agrees(parts[0], codes, n)


def test_dense_codes_and_files(tmp_path):
    dense = torch.randn(30, D, generator=torch.Generator().manual_seed(0)).relu()
    top = TopActivations(D, 4)
    top.update(Codes(dense, None, D))
    agrees(top, Codes(dense, None, D), 4)
    assert torch.allclose(top.density, (dense > 0).double().mean(0))
    top.save(tmp_path / "top.safetensors")
    again = TopActivations.load(tmp_path / "top.safetensors")
    agrees(again, Codes(dense, None, D), 4)
    assert torch.equal(again.keys, top.keys)


def test_row_numbers_are_bounded():
    codes = Codes(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), D)
    top = TopActivations(D, 1)
    top.update(codes, first_row=2**31 - 2)
    assert top.rows[0].item() == 2**31 - 2
    with pytest.raises(MmsaeError, match="beyond the"):
        top.update(codes, first_row=2**31 - 1)

"""What the Triton bodies promise; `test_gpu.py` runs this on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from mmsae.cores import TopK
from mmsae.kernels import gpu, products, selection
from mmsae.spec import ACTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype).to(DEVICE)


def on_grid(*shape, seed=0):
    """Multiples of 1/16: their products are exact in fp32, so that any order of a sum gives the same bits."""
    return (normal(*shape, seed=seed) * 16).round() / 16


def csr(lengths, m, dtype=torch.float32, seed=0):
    """Offsets, columns and values of rows with that many pairs each."""
    p = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    columns = torch.randint(m, (p,), generator=generator(seed)).to(DEVICE)
    return offsets, columns, normal(p, dtype=dtype, seed=seed + 1)


def csr_reference(offsets, columns, values, table):
    out = torch.zeros(len(offsets) - 1, table.shape[1], dtype=torch.float64, device=DEVICE)
    rows = torch.repeat_interleave(torch.arange(len(out), device=DEVICE), offsets.diff())
    return out.index_add_(0, rows, values.double()[:, None] * table.double()[columns])


def assert_close_in(dtype, got, want):
    """Sums are made in fp32 at least, so that only the last rounding depends on the dtype of the result.

    The interpreter cuts bf16 off where a GPU rounds: up to 2^-7.
    """
    assert got.dtype == dtype
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert_close(got.double(), want, rtol=rtol, atol=1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 6, 37, 300])
def test_csr_matmul_is_the_dense_product(dtype, d):
    pairs = csr([3, 0, 1, 17, 0, 0, 5, 33, 0], m=11)
    table = normal(11, d, dtype=dtype, seed=2)
    assert_close_in(dtype, gpu.csr_matmul(*pairs, table), csr_reference(*pairs, table))


@pytest.mark.parametrize(
    "lengths",
    [
        [1000, 0, 3],  # whole segments, starts on a boundary
        [1, 1300, 0, 2, 600, 0],  # starts and ends within segments
        [256, 256, 0, 512],  # boundaries only
        [200, 100, 300, 255],  # crosses a boundary, holds no whole segment
        [5000],
        [4] * 120 + [700],  # short rows with few pairs each: another launch shape
    ],
    ids=lambda lengths: str(lengths[-6:]),
)
def test_csr_matmul_of_long_rows(lengths):
    pairs = csr(lengths, m=19)
    table = normal(19, 20, seed=2)
    assert_close(gpu.csr_matmul(*pairs, table).double(), csr_reference(*pairs, table), rtol=1e-5, atol=1e-4)


def test_csr_matmul_repeats_itself_to_the_bit():
    pairs, table = csr([900, 2, 0, 40], m=19), normal(19, 20, seed=2)
    assert torch.equal(gpu.csr_matmul(*pairs, table), gpu.csr_matmul(*pairs, table))


def test_csr_matmul_skips_pairs_of_value_zero_but_not_nan():
    offsets, columns = torch.tensor([0, 2, 3], device=DEVICE), torch.tensor([0, 1, 1], device=DEVICE)
    table = torch.tensor([[float("inf")], [2.0]], device=DEVICE)
    out = gpu.csr_matmul(offsets, columns, torch.tensor([0.0, 3.0, float("nan")], device=DEVICE), table)
    assert out[0].item() == 6
    assert out[1].isnan().all()


def test_csr_matmul_ignores_pairs_outside_of_the_offsets():
    offsets, columns, values = csr([700, 300, 900], m=7)
    table = normal(7, 5, seed=2)
    inner = gpu.csr_matmul(offsets[1:3], columns, values, table)
    assert_close(inner, gpu.csr_matmul(offsets, columns, values, table)[1:2], rtol=1e-5, atol=1e-4)


def test_csr_matmul_takes_strided_arguments_and_values_of_another_dtype():
    offsets, columns, values = csr([3, 4], m=6, dtype=torch.bfloat16)
    strided = [torch.stack([t, t.flip(0)], dim=1)[:, 0] for t in (offsets, columns, values)]
    table = normal(9, 6, seed=2).T
    want = csr_reference(offsets, columns, values, table)
    assert_close(gpu.csr_matmul(*strided, table).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("lengths", "d"), [([], 4), ([0, 0], 4), ([2, 1], 0)], ids=str)
def test_csr_matmul_of_nothing(lengths, d):
    out = gpu.csr_matmul(*csr(lengths, m=3), normal(3, d))
    assert_close(out, torch.zeros(len(lengths), d, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("p", "d"), [(0, 5), (1, 1), (16, 8), (45, 37), (19, 600)])
def test_pair_dots_are_the_dense_products_at_the_pairs(dtype, p, d):
    rows = torch.randint(7, (p,), generator=generator(3)).to(DEVICE)
    columns = torch.randint(9, (p,), generator=generator(4)).to(DEVICE)
    x, table = normal(7, d, dtype=dtype), normal(9, d, dtype=dtype, seed=1)
    want = (x.double() @ table.double().T)[rows, columns]
    assert_close_in(torch.promote_types(dtype, torch.float32), gpu.pair_dots(rows, columns, x, table), want)


def test_pair_dots_of_transposed_tables_in_two_dtypes():
    x, table = normal(5, 3).T, normal(5, 4, dtype=torch.bfloat16, seed=1).T
    rows, columns = torch.tensor([0, 2, 2], device=DEVICE), torch.tensor([3, 0, 1], device=DEVICE)
    got = gpu.pair_dots(rows, columns, x, table)
    assert_close(got, (x @ table.float().T)[rows, columns], rtol=1e-5, atol=1e-5)


def check_select(x, table, bias, k, dtype, signed=False):
    """The same scores, sorted, as a plain top-k of the same product, and each of them at its index."""
    indices, scores = gpu.select(x, table, bias, k, dtype, signed)
    assert indices.dtype == torch.int64
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    assert indices.shape == scores.shape == (len(x), k)
    product = functional.linear(x.to(dtype), table.to(dtype), None if bias is None else bias.to(dtype))
    product = product.to(scores.dtype)
    assert torch.equal(scores, product.gather(1, indices))
    assert all(len(set(row)) == k for row in indices.tolist())
    key = torch.abs if signed else torch.Tensor.clone
    assert torch.equal(key(scores).sort(descending=True).values, key(product).topk(k).values)


@pytest.mark.parametrize("signed", [False, True], ids=["largest", "by magnitude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "k"),
    [
        (5, 40, 3),  # plain top-k
        (5, 512, 4),
        (3, 1003, 7),  # m is no multiple of 16
        (2, 257, 1),
        (1, 64, 1),  # most members of a group are padding
        (2, 10000, 9),  # several programs per row
        (0, 512, 2),
    ],
)
def test_select_keeps_what_topk_keeps(n, m, k, dtype, signed):
    check_select(on_grid(n, 8), on_grid(m, 8, seed=1), on_grid(m, seed=2), k, dtype, signed)


@pytest.mark.parametrize("m", [40, 600])
def test_select_by_chunks_of_rows(m, monkeypatch):
    monkeypatch.setattr(gpu, "MIN_ROWS", 3)
    monkeypatch.setattr(gpu, "CHUNK_BYTES", 1)
    check_select(on_grid(8, 5), on_grid(5, m, seed=1).T, None, 2, torch.float32)


@pytest.mark.parametrize("signed", [False, True], ids=["largest", "by magnitude"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")], ids=["nan", "minus nan"])
def test_select_does_not_hide_nan(dtype, signed, nan):
    bias = normal(700, seed=2)
    bias[[3, 699]] = nan
    bias[5] = float("inf")
    indices, scores = gpu.select(normal(2, 4), normal(700, 4, seed=1), bias, 4, dtype, signed)
    assert all({3, 5, 699} < set(row) for row in indices.tolist())
    assert scores.isnan().sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("signed", [False, True], ids=["largest", "by magnitude"])
@pytest.mark.parametrize("value", [0.0, -0.0, -float("inf"), -3.0, 1.0])
def test_select_never_takes_padding_when_all_scores_tie(value, signed):
    bias = torch.full((401,), value, device=DEVICE)
    indices, scores = gpu.select(torch.zeros(3, 4, device=DEVICE), normal(401, 4), bias, 6, torch.bfloat16, signed)
    assert (indices < 401).all()
    assert all(len(set(row)) == 6 for row in indices.tolist())
    assert (scores == value).all()


def test_select_of_scores_below_zero_is_not_misled_by_padding():
    check_select(on_grid(3, 8), on_grid(401, 8, seed=1), on_grid(401, seed=2) - 100, 6, torch.float32)


def test_select_ignores_autograd():
    x, table = normal(2, 4).requires_grad_(), normal(300, 4).requires_grad_()
    assert not gpu.select(x, table, None, 2, torch.float32)[1].requires_grad


def test_a_training_step_on_these_bodies_has_the_gradients_of_the_dense_formula(monkeypatch):
    """The autograd functions around them, as a core uses them."""
    torch.manual_seed(0)
    core = TopK(24, 256, k=4).double().to(DEVICE).train()
    x = torch.randn(50, 24, dtype=torch.float64).to(DEVICE)
    for module in (products, selection):
        monkeypatch.setattr(module, "bodies", lambda device: gpu)
    core.losses({ACTS: {core.spec.input: x}}).terms["reconstruction"].backward()
    mine = {name: p.grad.clone() for name, p in core.named_parameters()}
    core.zero_grad()
    pre = (x - core.b_dec) @ core.W_enc.T + core.b_enc
    kept = torch.zeros_like(pre).scatter_(1, pre.topk(4).indices, 1.0)
    error = x - ((pre * kept).relu() @ core.W_dec + core.b_dec)
    (error.pow(2).sum(-1).mean() / core.variance).backward()
    assert_close(mine, {name: p.grad for name, p in core.named_parameters()})

import torch
from synthetic import batch_of
from torch.testing import assert_close

from mmsae.cores import ReLU

X = torch.randn(50, 10, generator=torch.Generator().manual_seed(1)) + 0.5


def test_loss_is_squared_error_and_l1_weighted_by_the_decoder_norm():
    core = ReLU(10, 24, l1_coefficient=3.0)
    with torch.no_grad():
        core.b_dec.normal_()
        core.b_enc.normal_()
    error, price = 0.0, 0.0
    core.requires_grad_(False)
    for x in X:
        z = torch.relu(x @ core.W_enc.T + core.b_enc)  # b_dec is not subtracted
        error += float((x - z @ core.W_dec - core.b_dec).pow(2).sum()) / len(X)
        price += 3.0 * sum(float(z[i] * core.W_dec[i].norm()) for i in range(24)) / len(X)
    terms = core.losses(batch_of(X)).terms
    assert_close(terms["reconstruction"], torch.tensor(error))
    assert_close(terms["sparsity"], torch.tensor(price))


def test_the_price_cannot_be_avoided_by_growing_decoder_rows():
    core = ReLU(10, 24)
    before = core.losses(batch_of(X)).terms
    with torch.no_grad():
        factor = torch.rand(24) + 0.5
        core.W_dec *= factor[:, None]
        core.W_enc /= factor[:, None]
        core.b_enc /= factor
    after = core.losses(batch_of(X)).terms
    assert_close(after["sparsity"], before["sparsity"])
    assert_close(after["reconstruction"], before["reconstruction"])
    # without the norm in the price it could
    assert (core.encode(X).dense().sum(-1).mean() - before["sparsity"] / 5).abs() > 0.1

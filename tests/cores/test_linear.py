import torch
from torch.testing import assert_close

from mmsae.cores import ReLU, TopK
from mmsae.spec import ACTS, TARGET

X = torch.randn(64, 10, generator=torch.Generator().manual_seed(1)) + 1


def step(core, optimizer):
    losses = core.losses({ACTS: {"x": X}})
    optimizer.zero_grad()
    torch.stack(list(losses.terms.values())).sum().backward()
    core.before_step()
    gradient = core.W_dec.grad.clone()
    before = core.W_dec.detach().clone()
    optimizer.step()
    core.after_step(1, losses.codes.detach())
    return gradient, before


def test_projected_gradient_is_orthogonal_to_its_row():
    gradient, rows = step(core := TopK(10, 20, k=3), torch.optim.Adam(core.parameters(), lr=0.1))
    assert gradient.abs().max() > 0
    assert (gradient * rows).sum(-1).abs().max() < 1e-6


def test_projection_is_right_for_rows_that_are_not_unit():
    core = TopK(10, 20, k=3)
    with torch.no_grad():
        core.W_dec *= 3
    gradient, rows = step(core, torch.optim.SGD(core.parameters(), lr=0.1))
    assert (gradient * rows).sum(-1).abs().max() < 1e-5


def test_rows_are_unit_after_a_step_of_adam():
    core = TopK(10, 20, k=3)
    optimizer = torch.optim.Adam(core.parameters(), lr=0.1)
    for _ in range(3):
        step(core, optimizer)
        assert_close(core.W_dec.norm(dim=-1), torch.ones(20), rtol=1e-6, atol=1e-6)


def test_free_rows_are_left_alone():
    core = ReLU(10, 20)
    step(core, torch.optim.Adam(core.parameters(), lr=0.1))
    assert (core.W_dec.norm(dim=-1) - 0.1).abs().max() > 0.01


def test_encoder_starts_as_the_transpose_but_shares_no_memory():
    core = TopK(10, 20, k=3)
    assert_close(core.W_enc.data, core.W_dec.data)
    assert core.W_enc.data_ptr() != core.W_dec.data_ptr()


def test_transcoder_reads_the_input_and_reconstructs_the_target():
    core = TopK({"x": 10, TARGET: 4}, 20, k=3)
    y = X[:, :4] ** 2
    core.start({ACTS: {"x": X, TARGET: y}})
    assert not core.subtracts_b_dec
    assert_close(core.b_dec.data, y.mean(0))
    assert core(X).shape == (64, 4)
    losses = core.losses({ACTS: {"x": X, TARGET: y}})
    error = (y - core(X)).pow(2).sum(-1).mean() / (y - y.mean(0)).pow(2).sum(-1).mean()
    assert_close(losses.terms["reconstruction"], error)

import pytest
import torch
from synthetic import batch_of, flat, scores, train
from torch.testing import assert_close

from mmsae.cores import JumpReLU, ReLU, TopK
from mmsae.cores.batch_topk import BatchTopK
from mmsae.cores.jump_relu import _Jump


def smoothed_step(pre, theta, width):
    """The step, averaged over the rectangle kernel: its derivative is what the straight-through estimator gives."""
    return ((pre - theta) / width + 0.5).clamp(0, 1)


def rows(n=4000, m=5):
    g = torch.Generator().manual_seed(0)
    pre = torch.randn(n, m, generator=g, dtype=torch.float64)
    return pre, 0.3 + 0.5 * torch.rand(m, generator=g, dtype=torch.float64)


def finite_difference(loss, theta, h=1e-5):
    gradient = torch.zeros_like(theta)
    for i in range(len(theta)):
        up, down = theta.clone(), theta.clone()
        up[i] += h
        down[i] -= h
        gradient[i] = (loss(up) - loss(down)) / (2 * h)
    return gradient


def test_step_gradient_is_that_of_the_kernel_smoothed_loss():
    pre, theta = rows()
    width = torch.full_like(theta, 0.2)
    theta.requires_grad_()
    _Jump.apply(pre, theta, width)[1].mean().backward()
    want = finite_difference(lambda t: smoothed_step(pre, t, width).sum(-1).mean(), theta.detach())
    # a difference of 2e-5 moves a few of 4000 rows over an edge of the window
    assert_close(theta.grad, want, rtol=5e-3, atol=1e-6)


def test_jump_gradient_is_that_of_the_kernel_smoothed_code():
    pre, theta = rows()
    width = torch.full_like(theta, 0.2)
    weight = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta.requires_grad_()
    (_Jump.apply(pre, theta, width)[0] @ weight).mean().backward()
    # in the window the code is theta at the jump: d/dtheta of theta_0 * smoothed step
    fixed = theta.detach().clone()
    want = finite_difference(lambda t: ((fixed * smoothed_step(pre, t, width)) @ weight).mean(), fixed)
    assert_close(theta.grad, want, rtol=5e-3, atol=1e-6)


def test_pre_activations_just_below_the_threshold_take_part():
    pre = torch.tensor([[0.45]], dtype=torch.float64)
    theta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    width = torch.tensor([0.2], dtype=torch.float64)
    _Jump.apply(pre, theta, width)[1].sum().backward()
    assert_close(theta.grad, torch.tensor([-5.0], dtype=torch.float64))
    core = JumpReLU(1, 1, target_l0=1, threshold=0.5, bandwidth=0.2)
    with torch.no_grad():
        core.W_enc.fill_(1)
        core.W_dec.fill_(1)
    core.losses(batch_of(torch.full((3, 1), 0.45))).terms["sparsity"].backward()
    assert core.theta.grad.item() == pytest.approx(-5.0)


def test_code_passes_its_gradient_above_the_threshold_only():
    pre = torch.tensor([[0.45, 0.55, -1.0]], requires_grad=True)
    theta, width = torch.full((3,), 0.5), torch.full((3,), 0.2)
    _Jump.apply(pre, theta, width)[0].sum().backward()
    assert pre.grad.tolist() == [[0, 1, 0]]


def test_pairs_and_the_dense_matrix_give_the_same_losses_and_gradients():
    """Few fire: pairs. Many fire: dense. With float64 parameters both are exact."""
    torch.manual_seed(0)
    x = torch.randn(300, 12, dtype=torch.float64)
    found = []
    for n_more in (0, 12):  # latents that always fire decide for the dense matrix, and contribute nothing
        core = JumpReLU(12, 300, target_l0=8, threshold=2.5, bandwidth=0.5).double().train()
        core.load_state_dict({**core.state_dict(), **(found[0][2] if found else {})})
        if not found:
            core.start(batch_of(x))
        state = {name: tensor.clone() for name, tensor in core.state_dict().items()}
        with torch.no_grad():
            core.theta[:20] = -100.0 if n_more else 100.0
            core.W_dec[:20] = 0
        codes = core.encode(x)
        assert codes.is_dense == bool(n_more)
        losses = core.losses(batch_of(x))
        losses.terms["reconstruction"].backward()
        grads = {name: p.grad[20:] for name, p in core.named_parameters() if name != "b_dec"}
        found.append((losses.terms["reconstruction"], grads, state))
    assert_close(found[0][0], found[1][0])
    assert found[0][1]["theta"].abs().max() > 0
    assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("shape", [(24,), (2, 12)], ids=str)
def test_leading_dimensions_change_nothing(shape):
    core = JumpReLU(5, 7, target_l0=2, threshold=0.2)
    x = torch.randn(24, 5)
    assert_close(core(x.view(*shape, 5)), core(x).view(*shape, 5))
    assert_close(core.encode(x.view(*shape, 5)).dense(), core.encode(x).dense().view(*shape, 7))


def test_thresholds_stay_at_or_above_zero():
    torch.manual_seed(0)
    core = JumpReLU(10, 24, threshold=0.0, sparsity_coefficient=0.0, target_l0=4)
    x = torch.randn(64, 10)
    optimizer = torch.optim.SGD(core.parameter_groups(), lr=1.0)
    core.theta.grad = torch.ones(24)
    optimizer.step()
    assert (core.theta < 0).all()
    core.after_step(1, core.encode(x))
    assert (core.theta == 0).all()


def test_start_puts_threshold_and_window_into_units_of_the_pre_activations():
    x = 100 * torch.randn(500, 10)
    core = JumpReLU(10, 24, threshold=0.1, target_l0=4)
    core.start(batch_of(x))
    rms = (x @ core.W_enc.T + core.b_enc).pow(2).mean().sqrt()
    assert_close(core.theta.data, (0.1 * rms).expand(24))
    assert_close(core.unit, rms.detach().expand(24))


def test_sparsity_losses_equal_their_formulas():
    x = torch.randn(40, 10)
    for kind in ("step", "tanh", "target_l0"):
        core = JumpReLU(10, 24, sparsity_coefficient=2.0, sparsity_loss=kind, target_l0=4, threshold=0.3, dead_after=5)
        core.rows_since_fired[:8] = 5
        pre = x @ core.W_enc.T + core.b_enc
        l0 = (pre > core.theta).float().sum(-1).mean()
        codes = pre * (pre > core.theta)
        want = {
            "step": 2 * l0,
            "tanh": 2 * (4 * codes * core.W_dec.norm(dim=-1)).tanh().sum(-1).mean(),
            "target_l0": 2 * (l0 / 4 - 1) ** 2,
        }[kind]
        terms = core.losses(batch_of(x)).terms
        assert_close(terms["sparsity"], want)
        if kind == "tanh":
            revive = ((core.theta - pre).relu() * core.W_dec.norm(dim=-1))[:, :8].sum(-1).mean()
            assert_close(terms["aux"], 3e-6 * revive)


@pytest.mark.slow
def test_t1_every_core_beats_l1_at_the_same_l0():
    """Acceptance test T1, for the cores that are here."""
    torch.set_num_threads(1)
    makers = {
        "L1": (lambda: ReLU(40, 64, l1_coefficient=0.05), "l1_coefficient"),
        "JumpReLU": (lambda: JumpReLU(40, 64, sparsity_coefficient=0.02), "sparsity_coefficient"),
        "TopK": (lambda: TopK(40, 64, k=4, dead_after=20 * 256), ""),
        "BatchTopK": (lambda: BatchTopK(40, 64, k=4, dead_after=20 * 256), ""),
    }
    seen = {name: [] for name in makers}
    batch_mode = []
    for seed in (0, 1, 2):
        data = flat(64, 40, 4, seed=seed)
        pool, held = data.rows(30_000, 100 + seed), data.rows(20_000, 200 + seed)
        for name, (make, coefficient) in makers.items():
            torch.manual_seed(300 + seed)
            core = make()
            train(core, pool, 2500, 256, 400 + seed, target_l0=4.0 if coefficient else None, coefficient=coefficient)
            seen[name].append(scores(core.eval(), held, data.features))
            if name == "BatchTopK":
                batch_mode.append(scores(core, held, data.features, mode="train"))
    for name, values in [*seen.items(), ("BatchTopK in batch mode", batch_mode)]:
        print(name, *values, sep="\n  ")

    def mean(values):
        return sum(values) / len(values)

    def gate(holds):
        """For the mean over the seeds, and for all seeds but one."""
        return sum(holds) >= 2

    l1 = [s.fvu for s in seen["L1"]]
    for name in ("JumpReLU", "TopK", "BatchTopK"):
        fvu = [s.fvu for s in seen[name]]
        assert mean(fvu) <= 0.85 * mean(l1), name
        assert gate([a <= 0.85 * b for a, b in zip(fvu, l1, strict=True)]), name
    assert mean([s.shrink for s in seen["L1"]]) < 0.75
    for name, values in seen.items():
        assert mean([s.found for s in values]) >= 0.85, name
        assert gate([s.found >= 0.85 for s in values]), name
    for batch, threshold in zip(batch_mode, seen["BatchTopK"], strict=True):
        assert threshold.fvu == pytest.approx(batch.fvu, rel=0.02)
        assert threshold.l0 == pytest.approx(batch.l0, rel=0.05)

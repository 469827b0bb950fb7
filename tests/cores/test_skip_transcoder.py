import pytest
import torch
from synthetic import train
from torch.testing import assert_close

from mmsae.codes import Codes
from mmsae.cores import BatchTopK, JumpReLU, JumpReLUSkipTranscoder, SkipTranscoder, TopK
from mmsae.errors import MmsaeError
from mmsae.spec import ACTS, TARGET

D, OUT, M = 6, 4, 16
SPEC = {"x": D, TARGET: OUT}


def batch(rows, d=D):
    return {ACTS: {"x": rows[:, :d], TARGET: rows[:, d:]}}


X = torch.randn(300, D, generator=torch.Generator().manual_seed(0)) + 2
ROWS = torch.cat([X, X[:, :OUT].abs() * X[:, 1 : OUT + 1].sign() + 5], -1)


def test_it_starts_at_the_mean_of_the_target():
    core = SkipTranscoder(SPEC, M, k=3)
    core.start(batch(ROWS))
    assert_close(core(ROWS[:, :D]), ROWS[:, D:].mean(0).expand(300, OUT))


@torch.no_grad()
def test_reconstruction_is_the_formula():
    torch.manual_seed(0)
    core = SkipTranscoder(SPEC, M, k=3)
    for p in core.parameters():
        p.normal_()
    x = ROWS[:, :D]
    pre = (x @ core.W_enc.T + core.b_enc).relu()  # the input is not centred by b_dec
    codes = torch.zeros_like(pre).scatter(-1, pre.topk(3).indices, pre.topk(3).values)
    assert_close(core(x), codes @ core.W_dec + core.b_dec + x @ core.W_skip.T, rtol=1e-4, atol=1e-4)
    assert_close(core.skip(x), x @ core.W_skip.T)


def test_the_path_helps_jump_relu_too():
    """On a linear function; the ablation is the transcoder without the path, at the same price."""
    x = 2 * torch.randn(2000, D, generator=torch.Generator().manual_seed(1))
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))[0]
    rows, seen = torch.cat([x, x @ turn + 3], -1), {}
    for cls in (JumpReLU, JumpReLUSkipTranscoder):
        torch.manual_seed(0)
        core = cls({"x": D, TARGET: D}, M, sparsity_coefficient=1.0, target_l0=4)
        train(core, rows, 400, 200, seed=1, lr=1e-2, batches=batch)
        seen[cls] = target_fvu(core.eval()(x), rows[:, D:]), float(core.encode(x).l0().float().mean())
    print(seen)
    assert seen[JumpReLUSkipTranscoder][0] < 0.5 * seen[JumpReLU][0]
    assert seen[JumpReLUSkipTranscoder][1] < seen[JumpReLU][1]


def test_every_part_receives_a_gradient_and_auxk_trains_the_dead_encoder():
    core = SkipTranscoder(SPEC, M, k=3, dead_after=10).train()
    core.start(batch(ROWS))
    torch.nn.init.normal_(core.W_dec)
    core.rows_since_fired[:5] = 10
    terms = core.losses(batch(ROWS)).terms
    terms["aux"].backward(retain_graph=True)
    assert core.W_enc.grad[:5].abs().max() > 0
    assert core.W_skip.grad is None or core.W_skip.grad.abs().max() == 0  # the residual is detached
    terms["reconstruction"].backward()
    assert core.W_skip.grad.abs().max() > 0


def test_codes_without_the_affine_part_are_refused():
    core = SkipTranscoder(SPEC, M, k=3)
    codes = core.encode(ROWS[:, :D])
    stored = Codes(codes.values, codes.indices, codes.d_latent)  # as a store gives them back
    with pytest.raises(MmsaeError, match="do not carry the affine part of a SkipTranscoder, which no store"):
        core.decode(stored)
    stored.extra["skip"] = core.skip(ROWS[:, :D])
    assert_close(core.decode(stored), core.decode(codes))


def test_data_without_a_target_are_refused():
    with pytest.raises(MmsaeError, match="needs a stream 'target'"):
        SkipTranscoder(6, M, k=3)


@pytest.mark.parametrize("cls", [SkipTranscoder, TopK, BatchTopK])
@pytest.mark.parametrize("normalise", ["none", "center_scale", "whiten"])
def test_a_transcoder_trains_by_the_module_and_its_export_takes_raw_rows(cls, normalise, tmp_path):
    import lightning as L

    from mmsae.training.module import SAEModule

    torch.manual_seed(0)
    module = SAEModule(cls(SPEC, M, k=3), normalise=normalise, lr_warmup_steps=1,
                       optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))  # fmt: skip
    loader = torch.utils.data.DataLoader([batch(r) for r in ROWS.split(50)], batch_size=None)
    trainer = L.Trainer(max_epochs=30, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(module, loader)
    core = module.export()
    assert core(ROWS[:, :D]).shape == (300, OUT)
    raw = batch(ROWS)
    normalised = module.normalised(raw)
    inside = module.core.eval()(module.core.inputs(normalised))
    assert_close(core(ROWS[:, :D]), module.normalisers[TARGET].invert(inside), rtol=1e-3, atol=1e-3)
    error = trainer.validate(module, loader, verbose=False)[0]["val/fvu"]
    target = ROWS[:, D:]
    assert error == pytest.approx(target_fvu(core(ROWS[:, :D]), target), rel=1e-3)
    assert error < 0.8


def mlp(seed, d=32, hidden=128):
    """A function `y = MLP(x) + x S / 2`."""
    g = torch.Generator().manual_seed(seed)
    up, down, line = (
        torch.randn(*shape, generator=g) / shape[0] ** 0.5 for shape in ((d, hidden), (hidden, d), (d, d))
    )
    return lambda x: (x @ up).relu() @ down + 0.5 * x @ line


@torch.no_grad()
def target_fvu(prediction, y):
    return float((y - prediction).pow(2).sum() / (y - y.mean(0)).pow(2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t17_the_affine_path_helps(seed):
    """Acceptance test T17; the ablation is the transcoder without the path, and the path without latents."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(100 + seed)
    function = mlp(seed)
    x, held = torch.randn(30_000, 32, generator=g), torch.randn(5000, 32, generator=g)
    y = function(held)
    seen = {}
    for cls in (TopK, SkipTranscoder):
        torch.manual_seed(300 + seed)
        core = cls({"x": 32, TARGET: 32}, 256, k=8)
        train(core, torch.cat([x, function(x)], -1), 2000, 256, seed=400 + seed, lr=2e-3,
              batches=lambda rows: batch(rows, 32))  # fmt: skip
        seen[cls.__name__] = target_fvu(core.eval()(held), y)
    one = torch.cat([x, torch.ones(len(x), 1)], -1)
    solution = torch.linalg.lstsq(one, function(x)).solution
    seen["affine"] = target_fvu(torch.cat([held, torch.ones(len(held), 1)], -1) @ solution, y)
    print(seed, seen)
    assert seen["SkipTranscoder"] <= 0.7 * seen["TopK"]
    assert seen["SkipTranscoder"] < seen["affine"]

"""What a user sees of a training: numbers over whole splits, counters, schedules, precision, refusals."""

from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Fixed, Recorder, adam, batches_of, live, planted, trainer
from torch.utils.data import DataLoader

from mmsae.cores import PCA, BatchTopK, JumpReLU, ReLU, TopK
from mmsae.errors import MmsaeError
from mmsae.spec import ACTS, ActivationSpec
from mmsae.training.module import SAEModule

X = planted(600)
SPEC = ActivationSpec({"x": X.shape[1]})
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of Lightning about our sizes


def module(core=None, **arguments):
    torch.manual_seed(0)
    return SAEModule(core or TopK(X.shape[1], 16, k=3), **{"optimizer": adam(), "lr_warmup_steps": 5, **arguments})


def test_fvu_is_that_of_the_whole_split_and_not_a_mean_over_batches():
    # batches of different size and place: the mean of their own FVUs is another number
    x = torch.cat([X[:50], 3 * X[50:53] + 5, X[53:130] - 4])
    data = Fixed(batches_of(X, 100), [x[:50], x[50:53], x[53:]])
    fitted, run = module(normalise="center_scale"), trainer()
    run.fit(fitted, data)
    found = run.validate(fitted, data, verbose=False)[0]
    with torch.no_grad():
        out = fitted.export()(x).double().numpy()
    wide = x.double().numpy()
    fvu = ((wide - out) ** 2).sum() / ((wide - wide.mean(0)) ** 2).sum()
    # the module normalises and inverts in float32, the export folds: a few float32 roundings apart
    assert found["val/fvu"] == pytest.approx(fvu, rel=1e-4)
    assert found["val/explained_variance"] == pytest.approx(1 - fvu, rel=1e-4)
    own = [((w - o) ** 2).sum() / ((w - w.mean(0)) ** 2).sum()
           for w, o in zip(np.split(wide, [50, 53]), np.split(out, [50, 53]), strict=True)]  # fmt: skip
    assert abs(np.mean(own) - fvu) > 0.05
    l0 = fitted.export().encode(x).l0().double().mean()
    assert found["val/l0"] == pytest.approx(float(l0), abs=1e-6)


def test_nothing_is_validated_before_the_first_step():
    data = Fixed(batches_of(X, 100), [X[:50]])
    run = trainer(num_sanity_val_steps=2, max_steps=1)
    run.fit(module(BatchTopK(X.shape[1], 16, k=3)), data)  # has no threshold before the first step
    assert run.global_step == 1


@pytest.mark.parametrize("accumulate", [1, 3])
def test_dead_latents_are_counted_in_rows_over_all_micro_batches(accumulate):
    core = TopK(X.shape[1], 16, k=3)
    with torch.no_grad():
        core.b_enc[:2] = torch.tensor([-1e6, -1e6])  # never fire
    fired = []
    count = core.count
    core.count = lambda firings, n: (fired.append(firings.clone()), count(firings, n))[1]
    data = Fixed(batches_of(X[:540], 60))
    trainer(max_steps=-1, max_epochs=1, accumulate_grad_batches=accumulate).fit(module(core, gradient_clip=0), data)
    assert core.rows_seen == 540
    assert core.rows_since_fired[:2].tolist() == [540, 540]
    since = torch.zeros(16, dtype=torch.int64)
    for firings in fired:
        since = torch.where(firings > 0, 0, since + 60)
    assert len(fired) == 9
    assert torch.equal(core.rows_since_fired, since)


def test_a_latent_that_fires_only_in_an_earlier_micro_batch_is_alive():
    """Counting only what the optimizer step saw would call it dead."""
    core = TopK(2, 2, k=1)
    with torch.no_grad():
        core.W_enc.copy_(torch.eye(2))
        core.W_dec.copy_(torch.eye(2))
    east, north = torch.tensor([[1.0, 0.0]]).repeat(10, 1), torch.tensor([[0.0, 1.0]]).repeat(10, 1)
    core.start = lambda batch: None  # its b_dec would move the picture
    fitted = SAEModule(core, normalise="none", optimizer=adam(0.0))
    trainer(max_steps=1, accumulate_grad_batches=2).fit(fitted, Fixed([east, north]))
    assert core.rows_since_fired.tolist() == [10, 0]
    assert core.rows_seen == 20


@pytest.mark.parametrize(
    "make",
    [partial(TopK, k=3), partial(BatchTopK, k=3), partial(JumpReLU, target_l0=4), partial(ReLU, decoder_norm="unit")],
)
def test_decoder_rows_are_unit_after_training_and_in_the_checkpoint(make, tmp_path):
    fitted = module(make(X.shape[1], 16))
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    norms = Recorder(lambda _, m: m.core.W_dec.norm(dim=1))
    trainer(callbacks=[keep, norms]).fit(fitted, Fixed(batches_of(X, 100)))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    saved = [torch.load(f, weights_only=True)["state_dict"]["cores.main.W_dec"].norm(dim=1) for f in files]
    for norm in (*norms.found, *saved):
        # dividing a float32 row by its float32 norm leaves an error of a few units in the last place
        assert (norm - 1).abs().max() < 5e-7


def test_gradients_are_projected_before_they_are_clipped_each_dictionary_by_itself():
    """Clipping first would let the part that is thrown away eat the budget."""
    other = 100 * X
    data = Fixed([X[:100]])
    data.spec = ActivationSpec({"x": 8, "y": 8})
    data.train_dataloader = lambda: DataLoader(dataset=[{ACTS: {"x": X[:100], "y": other[:100]}}], batch_size=None)
    torch.manual_seed(0)
    beside = {"y": partial(ReLU, d_latent=16, l1_coefficient=0, decoder_norm="unit")}
    fitted = SAEModule(
        partial(TopK, d_latent=16, k=3), data.spec, beside, normalise="none", optimizer=adam(), gradient_clip=0.01
    )
    unit = {name: core.W_dec.detach().clone() for name, core in fitted.cores.items()}  # unit rows from the start
    plain, seen = fitted.optimizer_step, {}

    def optimizer_step(*args, **kwargs):
        plain(*args, **kwargs)
        for name, core in fitted.cores.items():  # the gradients that the optimizer got
            norm = torch.cat([p.grad.flatten() for p in core.parameters()]).norm()
            seen[name] = (norm, (core.W_dec.grad * unit[name]).sum(1).abs().max())

    fitted.optimizer_step = optimizer_step
    trainer(max_steps=1).fit(fitted, data)
    assert set(seen) == {"main", "y"}
    for norm, along in seen.values():
        assert norm == pytest.approx(0.01, rel=1e-4)  # clip_grad_norm_ divides by norm + 1e-6
        assert along < 1e-7  # of 0.01: nothing along the rows is left after clipping
    assert list(fitted.cores["y"].spec.streams) == ["y"]


def test_learning_rate_rises_stays_and_falls():
    run = trainer(max_steps=100)
    rates = {}

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer, m, *_):
            rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]

    run.callbacks.append(Rates())
    run.fit(module(lr_warmup_steps=10, lr_decay=0.2, optimizer=adam(1.0)), Fixed(batches_of(X, 100)))
    assert rates[0] == pytest.approx(0.1)  # the first step is not thrown away
    assert rates[4] == pytest.approx(0.5)
    assert {rates[step] for step in range(9, 80)} == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_schedule_steps_let_two_runs_share_one_schedule():
    fitted = module(lr_warmup_steps=0, lr_decay=0.5, schedule_steps=40, optimizer=adam(1.0))
    run = trainer(max_steps=10)
    run.fit(fitted, Fixed(batches_of(X, 100)))
    assert run.optimizers[0].param_groups[0]["lr"] == 1.0  # of 40 steps, a half is still to come


def test_the_price_of_sparsity_rises_over_its_share_of_the_steps():
    core = ReLU(X.shape[1], 16, l1_coefficient=1.0)
    raw, plain = [], core.losses

    def losses(batch):
        found = plain(batch)
        raw.append(float(found.terms["sparsity"]))
        return found

    core.losses = losses
    logged = Recorder(lambda t, _: float(t.callback_metrics["loss/sparsity"]))
    fitted = module(core, sparsity_warmup=0.5)
    trainer(max_steps=20, callbacks=[logged]).fit(fitted, Fixed(batches_of(X, 100)))
    ramp = [paid / full for paid, full in zip(logged.found, raw, strict=True)]
    assert ramp == pytest.approx([min(1.0, step / 10) for step in range(1, 21)], rel=1e-5)


def test_mixed_precision_keeps_float32_weights_and_moments_and_fidelity():
    def fitted(precision):
        one = module(normalise="center_scale")
        run = trainer(max_steps=300, precision=precision)
        run.fit(one, Fixed(batches_of(X, 200)))
        kinds = {p.dtype for p in one.parameters()}
        kinds |= {v.dtype for s in run.optimizers[0].state.values() for v in s.values() if v.ndim}
        return one, kinds

    (full, _), (mixed, kinds) = fitted("32-true"), fitted("bf16-mixed")
    assert kinds == {torch.float32}
    held = planted(2000, seed=5)
    fvu = [((held - m.export()(held)).pow(2).sum() / (held - held.mean(0)).pow(2).sum()).item() for m in (full, mixed)]
    assert not torch.equal(full.core.W_dec, mixed.core.W_dec)  # autocast was on
    assert fvu[1] == pytest.approx(fvu[0], rel=0.05)  # engineering.md 4.13


@pytest.mark.parametrize("what", ["activations", "loss"])
def test_nan_stops_with_step_and_hook_point_and_the_last_checkpoint_loads(what, tmp_path):
    stream = "encoder.blocks.3"
    batches = batches_of(X, 50)
    core = TopK({stream: X.shape[1]}, 16, k=3)
    if what == "activations":
        batches[7] = batches[7].clone()
        batches[7][3, 2] = torch.nan
        said = rf"step 8: activations at {stream} are not finite.*last good checkpoint is kept"
    else:
        plain, calls = core.losses, []

        def losses(batch):
            found = plain(batch)
            calls.append(1)
            if len(calls) == 8:
                found.terms["reconstruction"] = found.terms["reconstruction"] * torch.inf
            return found

        core.losses = losses
        said = rf"step 8: the loss of TopK on {stream} is not finite.*A lower learning rate"
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="{step}", save_last=True)
    fitted = module(core, sample_rows=50)
    with pytest.raises(MmsaeError, match=said):
        trainer(callbacks=[keep]).fit(fitted, Fixed(batches, stream=stream))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 6
    again = module(TopK({stream: X.shape[1]}, 16, k=3))
    run = trainer(max_steps=9)
    run.fit(again, Fixed(batches_of(X, 50), stream=stream), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert run.global_step == 9
    assert all(p.isfinite().all() for p in again.parameters())


def test_nan_in_the_first_rows_is_told_before_training():
    bad = X[:50].clone()
    bad[0, 0] = torch.inf
    with pytest.raises(MmsaeError, match="activations at x are not finite in the first 50 rows"):
        trainer().fit(module(sample_rows=50), Fixed([bad, X[50:100]]))


def test_broken_weights_are_never_saved(tmp_path):
    fitted, run = module(), trainer()
    run.fit(fitted, Fixed(batches_of(X, 100)))
    with torch.no_grad():
        fitted.core.b_enc[0] = torch.nan
    with pytest.raises(MmsaeError, match=r"main\.b_enc is not finite at step 20"):
        run.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_gradient_free_cores_take_one_pass():
    data = Fixed(batches_of(X, 100), [X[:100]])
    fitted = module(PCA(X.shape[1]), normalise="none")
    run = trainer(max_steps=1000)
    run.fit(fitted, data)
    assert fitted.core.rows_seen == len(X)
    assert run.current_epoch == 1
    wide = X.double()
    vectors = torch.linalg.eigh((wide - wide.mean(0)).T @ (wide - wide.mean(0))).eigenvectors.flip(-1).T
    cosines = (fitted.core.W_dec.double() * vectors).sum(1).abs()
    assert (1 - cosines).max() < 1e-6  # float32 components of a float64 decomposition
    assert run.validate(fitted, data, verbose=False)[0]["val/fvu"] == pytest.approx(0, abs=1e-6)


def test_a_baseline_beside_a_trained_dictionary():
    fitted = module(also={"pca": PCA(X.shape[1], k=3)})
    data = Fixed(batches_of(X, 100), [X[:100]])
    run = trainer()
    run.fit(fitted, data)
    found = run.validate(fitted, data, verbose=False)[0]
    assert run.global_step == 20
    assert 0 < found["val/pca/fvu"] < 1
    assert 0 < found["val/fvu"] < 1


@pytest.mark.parametrize("normalise", ["none", "center", "scale", "center_scale", "whiten"])
def test_the_export_takes_raw_activations(normalise):
    for core in (TopK(8, 16, k=3), BatchTopK(8, 16, k=3), ReLU(8, 16), JumpReLU(8, 16, target_l0=4)):
        fitted = module(core, normalise=normalise)
        trainer().fit(fitted, Fixed(batches_of(X, 100)))
        before = {k: v.clone() for k, v in fitted.state_dict().items()}
        exported = fitted.export()
        fitted.eval()
        with torch.no_grad():
            batch = fitted.normalised({ACTS: {"x": X}})
            codes = fitted.core.encode(batch[ACTS]["x"], batch)
            raw = fitted._normaliser("x").invert(fitted.core.decode(codes))
        own = exported.encode(X)
        # a pre-activation within rounding of its threshold may fall on the other side after folding
        same = ((own.dense() != 0) == (codes.dense() != 0)).all(1)
        assert same.float().mean() > 0.99
        assert torch.allclose(exported(X)[same], raw[same], rtol=1e-3, atol=1e-3 * float(X.std()))
        assert not exported.training
        assert not any(p.requires_grad for p in exported.parameters())
        assert all(torch.equal(before[k], v) for k, v in fitted.state_dict().items())  # the module goes on training


def test_another_width_is_refused_before_any_work():
    with pytest.raises(MmsaeError, match=r"reads 'x' with d_in=9, but the data have x \(8\)"):
        trainer().fit(module(TopK(9, 16, k=3)), Fixed(batches_of(X, 100)))


def test_a_core_without_its_spec_is_refused():
    with pytest.raises(MmsaeError, match=r"needs the spec of the data, such as data\.spec"):
        SAEModule(partial(TopK, d_latent=16))


def test_missing_stream_is_named():
    data = Fixed(batches_of(X, 100))
    data.spec = None
    with pytest.raises(MmsaeError, match=r"the batch has no stream 'y'; it has x"):
        module(TopK({"y": 8}, 16, k=3)).normalised({ACTS: {"x": X}})


def test_several_dictionaries_train_as_if_alone():
    """One optimizer, one pass, and yet no dictionary feels the other."""

    def fitted(**also):
        torch.manual_seed(0)
        core = TopK(8, 16, k=3)
        one = SAEModule(core, also=also, optimizer=adam(), lr_warmup_steps=5)
        trainer().fit(one, Fixed(batches_of(X, 100)))
        return one

    alone, beside = fitted(), fitted(other=ReLU(8, 16), third=BatchTopK(8, 32, k=2))
    assert torch.equal(alone.core.W_dec, beside.core.W_dec)
    assert torch.equal(alone.core.rows_since_fired, beside.core.rows_since_fired)


def test_predict_gives_the_codes_of_every_row():
    fitted, data = module(TopK({"0": 8}, 16, k=3)), live()
    run = trainer()
    run.fit(fitted, data)
    found = run.predict(fitted, data)
    codes = torch.cat([f["values"] for f in found])
    assert codes.shape == (600, 3)
    assert torch.cat([f["sample_id"] for f in found]).tolist() == [i for i in range(200) for _ in range(3)]


def test_tensorboard_gets_the_histogram_of_firing_frequencies_also_as_the_second_logger(tmp_path):
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    fitted, run = module(), trainer(tmp_path, logger=loggers)
    data = Fixed(batches_of(X, 100), batches_of(X, 100))
    run.fit(fitted, data)
    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    last = events.Histograms("val/log10_density")[-1]
    assert last.histogram_value.num == fitted.core.d_latent

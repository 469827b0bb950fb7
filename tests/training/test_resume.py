"""A run that was stopped and resumed is the run that was not stopped, to the last bit."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import adam, live, planted, stored, trainer, write_store

from mmsae.cores import BatchTopK, JumpReLU, Matryoshka, ReLU, TopK
from mmsae.errors import MmsaeError
from mmsae.training.module import SAEModule
from mmsae.training.resume import restore_rng, rng_state

CORES = {
    "ReLU": lambda stream: ReLU({stream: 8}, 16, l1_coefficient=0.1),
    "TopK": lambda stream: TopK({stream: 8}, 16, k=3, dead_after=500),
    "BatchTopK": lambda stream: BatchTopK({stream: 8}, 16, k=3, dead_after=500),
    "Matryoshka": lambda stream: Matryoshka({stream: 8}, 16, k=3, prefixes=(0.25, 0.5, 1)),
    "JumpReLU": lambda stream: JumpReLU({stream: 8}, 16, sparsity_loss="tanh", target_l0=4, dead_after=500),
}
X = planted(1000)  # 16 batches of 64 in an epoch, in chunks of 4: step 100 is in the middle of epoch 7
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"), X)


class Draws(L.Callback):
    """One random number of each generator at every step, as a core that samples would draw."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, *_):
        self.found.append((float(torch.rand(())), float(np.random.rand()), random.random()))


def run(make, data, steps, folder, resume=None, **arguments):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    arguments = {"schedule_steps": 200, "lr_warmup_steps": 150, "optimizer": adam(), **arguments}
    module = SAEModule(make(), **arguments)
    draws = Draws()
    keep = ModelCheckpoint(folder, every_n_train_steps=25, save_top_k=-1, filename="{step}")
    fit = trainer(max_steps=steps, callbacks=[draws, keep])
    fit.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return module, fit, draws


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert set(a) == set(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}.{i}")
    else:
        assert a == b, path


def compare(make, data, tmp_path, half=100, whole=200):
    """`half` steps, then a new process' worth of new objects, then the rest; against `whole` steps at once."""
    one, fit, draws = run(make, data(), whole, tmp_path / "whole")
    _, _, first = run(make, data(), half, tmp_path / "half")
    two, again, second = run(make, data(), whole, tmp_path / "rest", tmp_path / "half" / f"step={half}.ckpt")
    assert_same(one.state_dict(), two.state_dict())  # weights, counters, thresholds, statistics
    assert_same(fit.optimizers[0].state_dict(), again.optimizers[0].state_dict())
    assert_same(fit.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
                again.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"])  # fmt: skip
    assert draws.found == first.found + second.found
    ends = [torch.load(tmp_path / part / f"step={whole}.ckpt", weights_only=True) for part in ("whole", "rest")]
    assert_same(ends[0]["rng"], ends[1]["rng"])
    places = [end["loops"]["fit_loop"]["state_dict"]["combined_loader"] for end in ends]
    assert_same(places[0], places[1])  # the sampler's position
    return places[0][0]


@pytest.mark.parametrize("name", CORES)
def test_resumed_from_a_store(name, store, tmp_path):
    place = compare(lambda: CORES[name]("x"), lambda: stored(store), tmp_path)
    assert place["used"] > 0  # in the middle of a chunk of the middle of an epoch


@pytest.mark.parametrize("name", CORES)
def test_resumed_while_the_model_runs(name, tmp_path):
    # 334 examples of 3 rows: chunks are no multiple of the batch, so rows are carried over
    compare(lambda: CORES[name]("0"), lambda: live(334), tmp_path)


@pytest.mark.parametrize("half", [25, 75])
def test_resumed_anywhere_in_a_live_epoch(half, tmp_path):
    """Epochs of 25 steps: at their end, where the loader has no more to fetch ahead."""
    compare(lambda: CORES["TopK"]("0"), lambda: live(533), tmp_path, half, 100)


def test_a_limited_live_epoch_skips_nothing(tmp_path):
    """With a limit Lightning does not fetch ahead."""
    data = live(334)
    module = SAEModule(CORES["TopK"]("0"), optimizer=adam())
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer(max_steps=4, callbacks=[keep], limit_train_batches=10).fit(module, data)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    (place,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    fresh = live(334).train_dataloader()
    it = iter(fresh)
    next(it), next(it)
    assert (place["used"], place["cursor"]) == (fresh.state_dict()["used"], fresh.state_dict()["cursor"])


def test_gradients_are_accumulated_over_a_resume(store, tmp_path):
    torch.manual_seed(3)

    def fitted(steps, folder, resume=None):
        torch.manual_seed(3)
        module = SAEModule(CORES["BatchTopK"]("x"), optimizer=adam(), schedule_steps=20)
        keep = ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}")
        fit = trainer(max_steps=steps, callbacks=[keep], accumulate_grad_batches=3)
        fit.fit(module, stored(store), ckpt_path=resume, weights_only=True if resume else None)
        return module

    one = fitted(20, tmp_path / "whole")
    fitted(10, tmp_path / "half")
    assert_same(one.state_dict(), fitted(20, tmp_path / "rest", tmp_path / "half" / "step=10.ckpt").state_dict())


@pytest.fixture(scope="module")
def checkpoint(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    run(lambda: TopK({"x": 8}, 16, k=3), stored(store), 25, folder)
    return folder / "step=25.ckpt"


@pytest.mark.parametrize(
    ("core", "arguments", "said"),
    [
        (lambda: TopK({"x": 8}, 16, k=4), {}, "trained with k=3, not 4: resume with the same"),
        (lambda: TopK({"x": 8}, 16, k=3, dead_after=7), {}, "trained with dead_after=10000000, not 7"),
        (lambda: TopK({"x": 8}, 32, k=3), {}, "trained with d_latent=16, not 32"),
        (lambda: BatchTopK({"x": 8}, 16, k=3), {}, "holds a TopK, not a BatchTopK"),
        (lambda: TopK({"x": 8}, 16, k=3), {"normalise": "scale"}, "trained with normalise=center, not scale"),
        (lambda: TopK({"x": 8}, 16, k=3), {"also": {"b": ReLU({"x": 8}, 4)}}, r"holds the dictionaries \['main'\]"),
    ],
)
def test_another_dictionary_is_refused(core, arguments, said, checkpoint, store, tmp_path):
    with pytest.raises(MmsaeError, match=said):
        run(core, stored(store), 50, tmp_path, checkpoint, **arguments)


def test_another_order_of_the_data_is_refused(checkpoint, store, tmp_path):
    with pytest.raises(MmsaeError, match="another data seed than 5"):
        run(lambda: TopK({"x": 8}, 16, k=3), stored(store, seed=5), 50, tmp_path, checkpoint)


def test_a_foreign_checkpoint_is_refused(checkpoint, store, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    del state["mmsae"]
    torch.save(state, tmp_path / "foreign.ckpt")
    with pytest.raises(MmsaeError, match="not written by SAEModule"):
        run(lambda: TopK({"x": 8}, 16, k=3), stored(store), 50, tmp_path, tmp_path / "foreign.ckpt")


def test_random_generators_go_back_exactly():
    np.random.normal()  # leaves a cached second draw
    random.gauss(0, 1)
    state = rng_state()
    draw = lambda: (torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random())  # noqa: E731
    before = draw()
    restore_rng(state)
    assert draw() == before

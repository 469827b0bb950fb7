"""Dose and response, on models of which the answer is known."""

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from mmsae.cores import TopK
from mmsae.errors import MmsaeError
from mmsae.steering import Add, AddVector, Selection, Site, calibrate, experiment, sweep
from mmsae.steering.dose import DoseResponse, interval, score
from mmsae.steering.ledger import Ledger
from mmsae.steering.readouts import Measured, Readout

D, V, N = 64, 200, 200
GRID = [0, 1, 2, 4, 8, 16, 32, 64]


class Head(nn.Module):
    """Layer norm and read-out: the last of a language model."""

    def __init__(self, seed):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.start = nn.Identity()
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.words = 3 * torch.randn(V, D, generator=draw) / math.sqrt(D)
        self.contexts = torch.randn(N, D, generator=draw)
        concept = self.words[:10].mean(0)
        self.concept = concept / concept.norm()

    def forward(self):
        return (self.norm(self.start(self.contexts)) @ self.words.T).log_softmax(-1)


class Mass(Readout):
    """Probability of the concept's ten tokens; half the divergence of the distribution."""

    def __init__(self, net):
        self.net, self.groups, self.runs = net, np.arange(N), 0

    def measure(self, steered=nullcontext):
        clean = self.net()
        with steered():
            now = self.net()
            self.runs += 1
        mass = now.exp()[:, :10].sum(1).double().numpy()
        damage = ((clean.exp() * (clean - now)).sum(1) / 2).double().numpy()
        return Measured(mass, (mass > 0.5).astype(float), damage, np.full(N, np.nan), ["."])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_strength_lies_inside_and_contexts_differ(seed):
    """T14b: too little does nothing, too much breaks the model."""
    net = Head(seed)
    curve = sweep(Site(net, None, "start"), lambda a: AddVector(net.concept, a), GRID, Mass(net))
    scores, best = curve.scores(), curve.best()
    assert 0 < best < len(GRID) - 1
    assert scores[best] >= 2 * max(scores[0], scores[-1])
    assert curve.variation(best) >= 0.3
    window = curve.window()
    assert window.closed
    assert window.low < curve.strengths[best] < window.high
    assert window.octaves == pytest.approx(math.log2(window.high / window.low))


def test_a_strength_of_zero_is_the_model_itself():
    net = Head(0)
    curve = sweep(Site(net, None, "start"), lambda a: AddVector(net.concept, a), [1, 2], Mass(net))
    assert curve.strengths == [0, 1, 2]
    assert curve.damage[0].tolist() == [0.0] * N
    assert (curve.damage[1] > 0).all()


def test_the_score_is_a_harmonic_mean_with_a_floor():
    assert float(score(0.5, 0.0)) == pytest.approx(2 / 3)
    assert float(score(1.0, math.log(2))) == pytest.approx(2 / 3)
    assert float(score(0.0, 0.0)) == pytest.approx(2 * 1e-3 / 1.001)
    assert float(score(1.0, -3.0)) == 1  # less damage than none is none


def test_an_interval_resamples_groups_not_contexts():
    """Ten copies of every group say nothing more than one."""
    values = np.random.default_rng(0).random(20)
    alone, copied = interval(values, np.arange(20)), interval(values.repeat(10), np.arange(20).repeat(10))
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.15)
    fooled = interval(values.repeat(10), np.arange(200))
    assert fooled.high - fooled.low < 0.5 * (alone.high - alone.low)


def test_a_window_is_interpolated_and_says_when_it_is_open():
    effect = np.array([[0.0], [0.2], [1.0], [0.2], [0.0]])
    made = {"success": effect, "damage": 0 * effect, "changed": 0 * effect, "groups": np.arange(1)}
    curve = DoseResponse([0, 1, 2, 4, 8], effect, **made)
    scores = curve.scores()
    share = (scores[2] - 0.8 * scores[2]) / (scores[2] - scores[1])
    found = curve.window()
    assert found.closed
    assert found[:3] == pytest.approx((2 ** (1 - share), 2 ** (1 + share), 2 * share))
    open_window = DoseResponse([0, 1, 2, 4, 8], effect[[0, 0, 1, 2, 2]], **made).window()
    assert not open_window.closed
    assert open_window.high == 8


def test_what_was_measured_is_not_measured_again(tmp_path):
    net, path = Head(0), tmp_path / "ledger.jsonl"

    def go(ledger):
        readout = Mass(net)
        curve = sweep(Site(net, None, "start"), lambda a: AddVector(net.concept, a), [1, 2], readout, ledger=ledger)
        return curve, readout.runs

    first, runs = go(Ledger(path))
    assert runs == 3
    lines = path.read_bytes()
    path.write_bytes(lines[:-20])  # killed in the middle of the last line
    again, runs = go(Ledger(path))
    assert runs == 1
    assert path.read_bytes() == lines
    assert np.array_equal(first.effect.round(5), again.effect.round(5))
    assert all(json.loads(line)["key"] for line in lines.splitlines())


def test_the_spread_counts_other_latents_that_move():
    torch.manual_seed(0)
    core = TopK(D, 32, k=32).eval().requires_grad_(False)
    with torch.no_grad():
        core.W_dec.zero_()
        core.W_enc.zero_()
        for j in range(32):  # latent j reads and writes coordinate j, and latent 1 also writes what 2, 3 and 4 read
            core.W_dec[j, j] = core.W_enc[j, j] = 1
        core.W_dec[1, 2:5] = 1
    net = Head(0)
    x = net.contexts
    site = Site(net, core, "start")
    for latent, others in ((0, 0), (1, 3)):
        curve = sweep(site, lambda a, j=latent: Add(j, a), [10], Mass(net), rows=x, own=[latent])
        assert curve.spread == [0, others]


def test_calibration_finds_the_strength():
    assert calibrate(lambda a: 1 / (1 + math.exp(5 - a)), 0.5, 0, 40, tolerance=1e-3) == pytest.approx(5, abs=0.01)
    assert calibrate(lambda a: -a, -3, 0, 10) == pytest.approx(3, abs=0.01)  # falling effects too
    with pytest.raises(MmsaeError, match="does not lie between those at 0"):
        calibrate(lambda a: a / 100, 0.9, 0, 10)
    with pytest.raises(MmsaeError, match="low=3 is not below high=2"):
        calibrate(float, 0.9, 3, 2)


def dictionary(net, seed=0):
    """Row 0 is the concept, the rest is random."""
    torch.manual_seed(seed)
    core = TopK(D, 32, k=4).eval().requires_grad_(False)
    rows = nn.functional.normalize(torch.randn(32, D), dim=1)
    rows[0] = net.concept
    with torch.no_grad():
        core.W_dec.copy_(rows)
        core.W_enc.copy_(rows)
    return core


def compared(net, selection=(1, 0, 2), control=(5, 6, 7), **arguments):
    site = Site(net, dictionary(net), "start")
    return experiment(
        Selection(torch.tensor(selection), torch.ones(len(selection))), Add, Mass(net), list(control), site=site,
        strengths=[1, 2, 4, 8], **arguments,
    )  # fmt: skip


def test_an_experiment_finds_the_latent_that_steers_and_beats_its_control():
    net = Head(3)
    found = compared(net, beside={"difference of means": lambda a: AddVector(net.concept, a)})
    assert found.arms["latent"].chosen == 0
    assert found.difference.low > 0.1
    assert found.score("latent").mean == pytest.approx(found.score("difference of means").mean, abs=1e-4)
    assert found.score("random latent").mean < 0.5 * found.score("latent").mean
    assert 0.3 < found.held_out.mean() < 0.7
    assert found.mean("latent", "effect").mean > found.mean("random latent", "effect").mean


def test_latents_that_do_not_steer_do_not_beat_their_control():
    found = compared(Head(3), selection=(1, 3, 2))
    assert abs(found.difference.mean) < 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"control": (5, 6)}, "the control has 2 latents for 3 candidates"),
        ({"control": (5, 6, 0)}, "must not share latents"),
        ({"selection": (), "control": ()}, "must not share"),
        ({"n_boot": 0}, "n_boot=0"),
    ],
)
def test_an_experiment_without_a_fair_control_is_refused(arguments, said):
    with pytest.raises(MmsaeError, match=said):
        compared(Head(0), **arguments)


def test_the_control_is_no_option():
    with pytest.raises(TypeError, match="control"):
        experiment([0], Add, Mass(Head(0)), site=None)


@pytest.mark.parametrize("strengths", [[], [0.0], [-1, 2]])
def test_bad_grids_are_refused(strengths):
    net = Head(0)
    with pytest.raises(MmsaeError, match="strength"):
        sweep(Site(net, None, "start"), lambda a: AddVector(net.concept, a), strengths, Mass(net))

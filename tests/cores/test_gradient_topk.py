import copy

import pytest
import torch
from synthetic import train
from torch.testing import assert_close

from mmsae.cores import Affine, GradientTopK, TopK
from mmsae.errors import MmsaeError
from mmsae.spec import ACTS, GRADS

D, M = 12, 40
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5
G = 1e-4 * torch.randn(50, D, generator=torch.Generator().manual_seed(2))
BATCH = {ACTS: {"x": X}, GRADS: {"x": G}}


def make(**arguments):
    torch.manual_seed(3)
    core = GradientTopK(D, M, k=3, **{"gradient_weight": 5.0, "dead_after": 100, **arguments}).train()
    core.start(BATCH)
    return core


@pytest.mark.parametrize("chunk", [2**24, 100])
def test_latents_are_chosen_by_score_and_keep_their_own_value(chunk, monkeypatch):
    monkeypatch.setattr("mmsae.cores.gradient_topk.CHUNK", chunk)
    core = make()
    a = core.pre_activations(X).relu()
    score = a + 5 * a * (G @ core.W_dec.T).abs() / G.norm(dim=-1).mean()
    best = score.topk(3).indices
    assert_close(core.encode(X, BATCH).dense(), torch.zeros_like(a).scatter(-1, best, a.gather(-1, best)))
    assert not torch.equal(best.sort().values, a.topk(3).indices.sort().values)


def test_without_weight_it_is_topk():
    core = make(gradient_weight=0.0)
    plain = TopK(D, M, k=3, dead_after=100)
    plain.load_state_dict(core.state_dict(), strict=False)
    ours, theirs = core.losses(BATCH), plain.train().losses(BATCH)
    assert_close(ours.codes.dense(), theirs.codes.dense())
    assert_close(ours.terms, theirs.terms)


def test_the_scale_of_the_gradients_does_not_matter():
    louder = {**BATCH, GRADS: {"x": 1e5 * G}}
    core, other = make(), make()
    other.start(louder)
    assert_close(core.encode(X, BATCH).dense(), other.encode(X, louder).dense())


@pytest.mark.parametrize("whiten", [False, True])
def test_the_choice_survives_folding(whiten):
    torch.manual_seed(0)
    scale = torch.eye(D) + 0.1 * torch.ones(D, D) if whiten else torch.tensor(3.0)
    affine = Affine(torch.randn(D), scale)
    inverse = affine.inverse_scale()
    slopes = G * inverse if inverse.ndim == 0 else G @ inverse.t()
    core = make(gradients_in_eval=True).eval()
    before = core.encode(affine.apply(X), {GRADS: {"x": slopes}})
    folded = copy.deepcopy(core)
    folded.fold({"x": affine})
    after = folded.encode(X, BATCH)
    assert_close(after.dense() > 0, before.dense() > 0)
    assert_close(folded.decode(after), affine.invert(core.decode(before)), rtol=1e-4, atol=1e-4)


def test_gradients_are_asked_for_where_they_are_needed():
    core = make()
    for broken in (None, {ACTS: {"x": X}}):
        with pytest.raises(MmsaeError, match=r"data\.gradients=true"):
            core.encode(X, broken)
    core.eval().encode(X)  # as TopK
    with pytest.raises(MmsaeError, match=r"data\.gradients=true"):
        make(gradients_in_eval=True).eval().encode(X)


class ToyHead:
    """48 orthonormal features; 8 quiet ones decide among 12 classes, 40 loud ones do nothing (T4)."""

    def __init__(self, seed):
        g = torch.Generator().manual_seed(seed)
        self.features = torch.linalg.qr(torch.randn(48, 48, generator=g))[0]
        self.head = 3 * torch.randn(8, 12, generator=g)

    def logits(self, x):
        return x @ self.features[:8].T @ self.head

    def rows(self, n, seed):
        """Activations and gradients `[n, 96]`, and the labels."""
        g = torch.Generator().manual_seed(seed)
        rank = torch.rand(n, 48, generator=g)
        on = torch.cat([part.argsort(-1).argsort(-1) < s for part, s in ((rank[:, :8], 2), (rank[:, 8:], 4))], -1)
        size = (0.5 + torch.rand(n, 48, generator=g)) * torch.cat([torch.full((8,), 0.5), torch.ones(40)])
        x = (on * size) @ self.features
        labels = torch.multinomial(self.logits(x).softmax(-1), 1, generator=g)[:, 0]
        wanted = x.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(self.logits(wanted), labels, reduction="sum")
        return torch.cat([x, torch.autograd.grad(loss, wanted)[0]], -1), labels


def halves(rows):
    return {ACTS: {"x": rows[..., :48]}, GRADS: {"x": rows[..., 48:]}}


@torch.no_grad()
def losses(core, toy, rows, labels):
    """Rise of the cross entropy, divergence from the clean predictions, FVU."""
    batch = halves(rows)
    x = batch[ACTS]["x"]
    out = core.eval().decode(core.encode(x, batch))
    entropy = torch.nn.functional.cross_entropy
    clean, now = toy.logits(x), toy.logits(out)
    kl = torch.nn.functional.kl_div(now.log_softmax(-1), clean.log_softmax(-1), reduction="batchmean", log_target=True)
    fvu = (x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    return float(entropy(now, labels) - entropy(clean, labels)), float(kl), float(fvu)


@pytest.mark.slow
def test_gradients_keep_what_the_model_uses(capsys):
    """T4: the gain exists with gradients in `eval`; without them it does not show, which docs/cores.md says."""
    found = {"gradients": [], "plain": [], "without gradients in eval": []}
    for seed in range(3):
        toy = ToyHead(seed)
        pool, (rows, labels) = toy.rows(20_000, seed + 100)[0], toy.rows(8000, seed + 200)
        for weight, name in ((3.0, "gradients"), (0.0, "plain")):
            torch.manual_seed(seed)
            core = GradientTopK(48, 48, k=3, gradient_weight=weight, gradients_in_eval=True, aux_coefficient=0.0)
            train(core, pool, 2000, 256, seed + 300, batches=halves)
            found[name].append(losses(core, toy, rows, labels))
            if weight:
                core.gradients_in_eval = False
                found["without gradients in eval"].append(losses(core, toy, rows, labels))
    with capsys.disabled():
        print({name: [[round(v, 3) for v in run] for run in runs] for name, runs in found.items()})
    for ours, theirs in zip(found["gradients"], found["plain"], strict=True):
        assert ours[1] < theirs[1]
        assert ours[2] > theirs[2]  # what is kept for the model is lost for the reconstruction
    assert sum(run[0] for run in found["gradients"]) < sum(run[0] for run in found["plain"])

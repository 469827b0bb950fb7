"""Attenuation by posterior probabilities (arXiv 2508.15094): it removes a concept gently, in sparse bases."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mmsae.errors import MmsaeError
from mmsae.steering import Attenuate, ConceptPosterior, Suppress, SuppressRange

M, D, CONCEPTS, N = 96, 48, 4, 600
OWN, SHARED = 4, 6


def planted(seed):
    """Codes `[CONCEPTS * N, M]` and the concept of each row: four own latents, six shared with the next concept."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(M, D, generator=draw), dim=1)
    concept = torch.arange(CONCEPTS).repeat_interleave(N)
    codes = torch.zeros(len(concept), M)
    for c in range(CONCEPTS):
        own = torch.arange(OWN) + c * (OWN + SHARED)
        shared = OWN + c * (OWN + SHARED) + torch.arange(SHARED)
        for who, which, mean, spread in (
            (c, own, 4.0, 0.5), (c, shared, 4.0, 0.6), ((c + 1) % CONCEPTS, shared, 1.5, 0.5),
        ):  # fmt: skip
            values = mean + spread * torch.randn(N, len(which), generator=draw)
            at = (concept == who).nonzero()
            codes[at, which] = values.clamp_min(0)
    return codes, concept, rows


def salient(codes, concept, c, n=10):
    return codes[concept == c].abs().mean(0).topk(n).indices


def fitted(codes, concept, c, smoothing=0.05):
    ids = salient(codes, concept, c)
    own = codes[concept == c][:, ids]
    return ids, {
        "APP": Attenuate(ConceptPosterior(codes[:, ids], concept, ids, smoothing=smoothing), c),
        "range": SuppressRange(ids, own.mean(0), own.std(0)),
        "full": Suppress(ids, 1.0),
    }


def removed(codes, concept, rows, smoothing=0.05):
    """Per edit, mean of concepts: accuracy on the one removed, on the others, and the displacement of the others."""
    train = torch.arange(len(codes)) % 2 == 0
    x = codes @ rows
    readout = LogisticRegression(max_iter=2000).fit(x[train].numpy(), concept[train].numpy())
    found = {}
    for c in range(CONCEPTS):
        ids, edits = fitted(codes[train], concept[train], c, smoothing)
        z = codes[~train][:, ids]
        for name, edit in edits.items():
            change = (edit.change(z, torch.ones(len(ids)), None) - z) @ rows[ids]
            right = torch.as_tensor(readout.predict((x[~train] + change).numpy())) == concept[~train]
            target = concept[~train] == c
            moved = change[~target].square().sum() / x[~train][~target].square().sum()
            row = (right[target].float().mean(), right[~target].float().mean(), moved)
            found.setdefault(name, []).append([float(v) for v in row])
    return {name: torch.tensor(v).mean(0).tolist() for name, v in found.items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_concept_goes_and_the_others_stay(seed):
    found = removed(*planted(seed))
    target, others, moved = found["APP"]
    assert target <= 0.05
    assert target <= found["range"][0]
    assert others >= 0.98
    assert moved <= 0.1 * found["full"][2]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_dense_units_it_is_gentle_but_weak(seed):
    codes, concept, rows = planted(seed)
    assert removed(codes @ rows, concept, torch.eye(D))["APP"][0] >= 0.9


def test_much_smoothing_leaves_the_concept():
    """What decides: with a pseudo-count of 1 the densities of 300 rows never say that a code is certain."""
    little, much = (removed(*planted(0), smoothing=s)["APP"][0] for s in (0.05, 1.0))
    assert much >= little + 0.3


def test_the_posterior_is_that_of_bayes():
    """Two latents counted by hand: zeros have a bin of their own."""
    z = torch.tensor([[0.0], [0.0], [1.0], [0.0], [3.0], [3.0]])
    concept = torch.tensor([0, 0, 0, 1, 1, 1])
    posterior = ConceptPosterior(z, concept, [5], bins=2, smoothing=0.0)
    at_zero, at_three = posterior(torch.tensor([[0.0], [3.0]]), 0)[:, 0].tolist()
    assert at_zero == pytest.approx((2 / 3) / (2 / 3 + 1 / 3))
    assert at_three == 0
    prior = ConceptPosterior(z, concept, [5], bins=2, smoothing=0.0, prior=torch.tensor([1.0, 4.0]))
    assert float(prior(torch.tensor([[0.0]]), 0)) == pytest.approx((2 / 3) / (2 / 3 + 4 / 3))


def test_range_suppression_is_the_formula():
    edit = SuppressRange([0, 1], mean=[2.0, 5.0], deviation=[0.5, 1.0], value=[0.0, 0.3])
    z = torch.tensor([[2.9, 5.0], [3.1, 8.0]])
    assert edit.change(z, torch.ones(2), None).tolist() == [[0.0, pytest.approx(0.3)], [pytest.approx(3.1), 8.0]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(3, 2), torch.tensor([0, 1, 1]), [4]), "do not fit 3 rows and 1 latents"),
        ((torch.ones(3, 1), torch.tensor([0, 0, 2]), [4]), "at least two concepts with rows"),
    ],
)
def test_what_cannot_be_fitted_is_said(arguments, said):
    with pytest.raises(MmsaeError, match=said):
        ConceptPosterior(*arguments)

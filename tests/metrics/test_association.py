import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmsae.metrics.association import association, canonical
from mmsae.metrics.recovery import auroc

N, D = 1200, 20


def pairs(seed, spoilt=0.5):
    """Concepts that have one column among the words and another among the picture's; some pairs are of two samples."""
    g = torch.Generator().manual_seed(seed)
    concepts = (torch.rand(N, D, generator=g) < 0.2).float()
    wrong = torch.rand(N, generator=g) < spoilt
    other = concepts.clone()
    other[wrong] = concepts[wrong].roll(1, 0)
    noise = [0.3 * torch.randn(N, D, generator=g) for _ in range(2)]
    return concepts + noise[0], other[:, torch.randperm(D, generator=g)] + noise[1], ~wrong.numpy()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pairs_that_belong_together_are_told_though_half_do_not(seed):
    text, image, right = pairs(seed)
    found = association(text, image)
    assert auroc(found[:, None].numpy(), right[:, None])[0, 0] > 0.9
    # nothing to learn where no pair belongs together
    text, image, right = pairs(seed, spoilt=1.0)
    chance = association(text, image[torch.randperm(N)]).numpy()
    assert abs(np.median(chance)) < 2


def test_a_sample_is_not_scored_by_itself():
    g = torch.Generator().manual_seed(0)
    text, image = torch.randn(300, 100, generator=g), torch.randn(300, 100, generator=g)
    found = association(text, image)
    again = association(text, image[torch.randperm(300, generator=g)])
    assert auroc(torch.cat([found, again])[:, None].numpy(), (np.arange(600) < 300)[:, None])[0, 0] < 0.6


def test_the_score_is_the_log_likelihood_ratio_of_gaussians():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 2, generator=g, dtype=torch.float64)
    text, image = z[:, :1], 0.6 * z[:, :1] + 0.8 * z[:, 1:]
    found = canonical(text, image, ridge=1e-9)
    assert_close(found.correlations, torch.tensor([0.6], dtype=torch.float64), atol=0.01, rtol=0)
    together = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1, 0.6], [0.6, 1]]))
    alone = torch.distributions.Normal(0.0, 1.0)
    x = torch.cat([text, image], 1)[:500].float()
    ratio = together.log_prob(x) - alone.log_prob(x).sum(1)
    assert_close(found.score(text[:500], image[:500]).float(), ratio, atol=0.1, rtol=0.05)


def test_columns_that_never_change_and_few_samples_do_no_harm():
    g = torch.Generator().manual_seed(0)
    text = torch.cat([torch.randn(50, 3, generator=g), torch.ones(50, 2)], 1)
    assert torch.isfinite(association(text, text)).all()
    assert association(text[:5], text[:5]).tolist() == [0] * 5

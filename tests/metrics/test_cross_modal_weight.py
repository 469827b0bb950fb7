import pytest
import torch
from torch.testing import assert_close

from mmsae.codes import Codes
from mmsae.metrics.cross_modal_weight import SCORES, cross_modal_weight, firing, patch_scores, per_token, sample_scores

M, TOKENS, SAMPLES = 12, 9, 7
G = torch.Generator().manual_seed(0)
Z = (torch.randn(SAMPLES * TOKENS, M, generator=G) - 1).clamp_min(0)
KIND = (torch.arange(SAMPLES * TOKENS) % TOKENS >= 4).long()  # four words, five patches
SAMPLE = torch.arange(SAMPLES).repeat_interleave(TOKENS)
W, THRESHOLD = torch.randn(M, generator=G), 0.5 * torch.rand(M, generator=G)


@pytest.mark.parametrize("threshold", [None, THRESHOLD], ids=["any code", "above delta"])
@pytest.mark.parametrize("layout", ["dense", "pairs"])
def test_scores_are_those_of_a_slow_loop(threshold, layout):
    codes = Codes(Z, None, M)
    found = firing(codes if layout == "dense" else codes.sparse(), KIND, SAMPLE, SAMPLES, threshold)
    scores = sample_scores(found, W)
    assert tuple(scores) == SCORES
    for s in range(SAMPLES):
        z, kind = Z[s == SAMPLE], KIND[s == SAMPLE]
        on = z > (0 if threshold is None else threshold)
        text, image = (set(on[kind == k].any(0).nonzero()[:, 0].tolist()) for k in (0, 1))
        assert_close(scores["cosine_co"][s], sum((W[j] for j in text & image), torch.zeros(())))
        assert_close(scores["cosine"][s], sum((W[j] for j in text | image), torch.zeros(())))
        assert scores["co_l0"][s] == len(text & image)
        assert scores["l0"][s] == len(text | image)
        assert_close(scores["l1"][s], z[on].sum())
        words, patches = on[kind == 0], on[kind == 1]
        assert scores["co_occurrence"][s] == sum((word & patch).sum() for word in words for patch in patches)
    assert found.n_text.tolist() == [4] * SAMPLES
    assert found.n_image.tolist() == [5] * SAMPLES


def test_the_order_of_tokens_does_not_matter():
    order = torch.randperm(len(Z), generator=G)
    one, other = (
        sample_scores(firing(Codes(Z[i], None, M), KIND[i], SAMPLE[i], SAMPLES), W) for i in (slice(None), order)
    )
    for name in SCORES:
        assert_close(one[name], other[name])


def test_a_sample_that_says_everything_twice_has_the_same_normalised_score():
    own = SAMPLE == 0
    once = firing(Codes(Z[own], None, M), KIND[own], SAMPLE[own], 1)
    twice = firing(Codes(Z[own].repeat(2, 1), None, M), KIND[own].repeat(2), SAMPLE[own].repeat(2), 1)
    for name in ("l1", "co_occurrence"):
        values = [per_token(name, sample_scores(f, W)[name], f.n_text, f.n_image) for f in (once, twice)]
        assert_close(values[0], values[1])


def test_the_weight_pairs_tokens_by_rank():
    text, image = torch.randn(3, 5, generator=G), torch.randn(3, 5, generator=G)
    assert_close(cross_modal_weight(text, 7 * text), torch.ones(()))
    assert_close(cross_modal_weight(text, -text), -torch.ones(()))
    swapped = cross_modal_weight(text, image[[1, 0, 2]])
    assert_close(cross_modal_weight(text[[1, 0, 2]], image), swapped)
    assert (cross_modal_weight(text, image) - swapped).abs() > 1e-3


def test_patches_are_scored_by_what_fires_on_them():
    found = firing(Codes(Z, None, M), KIND, SAMPLE, SAMPLES)
    patches = KIND == 1
    scores = patch_scores(Codes(Z[patches], None, M), SAMPLE[patches], found, W)
    for row, (z, s) in enumerate(zip(Z[patches], SAMPLE[patches], strict=True)):
        told = (Z[(s == SAMPLE) & ~patches] > 0).any(0)
        assert scores["l0"][row] == (z > 0).sum()
        assert scores["co_l0"][row] == ((z > 0) & told).sum()
        assert_close(scores["l1"][row], z.sum())
        assert_close(scores["cosine"][row], W[z > 0].sum())

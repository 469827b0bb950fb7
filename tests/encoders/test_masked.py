import pytest
import torch

from mmsae.encoders import MaskedReconstruction, SignalTransformer, markov_masks
from mmsae.errors import MmsaeError

TINY = {"n_channels": 3, "patch": 8, "dim": 16, "depth": 1, "heads": 2, "tokens": "channels", "n_registers": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("share", "run"), [(0.15, 3.0), (0.4, 5.0)])
def test_masks_have_their_share_and_their_runs(share, run):
    masks = markov_masks((400, 3), 200, share, run, generator())
    assert masks.shape == (400, 3, 200)
    assert masks.float().mean() == pytest.approx(share, abs=0.01)
    begins = masks[..., 1:] & ~masks[..., :-1]
    whole = masks[..., 1:].sum() / begins.sum()  # runs that were cut at the start count as none
    assert whole == pytest.approx(run, rel=0.1)


def test_channels_are_masked_each_by_itself():
    masks = markov_masks((500, 2), 50, 0.3, 3.0, generator())
    both = (masks[:, 0] & masks[:, 1]).float().mean()
    assert both == pytest.approx(0.09, abs=0.015)


def test_nothing_of_what_is_masked_is_seen():
    """The gradient of the reconstruction reaches only what was kept."""
    torch.manual_seed(0)
    model = MaskedReconstruction(SignalTransformer(**TINY), share=0.4)
    x = torch.randn(1, 3, 160, generator=generator())
    mask = markov_masks((1, 3), 20, 0.4, 3.0, generator(3))
    seen = []
    inner = model.tokens
    model.tokens = lambda given: seen.append(given) or inner(given)
    model(x, generator(3))
    hidden = mask.repeat_interleave(8, 2)
    assert hidden.any()
    assert (seen[0][hidden] == 0).all()
    torch.testing.assert_close(seen[0][~hidden], x[~hidden])


def test_the_loss_is_the_error_of_what_is_masked_alone():
    """A reconstruction of zeros has the deviation of the masked samples as its loss, whatever the share."""
    model = MaskedReconstruction(SignalTransformer(**TINY), share=0.2)
    torch.nn.init.zeros_(model.head.weight)
    x = 3.0 * torch.ones(4, 3, 160)
    assert float(model(x, generator())) == pytest.approx(3.0, rel=1e-4)


def test_what_the_rest_says_is_filled_in_after_some_steps():
    torch.manual_seed(0)
    model = MaskedReconstruction(SignalTransformer(**TINY), share=0.2)
    x = torch.randn(64, 1, 1, generator=generator(1)).expand(-1, 3, 160)  # a level for each example
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    first = float(model(x, generator(9)))
    for step in range(150):
        optimizer.zero_grad()
        model(x, generator(step)).backward()
        optimizer.step()
    assert float(model(x, generator(9))) < 0.5 * first


def test_a_channel_without_a_mask_gives_no_nan():
    model = MaskedReconstruction(SignalTransformer(**TINY), share=0.01)
    x = torch.randn(1, 3, 16, generator=generator())
    model(x, generator(2)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_does_not_fit_is_told():
    with pytest.raises(MmsaeError, match="build the encoder with tokens='channels'"):
        MaskedReconstruction(SignalTransformer(**{**TINY, "tokens": "joint"}))
    with pytest.raises(MmsaeError, match=r"share=1\.5 is out of range"):
        MaskedReconstruction(SignalTransformer(**TINY), share=1.5)

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmsae.encoders import ECGJEPA, JEPA, SignalTransformer, built, masked_blocks, read_encoder, write_encoder
from mmsae.encoders.ecg_jepa import kept_count, spread
from mmsae.errors import MmsaeError

TINY = {"n_channels": 3, "patch": 5, "dim": 16, "depth": 2, "heads": 2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def signals(n=4, channels=3, samples=100, seed=0):
    return torch.randn(n, channels, samples, generator=generator(seed))


def runs_of(mask):
    """Lengths of the stretches of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.int().numpy(), [0]])))
    return edges[1::2] - edges[::2]


@pytest.mark.parametrize(("N", "min_block"), [(50, 3), (50, 10), (200, 10)])
def test_s2_masks_keep_what_they_should_in_stretches(N, min_block):
    g = generator()
    for _ in range(10):
        n_kept = kept_count(N, g)
        assert 0.15 * N <= n_kept <= 0.25 * N + 1
        masks = masked_blocks(20, N, n_kept, min_block, g)
        assert [int((~mask).sum()) for mask in masks] == [n_kept] * 20
        assert min(min(runs_of(mask)) for mask in masks) >= min_block
        assert len({tuple(mask.tolist()) for mask in masks}) > 1


def test_s2_masking_less_than_the_shortest_block_starts_at_the_start():
    (mask,) = masked_blocks(1, 20, 16, 10, generator())
    assert mask.nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_the_sizes_are_those_of_the_paper():
    """3.60 M and 14.28 M parameters; one token for 50 ms at 500 Hz, and a register."""
    for dim, heads, millions in ((192, 4, 3.60), (384, 6, 14.28)):
        with torch.device("meta"):
            model = ECGJEPA(dim=dim, depth=8, heads=heads)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert ECGJEPA(dim=16, depth=1, heads=2)(torch.zeros(1, 12, 5000)).shape == (1, 201, 16)


def test_a_token_sees_its_own_window_of_all_channels():
    model, x = SignalTransformer(**TINY), signals(1)
    before = model.embedded(x)
    x[0, 2, 37] += 1  # window 7
    assert (model.embedded(x) - before).abs().amax(2)[0].nonzero()[:, 0].tolist() == [7]


def test_tokens_of_channels_stand_channel_by_channel():
    model, x = SignalTransformer(**TINY, tokens="channels", n_registers=0), signals(1)
    before = model.embedded(x)
    assert before.shape == (1, 3 * 20, 16)
    x[0, 2, 37] += 1
    assert (model.embedded(x) - before).abs().amax(2)[0].nonzero()[:, 0].tolist() == [2 * 20 + 7]
    assert model(x).shape == (1, 60, 16)


def test_the_context_sees_nothing_of_what_is_masked():
    """Gradients of the predictions reach the kept samples alone."""
    torch.manual_seed(0)
    jepa, x = JEPA(ECGJEPA(**TINY), 8, 1, 2, min_block=3), signals(1).requires_grad_()
    g = generator(7)
    mask = masked_blocks(1, 20, kept_count(20, g), 3, g)[0]
    jepa(x, generator(7)).backward()
    touched = x.grad[0].abs().sum(0).view(20, 5).sum(1) > 0
    assert touched.tolist() == (~mask).tolist()


def test_the_loss_falls_and_the_target_only_follows():
    torch.manual_seed(0)
    jepa, x = JEPA(ECGJEPA(**TINY), 8, 1, 2, min_block=3), signals(16)
    optimizer = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=5e-3)
    target = [p.clone() for p in jepa.target.parameters()]
    losses = []
    for _ in range(30):
        loss = jepa(x, generator(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for old, new in zip(target, jepa.target.parameters(), strict=True):
        assert_close(old, new)
    jepa.follow(0.75)
    for old, new, leader in zip(target, jepa.target.parameters(), jepa.context.parameters(), strict=True):
        assert_close(new, 0.75 * old + 0.25 * leader)


def test_variance_and_covariance_hold_tokens_apart():
    """Of tokens that lie in one direction both terms are large, of white ones none; without them nothing changes."""
    g = generator()
    white = torch.randn(4000, 8, generator=g)
    lack, shared = spread(white)
    assert lack < 0.02
    assert shared < 0.01
    lack, shared = spread(white[:, :1].expand(-1, 8))
    assert shared == pytest.approx(7, rel=0.1)  # seven others, each of covariance 1
    assert spread(0.1 * white)[0] == pytest.approx(0.9, abs=0.01)
    torch.manual_seed(0)
    encoder, x = ECGJEPA(**TINY), signals(8)
    torch.manual_seed(1)
    plain = JEPA(encoder, 8, 1, 2, min_block=3)(x, generator())
    torch.manual_seed(1)
    held = JEPA(encoder, 8, 1, 2, min_block=3, variance=0.5, covariance=0.1)(x, generator())
    assert held > plain
    with pytest.raises(MmsaeError, match="variance=-1 is out of range"):
        JEPA(encoder, 8, 1, 2, variance=-1)


def test_a_folder_gives_the_same_encoder_back(tmp_path):
    model = ECGJEPA(**TINY).eval()
    write_encoder(tmp_path, model, {"model": "ECGJEPA", "config": TINY}, torch.float32)
    again, content = read_encoder(tmp_path)
    assert content["config"] == TINY
    assert_close(again(signals()), model(signals()))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda p: (p / "config.json").unlink(), "it has no config.json"),
        (lambda p: (p / "config.json").write_text("{"), r"config\.json is not the config\.json of an encoder"),
        (lambda p: (p / "model.safetensors").unlink(), "there is no weight file"),
        (lambda p: (p / "model.safetensors").write_bytes(b"123456789"), "do not fit"),
        (lambda p: configured(p, dim=32), "do not fit"),
        (lambda p: configured(p, width=32), "cannot be built with config"),
    ],
)
def test_what_cannot_be_read_is_named(harm, said, tmp_path):
    write_encoder(tmp_path, ECGJEPA(**TINY), {"model": "ECGJEPA", "config": TINY})
    harm(tmp_path)
    with pytest.raises(MmsaeError, match=said) as error:
        read_encoder(tmp_path)
    assert "\n" not in str(error.value)


def configured(folder, **changes):
    (folder / "config.json").write_text(json.dumps({"model": "ECGJEPA", "config": {**TINY, **changes}}))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: built("ECGJepa", {}), "there is no encoder 'ECGJepa'; nearest: ECGJEPA"),
        (lambda: ECGJEPA(dim=15), "dim=15 must be even"),
        (lambda: ECGJEPA(**TINY)(torch.zeros(1, 12, 100)), r"\(1, 12, 100\) does not fit"),
        (lambda: ECGJEPA(**TINY)(torch.zeros(1, 3, 4)), "at least 5 samples"),
    ],
)
def test_what_cannot_be_built_is_told(make, said):
    with pytest.raises(MmsaeError, match=said):
        make()

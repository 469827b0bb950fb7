import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from mmsae.cores import GroupSparse
from mmsae.errors import MmsaeError
from mmsae.metrics.concept_control import cross_modal_control, raised
from mmsae.miniatures.pairs import paired_concepts

WORLD = paired_concepts(0, "easy")


def planted():
    """A dictionary that knows the concepts: latent i is concept i."""
    rows = normalize(sum(WORLD.directions.values()), dim=-1)
    core = GroupSparse({"image": 32, "text": 32}, 40, k=4).requires_grad_(False).eval()
    core.W_dec[:32] = rows
    core.W_enc[:32] = rows
    core.W_enc[32:] *= 0.1
    for number, offset in enumerate(WORLD.offsets.values()):
        core.b_dec[number] = offset * 0.8
    return core


def edited(core, codes, latent, strength):
    dense = codes.dense()
    dense[:, latent] += strength
    return dense @ core.W_dec + core.b_dec[0]


def test_a_raised_latent_adds_its_row_whether_it_fires_or_not():
    core, x = planted(), WORLD.draw(30, 1).x["image"]
    codes = core.encode(x)
    assert 0 < int((codes.dense()[:, 5] > 0).sum()) < 30
    assert_close(raised(core, "image", codes, 5, 2.0), edited(core, codes, 5, 2.0), atol=1e-5, rtol=1e-5)
    assert_close(raised(core, "image", codes, 5, 2.0) - core.decode(codes), (2 * core.W_dec[5]).expand(30, 32))


def test_control_is_the_loop_and_beats_random_latents():
    core = planted()
    draw = WORLD.draw(600, 2)
    concept = 7
    queries = draw.x["image"][draw.concepts[:, concept] == 0][:50]
    has = draw.concepts[:, concept] > 0
    found = cross_modal_control(core, queries, draw.x["text"], has, latent=concept, strength=1.0, n_random=8)
    codes, items = core.encode(queries), normalize(draw.x["text"], dim=-1)

    def precision(x):
        shares = []
        for row in normalize(x, dim=-1):
            best = sorted(range(len(items)), key=lambda j: -float(row @ items[j]))[:10]
            shares.append(sum(bool(has[j]) for j in best) / 10)
        return sum(shares) / len(shares)

    assert found.before == pytest.approx(precision(edited(core, codes, concept, 0.0)), abs=0.005)
    assert found.after == pytest.approx(precision(edited(core, codes, concept, 1.0)), abs=0.005)
    assert len(found.random) == 8
    assert found.delta > 0.5
    assert float(found.random.mean()) < 0.2
    assert found.over_random > 0.5
    nothing = cross_modal_control(core, queries, draw.x["text"], has, latent=concept, strength=0.0, n_random=3)
    assert nothing.delta == 0
    assert_close(nothing.random, torch.full((3,), nothing.before))


def test_streams_without_a_common_space_are_refused():
    core = planted()
    with pytest.raises(MmsaeError, match="a common space"):
        cross_modal_control(core, torch.randn(3, 32), torch.randn(20, 31), torch.zeros(20, dtype=torch.bool), 0, 1.0)
    with pytest.raises(MmsaeError, match="k=10 is out of range"):
        cross_modal_control(core, torch.randn(3, 32), torch.randn(5, 32), torch.zeros(5, dtype=torch.bool), 0, 1.0)

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.miniatures.pairs import PRESETS, paired_concepts


@pytest.mark.parametrize(("preset", "concept", "gap"), [("easy", 0.8, 0.3), ("hard", 0.49, 0.6)])
def test_presets_are_as_far_apart_as_they_say(preset, concept, gap):
    world = paired_concepts(0, preset)
    image, text = world.directions.values()
    assert float(cosine_similarity(image, text).mean()) == pytest.approx(concept, abs=0.05)
    for offset in world.offsets.values():
        assert float(offset.norm()) == pytest.approx(gap)
    draw = world.draw(4000, 1)
    pair = float(cosine_similarity(*draw.x.values()).mean())
    stranger = float(cosine_similarity(draw.x["image"], draw.x["text"].roll(1, 0)).mean())
    assert pair > stranger + 0.2
    assert preset in PRESETS


def test_rows_are_what_the_concepts_say():
    world = paired_concepts(3, "hard", streams=("image", "text", "audio"), n_concepts=20, d=24)
    draw = world.draw(2000, 5)
    on = draw.concepts > 0
    assert (on.sum(1) == 3).all()
    assert on.float().mean(0).min() > 0.1
    assert draw.concepts[on].min() >= 0.5
    assert draw.concepts[on].max() <= 1.5
    for stream, x in draw.x.items():
        assert_close(x.norm(dim=-1), torch.ones(2000))
        clean = draw.concepts @ world.directions[stream] / 3**0.5 + world.offsets[stream]
        assert float(cosine_similarity(x, normalize(clean, dim=-1)).mean()) > 0.95


def test_the_same_seed_gives_the_same_pairs():
    assert_close(paired_concepts(1).draw(50, 2).x, paired_concepts(1).draw(50, 2).x, rtol=0, atol=0)
    assert not torch.equal(paired_concepts(1).draw(50, 2).x["text"], paired_concepts(1).draw(50, 3).x["text"])
    with pytest.raises(MmsaeError, match="easy, hard"):
        paired_concepts(0, "medium")


def test_shuffled_pairs_keep_the_rows_and_lose_the_partners():
    draw = paired_concepts(0).draw(500, 1)
    mixed = draw.shuffled(2)
    assert torch.equal(mixed.x["image"], draw.x["image"])
    assert not torch.equal(mixed.x["text"], draw.x["text"])
    assert_close(mixed.x["text"].sort(0).values, draw.x["text"].sort(0).values)
    assert mixed.batch["pair_id"].tolist() == list(range(500))

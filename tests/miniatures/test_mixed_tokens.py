import torch
from torch.testing import assert_close

from mmsae.miniatures.mixed_tokens import mixed_tokens


def shared(found, n, tokens):
    """Share of the picture's concepts that the words of its sample have, too."""
    on = found.concepts.view(n, tokens, -1)
    text, image = on[:, :6].any(1), on[:, 6:].any(1)
    return (text & image).sum(1) / image.sum(1)


def test_words_and_pictures_share_their_concepts_where_they_match():
    n = 400
    found = mixed_tokens(n, seed=0)
    assert found.x.shape == (n * 14, 64)
    assert found.token_type.view(n, 14)[0].tolist() == [0] * 6 + [1] * 8
    assert (found.concepts.sum(1) >= 1).all()
    assert (found.concepts.view(n, 14, -1)[:, :6].any(1).sum(1) <= 3).all()
    common = shared(found, n, 14)
    assert common[found.matched].mean() > 0.85
    assert common[~found.matched].mean() < 0.15
    assert 0.4 < found.matched.float().mean() < 0.6


def test_the_same_seed_gives_the_same_samples_and_another_draw_others():
    one, again, other = mixed_tokens(50, 3), mixed_tokens(50, 3), mixed_tokens(50, 3, draw=1)
    assert torch.equal(one.x, again.x)
    assert not torch.equal(one.x, other.x)
    # of the same concepts: the offsets of the modalities are the same
    big, more = mixed_tokens(2000, 3), mixed_tokens(2000, 3, draw=1)
    for kind in (0, 1):
        assert_close(big.x[big.token_type == kind].mean(0), more.x[more.token_type == kind].mean(0), atol=0.03, rtol=0)

"""Decisions from two passes: with nothing changed they agree to the bit, with and without a cache, padded or not."""

import pytest
import torch
from tiny_lmm import save_lmm

from mmsae.errors import MmsaeError
from mmsae.miniatures.questions import SceneQuestions
from mmsae.sources import VisionLanguage
from mmsae.steering.answers import answers, prompts
from mmsae.steering.second_pass import NoisedContrast, SecondPass

pytest.importorskip("transformers")
POINT = "model.language_model.layers.2"


class Same(SecondPass):
    """Changes nothing, and keeps what both passes said."""

    def __init__(self, model, weight=1.0, plausible=0.0):
        super().__init__(model, weight, plausible)
        self.apart, self.steps = 0.0, 0

    def logits(self, input_ids):
        return self.again()

    def __call__(self, input_ids, scores):
        joined = super().__call__(input_ids, scores)
        self.apart = max(self.apart, float((joined - scores).abs().max()))
        self.steps += 1
        return joined


@pytest.fixture(scope="module")
def lmm():
    return VisionLanguage("miniature:lmm", [POINT], device="cpu")


def asked(form, n=6):
    questions = SceneQuestions("test", n, 1, form, seed=20)
    return [questions[i] for i in range(n)]


@pytest.mark.parametrize("cache", [True, False])
def test_a_second_pass_that_changes_nothing_says_the_same(lmm, cache):
    items = asked(None)  # prompts of different lengths: some are padded
    plain = answers(lmm, items, 12, use_cache=cache)
    same = Same(lmm.model)
    assert answers(lmm, items, 12, same, use_cache=cache) == plain
    assert same.apart < 1e-4
    assert same.steps > 3
    assert len(set(plain)) > 1


def test_batches_and_padding_do_not_change_answers(lmm):
    items = asked(None)
    assert [answers(lmm, [item], 12)[0] for item in items] == answers(lmm, items, 12)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "idefics3", "gemma3"])
@pytest.mark.parametrize("cache", [True, False])
def test_other_families_generate_with_a_second_pass(family, cache, tmp_path):
    it = VisionLanguage(save_lmm(tmp_path, family), ["model.*.layers.1"], device="cpu")
    items = asked("open", 2)
    same = Same(it.model)
    answers(it, items, 4, same, use_cache=cache)
    assert same.steps == 4
    assert same.apart < 1e-4


def test_implausible_tokens_are_ruled_out(lmm):
    class Opposite(SecondPass):
        def logits(self, input_ids):
            return -self.again()

    items = asked("yes or no")
    plain = answers(lmm, items, 1)
    assert answers(lmm, items, 1, Opposite(lmm.model, 1.0, 1.0)) == plain  # only the likeliest is left
    assert answers(lmm, items, 1, Opposite(lmm.model, 1.0, 0.0)) != plain


def test_a_noised_picture_is_another_picture(lmm):
    items = asked("caption", 4)
    plain = answers(lmm, items, 16)
    assert answers(lmm, items, 16, NoisedContrast(lmm.model, noise=0.0), use_cache=False) == plain
    inputs, seen = prompts(lmm, items), []

    class Watched(NoisedContrast):
        def logits(self, input_ids):
            seen.append(super().logits(input_ids))
            return seen[-1]

    contrast = Watched(lmm.model)
    with contrast.watching(inputs), torch.no_grad():
        lmm.model.generate(**inputs, logits_processor=[contrast], do_sample=False, max_new_tokens=1, use_cache=False)
        first = lmm.model(**inputs).logits[:, -1]
    assert (seen[0] - first).abs().max() > 0.5
    with pytest.raises(MmsaeError, match="use_cache=False"):
        answers(lmm, items, 4, NoisedContrast(lmm.model))


def test_beams_and_unwatched_processors_are_refused(lmm):
    with pytest.raises(MmsaeError, match="num_beams=1"):
        answers(lmm, asked("open", 2), 4, Same(lmm.model), num_beams=2)
    with pytest.raises(MmsaeError, match="inside its `watching"):
        Same(lmm.model)(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 5))

"""What models make of items by themselves: texts that they write, posteriors that they decide by."""

import pytest
import torch
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.miniatures.questions import SceneQuestions
from mmsae.miniatures.scenes import Scenes
from mmsae.miniatures.stories import Stories
from mmsae.sources import CausalLM, Custom, SceneCLIP, Signal, VisionLanguage
from mmsae.steering import AddVector, Generated, steer

PROMPTS = ["paul went to the river with a lamp.", "anna", "one morning sara took a drum and walked to the school."]
ITEMS = [{"text": text, "sample_id": i} for i, text in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def writer():
    return CausalLM("miniature:text", ["model.layers.2"], device="cpu")


@pytest.fixture(scope="module")
def seer():
    return VisionLanguage("miniature:lmm", ["model.vision_tower.encoder.layers.2"], tokens="image", device="cpu")


def test_greedy_text_is_the_likeliest_token_after_the_other(writer):
    found = writer.generate(ITEMS, max_new_tokens=6)
    for item, one in zip(ITEMS, found, strict=True):
        ids = list(writer.coded(item).ids)
        assert one["input_ids"][: one["prompt_length"]] == ids
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(writer.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert one["input_ids"] == ids
        assert one["text"] == writer.tokenizer.decode(ids[one["prompt_length"] :])


def test_prompts_of_other_lengths_change_nothing(writer):
    together = writer.generate(ITEMS, max_new_tokens=8)
    assert [writer.generate([item], max_new_tokens=8)[0]["text"] for item in ITEMS] == [o["text"] for o in together]


def test_samples_follow_the_seed_and_leave_the_generator_alone(writer):
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    one, same, other = (writer.generate(ITEMS, temperature=1.0, seed=s)[0]["text"] for s in (3, 3, 4))
    assert one == same != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_dialogue_is_answered_without_its_answer(writer):
    talk = Stories("test", 4).dialogue(0)
    right = talk["messages"][1]["content"]
    spoilt = [talk["messages"][0], {"role": "assistant", "content": "spoilt"}]
    assert writer.generate([{"messages": spoilt, "sample_id": 0}])[0]["text"].strip() == right
    with pytest.raises(MmsaeError, match="nothing but answers"):
        writer.generate([{"messages": spoilt[1:], "sample_id": 0}])


def test_what_is_written_can_be_steered_from_the_first_new_token(writer):
    vector = 200 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    clean = writer.generate(ITEMS[:1], max_new_tokens=5)[0]["input_ids"]
    with steer(writer, None, "model.layers.2", AddVector(vector), where=Generated()):
        steered = writer.generate(ITEMS[:1], max_new_tokens=5)[0]["input_ids"]
    first = len(writer.coded(ITEMS[0]).ids)
    assert steered[: first + 1] == clean[: first + 1]  # the first new token is read off the prompt
    assert steered[first + 1 :] != clean[first + 1 :]


def test_questions_about_pictures_are_answered(seer):
    asked = SceneQuestions("test", 12, form="open")
    items = [asked[i] for i in range(12)]
    found = [one["text"].strip() for one in seer.generate(items, max_new_tokens=8)]
    right = [item["messages"][1]["content"][0]["text"] for item in items]
    assert sum(map(str.__eq__, found, right)) >= 9  # 88 to 100 % by factor
    assert [seer.generate([item], max_new_tokens=8)[0]["text"].strip() for item in items[:3]] == found[:3]


def test_the_posterior_of_clip_is_that_of_its_prompts():
    source = SceneCLIP(["visual.transformer.resblocks.2"], device="cpu")
    scenes = Scenes("test", 6)
    items = [scenes[i] for i in range(6)]
    found = source.generate(items)
    batch = source.collate(items)
    with torch.no_grad():
        logits, truth = source.zero_shot(source.forward(batch), batch)["colour"]
    posterior = torch.stack([one["posterior"]["colour"] for one in found])
    assert_close(posterior, logits.softmax(-1))
    assert (posterior.argmax(1) == truth).float().mean() >= 0.8
    own = source.generate(items, prompts={"shade": ["a red digit", "a blue digit"]})[0]["posterior"]
    assert list(own) == ["shade"]
    assert float(own["shade"].sum()) == pytest.approx(1)
    with pytest.raises(MmsaeError, match="decides between texts"):
        source.with_tower("text").generate([{"text": "a red digit", "sample_id": 0}])


def test_classifiers_give_the_posterior_of_the_class_and_others_say_that_they_do_not_decide():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    one = Custom(net, ["1"], input_shape=[1, 4, 4], task="classification", device="cpu")
    items = [{"input": torch.randn(1, 4, 4), "sample_id": i} for i in range(2)]
    found = one.generate(items)
    with torch.no_grad():
        expected = net(torch.stack([item["input"] for item in items])).softmax(-1)
    assert_close(torch.stack([f["posterior"]["class"] for f in found]), expected)
    with pytest.raises(MmsaeError, match="neither writes nor decides"):
        Signal("miniature:ecg_jepa", ["norm"], device="cpu").generate([])

"""The generators of stories and questions, and what the shipped language and multimodal miniatures can do."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from datamodules import SceneQuestions, Stories
from mmsae.errors import MmsaeError
from mmsae.miniatures.captions import FACTORS as SCENE_FACTORS
from mmsae.miniatures.captions import mentions
from mmsae.miniatures.questions import BEHIND, LABELS
from mmsae.miniatures.questions import SceneQuestions as QuestionSet
from mmsae.miniatures.scenes import Scenes
from mmsae.miniatures.stories import FACTORS
from mmsae.miniatures.stories import Stories as StorySet
from mmsae.sources import CausalLM, VisionLanguage
from mmsae.sources.chat import ROLES
from mmsae.sources.weights import located

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
POINT = "model.language_model.layers.2"


def recipe(name):
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "recipes"))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text():
    folder = located("miniature:text")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), \
        transformers.AutoTokenizer.from_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module")
def lmm():
    folder = located("miniature:lmm")
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval(), \
        transformers.AutoProcessor.from_pretrained(folder)  # fmt: skip


def config(name):
    return json.loads((Path(located(f"miniature:{name}")) / "config.json").read_text())


# ---- generators


def test_a_story_says_its_factors_and_no_others():
    stories = StorySet("train", 300)
    for i in range(300):
        item = stories[i]
        words = set(re.findall(r"[a-z]+", item["text"]))
        for factor in ("name", "animal", "colour", "place", "object"):
            value = FACTORS[factor][item["labels"][factor]]
            others = set(FACTORS[factor]) - {value}
            plurals = {f"{other}s" for other in others} if factor == "animal" else set()
            assert words & {value, f"{value}s"}
            assert not words & (others | plurals)
        gender, tense = FACTORS["gender"][item["labels"]["gender"]], FACTORS["tense"][item["labels"]["tense"]]
        assert not words & ({"she", "her"} if gender == "he" else {"he", "his", "him"})
        assert bool(words & {"is", "are", "sees", "has", "feels"}) == (tense == "present")
        assert bool(words & {"was", "were", "saw", "had", "felt"}) == (tense == "past")


def test_stories_are_a_pure_function_of_split_seed_and_index():
    assert StorySet("train", 50)[7] == StorySet("train", 9)[7]
    texts = {split: {StorySet(split, 200)[i]["text"] for i in range(200)} for split in ("train", "val", "test")}
    assert not texts["train"] & texts["test"]
    assert StorySet("train", 9, seed=1)[7] != StorySet("train", 9)[7]
    counts = torch.tensor([StorySet("train", 2000)[i]["labels"]["animal"] for i in range(2000)]).bincount()
    assert counts.min() > 180  # 250 expected of each
    with pytest.raises(MmsaeError, match="no split 'dev'"):
        StorySet("dev", 3)
    with pytest.raises(IndexError):
        StorySet("val", 3)[3]


def test_dialogues_ask_what_the_story_answers():
    stories = StorySet("val", 60)
    asked = 0
    for i in range(60):
        item = stories.dialogue(i)
        for question, answer in zip(item["messages"][::2], item["messages"][1::2], strict=True):
            assert (question["role"], answer["role"]) == ("user", "assistant")
            if "what colour" in question["content"]:
                assert answer["content"] == FACTORS["colour"][item["labels"]["colour"]] + "."
                asked += 1
    assert asked > 10


def test_questions_have_true_answers_and_half_of_them_are_yes():
    questions = QuestionSet("val", 600)
    said = []
    for i in range(600):
        item = questions.asked(i)
        (question, answer), labels = [m["content"][-1]["text"] for m in item["messages"]], item["labels"]
        form, asked = LABELS["form"][labels["form"]], LABELS["asked"][labels["asked"]]
        if form == "caption":
            assert mentions(answer) == {factor: labels[factor] for factor in SCENE_FACTORS}
            continue
        value = SCENE_FACTORS[asked][labels[asked]]
        if form == "open":
            assert answer == (BEHIND[value] if asked == "background" else value) + "."
        else:
            stated = mentions(question)
            assert (answer == "yes.") == (stated[asked] == labels[asked]) == bool(labels["answer"])
            said.append(labels["answer"])
    assert 0.4 < sum(said) / len(said) < 0.6
    assert questions[3]["image"].size == (64, 64)
    assert questions[3]["labels"].items() >= Scenes("val", 600)[3]["labels"].items()
    assert len(QuestionSet("val", 5, turns=3)[0]["messages"]) == 6
    assert {LABELS["form"][QuestionSet("val", 9, form="open")[i]["labels"]["form"]] for i in range(9)} == {"open"}
    with pytest.raises(MmsaeError, match="form='closed' is unknown"):
        QuestionSet("val", 5, form="closed")


# ---- the language model


def test_the_language_model_beats_trigrams_as_told(text):
    model, tokenizer = text
    assert sum(p.numel() for p in model.parameters()) < 1.5e6
    assert (Path(located("miniature:text")) / "model.safetensors").stat().st_size < 3e6
    told = config("text")["measured"]
    seen = recipe("train_text").figures(model, tokenizer, StorySet("test", 50))
    assert abs(seen["cross_entropy"] - told["cross_entropy"]) < 0.05
    assert seen["cross_entropy"] < 0.6 * told["trigram_cross_entropy"]
    assert seen["recall_name"] > 0.95
    assert seen["recall_animal"] > 0.9
    assert seen["agreement"] > 0.85


def test_words_are_whole_tokens_and_any_text_survives(text):
    _, tokenizer = text
    for i in range(50):
        story = StorySet("test", 50)[i]["text"]
        words = re.findall(r"[a-z]+|[.,?]", story)
        assert len(tokenizer(story, add_special_tokens=False)["input_ids"]) == len(words)
    odd = "Ünïcode & 123, never seen!"
    assert tokenizer.decode(tokenizer(odd)["input_ids"], skip_special_tokens=True).strip() == odd


def test_it_is_a_source_of_texts_and_dialogues(text):
    source = CausalLM(located("miniature:text"), ["model.layers.2"], device="cpu")
    data = Stories(source=source, n_train=8, n_val=8, n_test=8)
    rows = next(iter(data.rows("val")))
    assert rows["acts"]["model.layers.2"].shape[1] == 128
    assert "label.animal" in rows
    talks = Stories(source=source, n_train=8, n_val=8, n_test=8, dialogues=True)
    rows = next(iter(talks.rows("val")))
    names = source.tokenizer.convert_ids_to_tokens(rows["token_id"].tolist())
    said = [n for n, role in zip(names, rows["role"].tolist(), strict=True) if role == ROLES.index("assistant")]
    assert said
    assert not {"<|user|>", "<|end|>"} & set(said)


# ---- the multimodal model


def test_the_tower_is_that_of_the_clip(lmm):
    pytest.importorskip("open_clip")
    from mmsae.miniatures.clip import scene_clip

    model, processor = lmm
    clip, preprocess, _ = scene_clip()
    images = [Scenes("test", 4)[i]["image"] for i in range(4)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert_close(pixels, torch.stack([preprocess(image) for image in images]), atol=1e-5, rtol=0)
    with torch.no_grad():
        found = model.model.vision_tower(pixels)
        kept = {}
        hook = clip.visual.transformer.resblocks[2].register_forward_hook(lambda _, __, out: kept.update(x=out))
        embedded = clip.encode_image(pixels)
        hook.remove()
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert_close(found.pooler_output @ clip.visual.proj, embedded, atol=1e-4, rtol=0)
    assert_close(hidden, kept["x"], atol=1e-4, rtol=0)


def test_the_multimodal_model_answers_as_told(lmm):
    model, processor = lmm
    assert (Path(located("miniature:lmm")) / "model.safetensors").stat().st_size < 8e6
    train = recipe("train_lmm")
    pictures = train.Pictures(model, processor, QuestionSet("test", 60))
    told = config("lmm")["measured"]
    for factor in SCENE_FACTORS:
        assert abs(train.open_accuracy(model, processor, pictures, factor) - told[f"open_{factor}"]) < 0.15
    assert min(told[f"open_{factor}"] for factor in ("position", "size", "background")) > 0.95
    assert told["open_colour"] > 0.95
    assert told["open_digit"] > 0.8  # of handwriting that it has not seen
    heard, truth, _ = train.answered(model, processor, pictures, "yes or no")
    absent = [answer for answer, right in zip(heard, truth, strict=True) if right == "no."]
    assert abs(absent.count("yes.") / len(absent) - told["false_presence"]) < 0.25
    assert told["false_presence_digit"] < 0.1  # colour and size of what is not there are still affirmed too often
    assert set(heard) <= {"yes.", "no."}


def test_it_is_a_source_and_its_boxes_are_the_patches(lmm):
    source = VisionLanguage("miniature:lmm", [POINT], device="cpu")
    data = SceneQuestions(source=source, n_train=8, n_val=8, n_test=8)
    rows = next(iter(data.rows("val")))
    assert rows["acts"][POINT].shape[1] == 128
    patches = rows["token_type"] == 1
    assert int(patches.sum()) == 8 * 64
    assert_close(rows["x0"][patches], 8.0 * rows["column"][patches].float())
    assert_close(rows["y1"][patches], 8.0 * rows["row"][patches].float() + 8)
    assert {"label.digit", "label.answer", "role"} <= set(rows)
    assert source.identity["model"] == "miniature:lmm"
    assert data.render(data.items("test")[0])["kind"] == "image_text"


def test_source_and_recipe_agree_on_the_answers(lmm):
    """The processor's way and the recipe's, which keeps image features, give the same logits."""
    model, processor = lmm
    questions = QuestionSet("test", 4, form="open")
    source = VisionLanguage("miniature:lmm", [POINT], device="cpu")
    for i in range(4):
        batch = source.collate([questions[i]])
        with torch.no_grad():
            ours = source.forward(batch).logits
            train = recipe("train_lmm")
            pictures = train.Pictures(model, processor, questions)
            ids = torch.tensor([train.coded(processor.tokenizer, questions.asked(i)["messages"])])
            assert torch.equal(ids, batch["input_ids"])
            theirs = train.predicted(model, ids, pictures.features([i]), torch.ones_like(ids, dtype=torch.bool))
        assert_close(ours[0], theirs, atol=0.02, rtol=0)  # features are kept in half precision


@pytest.mark.slow
def test_training_resumes_to_the_same_weights(tmp_path):
    small = {"batch_size": 8, "threads": 1, "precision": "fp32", "n_test": 10}
    train = recipe("train_text")
    train.train(str(tmp_path / "whole"), steps=6, width=32, layers=1, **small)
    stopped = train.save

    class Stop(Exception):
        pass

    def once(path, *rest):
        stopped(path, *rest)
        if path.name.startswith("checkpoint"):
            raise Stop

    train.save = once
    with pytest.raises(Stop):
        train.train(str(tmp_path / "cut"), steps=6, width=32, layers=1, checkpoint_every=3, **small)
    train.save = stopped
    train.train(str(tmp_path / "cut"), steps=6, width=32, layers=1, checkpoint_every=3, **small)
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_recipe_of_the_multimodal_model_runs(tmp_path, capsys):
    train = recipe("train_lmm")
    train.train(str(tmp_path), steps=3, batch_size=4, turns=2, n_scenes=8, threads=1, precision="fp32", n_test=12)
    assert "caption_all_facts" in capsys.readouterr().out
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.image_seq_length == 64

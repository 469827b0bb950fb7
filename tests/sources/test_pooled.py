"""Means of pictures and of words in a multimodal model: against the tokens one by one, and as an edit."""

import pytest
import torch
from test_lmm import asked, folders, picture  # noqa: F401 (the fixture)
from tiny_lmm import FAMILIES
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.sources import PooledModalities, SceneCLIP, VisionLanguage

pytest.importorskip("transformers")
POINT = "model.language_model.layers.0"


def source(folder, words="after", point=POINT, **arguments):
    if any(name in folder for name in ("idefics3", "smolvlm")):
        point = point.replace("language_model", "text_model")
    return PooledModalities(VisionLanguage(folder, [point], device="cpu", **arguments), words)


def items(n=3):
    words = ["a red cat", "blue", "it is a picture"]
    return [asked(picture(60 + 10 * i, 50, seed=i), answer=words[i % 3], sample_id=10 + i) for i in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_means_of_image_tokens_and_of_the_words_after_them(folders, family):  # noqa: F811
    it = source(folders(family))
    batch = it.collate(items())
    rows = it.read(batch)
    assert rows["pair_id"].tolist() == rows["sample_id"].tolist() == [10, 11, 12]
    with capture(it.model, it.points) as captured:
        it.forward(batch)
    x = captured[it.point]
    for i, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        seen = [t for t in range(len(ids)) if mask[t] and ids[t] == it.inner.image_id]
        behind = [t for t in range(seen[-1] + 1, len(ids)) if mask[t]]
        assert len(behind) >= 3
        assert_close(rows["acts"]["image"][i], x[i, seen].mean(0))
        assert_close(rows["acts"]["text"][i], x[i, behind].mean(0))


def test_ordinary_words_leave_out_delimiters_and_padding(folders):  # noqa: F811
    it = source(folders("qwen2_5_vl"), words="ordinary")
    batch = it.collate(items())
    words = it.masks(batch["input_ids"], batch["attention_mask"])["text"]
    assert "<|" not in it.inner.tokenizer.decode(batch["input_ids"][words])
    assert not (words & (batch["attention_mask"] == 0)).any()
    after = it.inner.tokenizer.decode(batch["input_ids"][0][words[0]])
    assert after.split() == ["what", "colour", "is", "the", "cat", "?", "a", "red", "cat"]


def test_an_edit_moves_the_mean_and_leaves_the_rest(folders):  # noqa: F811
    it = source(folders("llava"))
    batch = it.collate(items())
    clean, logits, _ = it.run(batch)
    with it.spliced(batch, {"text": lambda mean: mean}):
        assert_close(it.forward(batch).logits, logits.logits)
    direction = torch.randn(32)
    with it.spliced(batch, {"text": lambda mean: mean + direction}):
        moved, changed, _ = it.run(batch)
    assert_close(moved["acts"]["text"], clean["acts"]["text"] + direction, atol=1e-5, rtol=1e-4)
    assert_close(moved["acts"]["image"], clean["acts"]["image"])
    assert (changed.logits - logits.logits).abs().max() > 1e-3


def test_what_cannot_be_pooled_is_told(folders):  # noqa: F811
    with pytest.raises(MmsaeError, match="SceneCLIP reads no pictures with words"):
        PooledModalities(SceneCLIP(["visual"], device="cpu"))
    with pytest.raises(MmsaeError, match="tokens='image' leaves out the words"):
        source(folders("llava"), tokens="image")
    with pytest.raises(MmsaeError, match="multi_modal_projector' leaves out the words"):
        source(folders("llava"), point="model.multi_modal_projector")
    with pytest.raises(MmsaeError, match="words='all' is unknown"):
        source(folders("llava"), words="all")
    with pytest.raises(MmsaeError, match="pools one hook point, but there are 2"):
        _ = source(folders("llava"), point="model.language_model.layers.*").spec
    it = source(folders("llava"))
    with pytest.raises(MmsaeError, match="item 4 has no image token"):
        it.read(it.collate([{"text": "a red cat", "sample_id": 4}]))

"""VL-SAE's correction: what it adds, where, and that it does nothing where it should not."""

import copy

import pytest
import torch
from test_second_pass import asked
from tiny_lmm import save_lmm
from torch.testing import assert_close

from mmsae.cores import VLSAE, AlignmentAutoencoder, TopK
from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.sources import PooledModalities, VisionLanguage
from mmsae.steering.answers import answers, prompts
from mmsae.steering.concept_alignment import ConceptAlignment

pytest.importorskip("transformers")
POINT = "model.language_model.layers.2"


@pytest.fixture(scope="module")
def source():
    return PooledModalities(VisionLanguage("miniature:lmm", [POINT], device="cpu"))


@pytest.fixture(scope="module")
def core(source):
    torch.manual_seed(0)
    made = VLSAE(source.spec, 256, k=16).eval()
    with torch.no_grad():
        for rows in made.decoders:
            rows.mul_(4)
    return made


def test_the_corrected_mean_is_the_formula(source, core):
    image, text = torch.randn(2, 3, 128)
    found = ConceptAlignment(source, core, beta=0.9).corrected(image, text)
    h_image, h_text = core.encode_stream("image", image).dense(), core.encode_stream("text", text).dense()
    mixed = 0.1 * h_text + 0.9 * h_image
    assert_close(found, mixed @ core.dictionaries["text"] + core.b_dec[1], atol=1e-5, rtol=1e-4)
    kept = ConceptAlignment(source, core, beta=0.9, keep_error=True).corrected(image, text)
    assert_close(kept - text, 0.9 * (h_image - h_text) @ core.dictionaries["text"], atol=1e-5, rtol=1e-4)
    assert_close(ConceptAlignment(source, core, beta=0.0, keep_error=True).corrected(image, text), text)


class Watched(ConceptAlignment):
    """Keeps what the second pass said and the layer held."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second, self.layers = [], []

    def logits(self, input_ids):
        with capture(self.model, [self.source.point], stop=False) as found:
            self.second.append(super().logits(input_ids))
        self.layers.append(found[self.source.point])
        return self.second[-1]


def said(source, items, processor, cache, n=3):
    inputs = prompts(source.inner, items)
    settings = {"do_sample": False, "max_new_tokens": n, "use_cache": cache, "pad_token_id": 0}
    with torch.no_grad(), processor.watching(inputs):
        return inputs, source.model.generate(**inputs, logits_processor=[processor], **settings)


def test_it_shifts_every_position_behind_the_picture_and_no_other(source, core):
    items = asked(None, 3)  # of different lengths: two are padded
    watched = Watched(source, core, alpha=0.5, c=1.0, b=0.0)
    inputs, _ = said(source, items, watched, cache=False, n=1)
    with torch.no_grad(), capture(source.model, [source.point], stop=False) as found:
        source.model(**inputs)
    plain, edited = found[source.point], watched.layers[0]
    masks = source.masks(inputs["input_ids"], inputs["attention_mask"])
    for i in range(3):
        behind = masks["text"][i]
        mean = {name: plain[i][mask[i]].mean(0)[None] for name, mask in masks.items()}
        by = 0.5 * (watched.corrected(mean["image"], mean["text"]) - mean["text"])[0]
        assert by.norm() > 0.1
        there = inputs["attention_mask"][i].bool()
        moved = edited[i] - plain[i]
        assert_close(moved[behind], by.expand(int(behind.sum()), -1), atol=1e-4, rtol=1e-3)
        assert moved[~behind & there].abs().max() < 1e-4


def test_without_cache_each_step_is_a_whole_edited_pass(source, core):
    """The logits of every step equal those of one forward pass with the edit of `PooledModalities.spliced`."""
    items = asked("open", 2)
    watched = Watched(source, core, c=1.0, b=0.0)
    inputs, tokens = said(source, items, watched, cache=False)
    for step, second in enumerate(watched.second):
        length = inputs["input_ids"].shape[1] + step
        ids = tokens[:, :length]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, step, dtype=torch.int64)], 1)
        batch = {"input_ids": ids, "attention_mask": mask, "sample_id": torch.arange(2)}
        means = {}

        def keep(name, mean, means=means):
            means[name] = mean
            return mean

        with source.spliced(batch, {n: lambda m, n=n: keep(n, m) for n in ("image", "text")}), torch.no_grad():
            source.model(**{**inputs, "input_ids": ids, "attention_mask": mask})
        by = watched.alpha * (watched.corrected(means["image"], means["text"]) - means["text"])
        with source.spliced(batch, {"text": lambda mean, by=by: mean + by}), torch.no_grad():
            whole = source.model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, -1]
        assert_close(second, whole, atol=1e-3, rtol=1e-3)


class Listening(ConceptAlignment):
    """Keeps the means that it corrects."""

    def corrected(self, image, text):
        self.seen = [*getattr(self, "seen", []), (image, text)]
        return super().corrected(image, text)


def test_with_cache_the_means_run_over_all_words_so_far(source, core):
    items = asked("open", 2)
    means = {}
    for cache in (True, False):
        listening = Listening(source, core, c=0.0, b=0.0)  # weight 0: both generate the same
        said(source, items, listening, cache)
        means[cache] = listening.seen
    assert len(means[True]) == len(means[False]) == 3
    for one, other in zip(means[True], means[False], strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_alpha_zero_and_weight_zero_change_nothing(source, core):
    items = asked(None)
    plain = answers(source.inner, items, 8)
    for arguments in ({"alpha": 0.0}, {"c": 0.0}):
        assert answers(source.inner, items, 8, ConceptAlignment(source, core, **arguments)) == plain
    loud = copy.deepcopy(core)
    with torch.no_grad():
        loud.decoders[1].mul_(100)
    strong = ConceptAlignment(source, loud, alpha=1.0, c=1.0, b=0.0)
    assert answers(source.inner, items, 8, strong) != plain
    assert answers(source.inner, items, 8) == plain  # hooks are gone


def test_it_runs_behind_an_alignment_and_on_other_families(tmp_path):
    inner = VisionLanguage(save_lmm(tmp_path, "qwen2_5_vl"), [POINT.replace("2", "1")], device="cpu")
    it = PooledModalities(inner, "ordinary")
    torch.manual_seed(0)
    core = VLSAE(it.spec, 64, k=8, aligned=24)
    core.align(AlignmentAutoencoder(it.spec, 24))
    watched = Watched(it, core.eval(), c=1.0, b=0.0)
    said(it, asked("open", 2), watched, cache=False)
    assert len(watched.second) == 3
    assert all(logits.isfinite().all() for logits in watched.second)


def test_cores_without_codes_per_stream_are_refused(source):
    with pytest.raises(MmsaeError, match="TopK has no code for each of image and text"):
        ConceptAlignment(source, TopK(128, 64, k=4))

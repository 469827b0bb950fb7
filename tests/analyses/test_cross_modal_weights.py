import numpy as np
import pytest
import torch

from datamodules import SceneQuestions
from mmsae.analyses import CrossModalWeights, PatchFilter
from mmsae.analyses.patch_filter import worst
from mmsae.cores import TopK
from mmsae.latents import LatentStore
from mmsae.sources import VisionLanguage
from mmsae.spec import ACTS

pytest.importorskip("transformers")
POINT = "model.language_model.layers.1"


@pytest.fixture(scope="module")
def data():
    source = VisionLanguage("miniature:lmm", [POINT])
    return SceneQuestions(12, 12, 12, source=source, examples_per_forward=6)


@pytest.fixture(scope="module")
def core(data):
    """Untrained, around the mean: its latents fire on both kinds of tokens."""
    torch.manual_seed(0)
    core = TopK(data.spec, 64, k=6).eval().requires_grad_(False)
    batch = next(iter(data.rows("train")))
    core.b_dec.copy_(batch[ACTS][POINT].median(0).values)
    return core


@pytest.fixture(scope="module")
def latents(core, data):
    return LatentStore.build(core, data.rows("test"), split="test")


def test_the_page_has_weights_beside_their_null_and_words_beside_pictures(core, data, latents):
    result = CrossModalWeights(n=4, n_latents=6, n_examples=4).run(core, latents, data)
    numbers = result.numbers
    assert numbers["omega_minus_null"] == pytest.approx(numbers["omega"] - numbers["null"])
    assert numbers["l0_text"] == pytest.approx(6)
    assert numbers["l0_image"] == pytest.approx(6)
    assert 0 < numbers["bimodal"] <= 1 - numbers["text_only"] - numbers["image_only"]
    assert "of the live latents fire on words and pictures" in result.title
    (histogram,) = result.plots
    assert [line["label"] for line in histogram.lines] == ["latents", "random tokens"]
    largest = result.tables[1]
    weights = [row[1] for row in largest.rows]
    assert weights == sorted(weights, reverse=True)
    assert [row[0] for row in largest.rows[: len(result.latents)]] == [entry["id"] for entry in result.latents]
    kinds = latents.columns["token_type"]
    for entry in result.latents:
        assert [e["note"].split(",")[0] for e in entry["examples"][:2]] == [
            "strongest text token",
            "strongest image token",
        ]
        for example in entry["examples"]:
            kind = int("image" in example["note"])
            rows = latents.rows_of_sample[int(np.flatnonzero(latents.samples[0] == example["sample"])[0])]
            (row,) = rows[latents.columns["position"][rows] == example["position"]]
            assert kinds[row] == kind
            assert latents.at(entry["id"], np.array([row]))[0] == pytest.approx(example["activation"])
        assert all(medium["kind"] == "image_text" for medium in result.media)
    # the words in the table are those of the strongest text tokens
    first = result.latents[0]["examples"][0]
    medium = result.media[first["media"]]
    word = medium["tokens"][medium["positions"].index(first["position"])].strip()
    assert word in largest.rows[0][-1] or not word


def test_activations_without_kinds_of_tokens_are_told(core, data, latents):
    columns = {name: latents.columns[name] for name in ("sample_id", "position")}
    bare = LatentStore(latents.offsets, latents.rows, latents.values, columns, latents.n_rows, split="test")
    assert "do not tell text from image tokens" in CrossModalWeights().run(core, bare, data).title
    assert "not those of all of the split 'val'" in CrossModalWeights(split="val").run(core, latents, data).title


def test_answers_with_a_part_of_the_image_tokens(core, data, latents):
    result = PatchFilter(n_items=12, keep=(1.0, 0.05), n=4).run(core, latents, data)
    numbers = result.numbers
    for name in ("cosine", "co_l0", "l0", "l1", "random"):
        for measure in ("accuracy", "cross_entropy"):
            assert numbers[f"{name}/1/{measure}"] == pytest.approx(numbers[f"all/{measure}"])
        assert numbers[f"{name}/0.05/cross_entropy"] > numbers["all/cross_entropy"]
    table = result.tables[0]
    assert table.rows[-1][1] == numbers["all/accuracy"]
    assert len(table.columns) == len(table.rows[0]) == 3


@torch.no_grad()
def test_a_masked_token_is_as_if_it_were_not_there(data):
    source = data.source
    item = data.items("test")[0]
    batch = source.collate([item])
    kind = batch["token_columns"]["token_type"][0]
    lost = torch.zeros(len(kind), dtype=torch.bool)
    lost[(kind == 1).nonzero()[5:50, 0]] = True
    masked = source.forward({**batch, "attention_mask": (~lost)[None].long()}).logits[0, ~lost]
    model = source.model
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    source.forward(batch)
    hook.remove()
    places = torch.arange(len(kind))[None, ~lost]
    hidden = model.model.language_model(inputs_embeds=seen["inputs_embeds"][:, ~lost], position_ids=places)
    torch.testing.assert_close(masked, model.lm_head(hidden.last_hidden_state)[0], atol=1e-4, rtol=1e-4)


def test_the_worst_of_each_group_are_found():
    score, group = torch.tensor([3.0, 1, 2, 5, 5, 5, 5]), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert worst(score, group, 0.5).tolist() == [False, True, False, False, False, True, True]
    assert not worst(score, group, 1.0).any()
    order = torch.randperm(7)
    assert worst(score[order], group[order], 0.01).sum() == 5  # one of each stays


def test_models_whose_tokens_cannot_be_masked_are_told(core, latents):
    bare = SceneQuestions(2, 2, 2, source=None, store="nowhere")
    assert PatchFilter().run(core, latents, bare).title == "not measured: there is no model, only stored activations"

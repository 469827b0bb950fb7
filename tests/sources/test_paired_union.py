"""Pairs as rows of one stream, their texts without a pair, and what a reader sees of either side."""

import pytest
import torch
from torch.testing import assert_close

from mmsae.cores import TopK
from mmsae.errors import MmsaeError
from mmsae.miniatures.scenes import Scenes
from mmsae.sources import MODALITIES, PairedEmbeddings, SceneCLIP


@pytest.fixture(scope="module")
def inner():
    return SceneCLIP(["visual"], device="cpu")


@pytest.fixture(scope="module")
def items():
    scenes = Scenes("val", 3)
    return [scenes[i] for i in range(3)]


@pytest.mark.parametrize("unit", [False, True])
def test_a_union_holds_the_rows_of_both_streams(inner, items, unit):
    pairs, union = PairedEmbeddings(inner, unit), PairedEmbeddings(inner, unit, union=True)
    apart, rows = pairs.read(pairs.collate(items)), union.read(union.collate(items))
    assert union.spec.streams == {"embedding": 128}
    assert_close(rows["acts"]["embedding"], torch.cat([apart["acts"]["image"], apart["acts"]["text"]]))
    assert rows["stream"].tolist() == [0, 0, 0, 1, 1, 1]
    assert rows["modality"].tolist() == [MODALITIES["image"]] * 3 + [MODALITIES["text"]] * 3
    assert rows["pair_id"].tolist() == rows["sample_id"].tolist() == [0, 1, 2, 0, 1, 2]
    assert rows["label.digit"].tolist() == 2 * apart["label.digit"].tolist()
    assert "union" not in pairs.identity  # stores that exist keep theirs
    assert union.identity["union"] is True


def test_a_union_is_spliced_on_both_sides(inner, items):
    union = PairedEmbeddings(inner, union=True)
    batch = union.collate(items)
    core = TopK({"embedding": 128}, 64, k=4).eval()
    clean = union.forward(batch)
    with union.spliced(batch, {"embedding": core}):
        changed = union.forward(batch)
    for name in ("image", "text"):
        assert_close(changed[name], core(clean[name]))
    with pytest.raises(MmsaeError, match="streams image and text"), union.spliced(batch, {"other": core}):
        pass


def test_texts_are_embedded_as_the_stream_is(inner, items):
    for unit in (False, True):
        pairs = PairedEmbeddings(inner, unit)
        rows = pairs.read(pairs.collate(items))
        assert_close(pairs.embed_texts([item["text"] for item in items]), rows["acts"]["text"], atol=1e-5, rtol=1e-4)
    assert set(pairs.prompts) == {"digit", "colour", "position", "size", "background"}


def test_a_reader_sees_the_picture_or_the_caption(inner, items):
    pairs = PairedEmbeddings(inner)
    assert pairs.render_stream(items[0], "image")["image"].size == (64, 64)
    assert pairs.render_stream(items[0], "text") == {"kind": "text", "tokens": [items[0]["text"]]}

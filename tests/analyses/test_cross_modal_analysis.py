"""Figures across modalities on a dictionary that is known: perfect, of one stream, or matched afterwards."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmsae.analyses import CrossModal, ZeroShotConcepts
from mmsae.analyses.cross_modal import wilson
from mmsae.analyses.cross_modal_measures import dense_numbers, measure, random_coder, recover_across
from mmsae.analyses.pairs import Pairs, pairs_of
from mmsae.analyses.per_stream import Matched, Union, coder_of, encoded
from mmsae.analyses.sides import sides_of
from mmsae.analyses.zero_shot_concepts import components, decide
from mmsae.codes import Codes
from mmsae.cores import Crosscoder, GroupSparse, TopK
from mmsae.errors import MmsaeError
from mmsae.latents import LatentStore
from mmsae.results import Result
from mmsae.sources import MODALITIES
from mmsae.spec import ACTS

D = 12
FACTORS = {"colour": 4, "shape": 3}


def world(n, seed, gap=0.5):
    """Embeddings with an axis for each value of two factors, the same in both streams but for a gap."""
    rng = np.random.default_rng(seed)
    labels = {"colour": rng.integers(0, 4, n), "shape": rng.integers(0, 3, n)}
    x = torch.zeros(n, D)
    x[torch.arange(n), torch.as_tensor(labels["colour"])] = 1.0
    x[torch.arange(n), 4 + torch.as_tensor(labels["shape"])] = 1.0
    offset = torch.zeros(D)
    offset[8] = gap
    noise = torch.Generator().manual_seed(seed)
    acts = {
        "image": x + offset + 0.05 * torch.randn(n, D, generator=noise),
        "text": x - offset + 0.05 * torch.randn(n, D, generator=noise),
    }
    stated = {"shape": rng.random(n) < 0.5}
    return Pairs(acts, labels, stated, np.arange(n))


def axes():
    """GroupSparse with a latent for each axis."""
    core = GroupSparse({"image": D, "text": D}, D, k=2).eval()
    with torch.no_grad():
        core.W_enc.copy_(torch.eye(D))
        core.W_dec.copy_(torch.eye(D))
        core.b_dec.zero_()
        core.b_dec[0, 8], core.b_dec[1, 8] = 0.5, -0.5
    return core


class Apart:
    """A perfect dictionary of each stream, latents of the text shifted by one: nothing is shared by name."""

    outputs = ("image", "text")
    d_latent = D

    def __init__(self, by=1):
        self.core, self.by = axes(), by

    @property
    def dictionaries(self):
        rows = torch.eye(D)
        return {"image": rows, "text": rows.roll(self.by, 0)}

    def encode_stream(self, stream, x):
        codes = self.core.encode_stream(stream, x)
        return codes if stream == "image" else Codes(codes.values, (codes.indices + self.by) % D, D)

    def decode_stream(self, stream, codes):
        dense = codes.dense().roll(-self.by if stream == "text" else 0, -1)
        return self.core.decode_stream(stream, Codes(dense, None, D))


def test_a_perfect_dictionary_gets_perfect_figures():
    val, test = world(300, 0), world(400, 1)
    found = measure(axes(), val, test, FACTORS).numbers
    assert found["both"] == pytest.approx(7 / D)
    assert found["dead"] == pytest.approx(5 / D)
    assert found["only_image"] == found["only_text"] == 0
    assert found["balanced"] == 1
    assert found["jaccard"] > 0.99
    assert found["jaccard_shuffled"] < 0.5
    assert found["l0"] == pytest.approx(2)
    assert found["fvu"] < 0.05
    assert found["cross_recovery"] > 0.99
    assert found["cross_found"] == 1
    assert found["gap"] < 0.1
    assert found["pair_cosine"] > 0.98
    assert found["inter"] < found["intra"]
    assert found["control"] > 0.4  # the queries lack the value, the gallery has it in a fourth or a third
    assert abs(found["control_random"]) < 0.15
    dense = dense_numbers(val, test, FACTORS)
    assert dense["gap"] > 0.5
    assert dense["cross_recovery"] > 0.9


def test_latents_of_other_meaning_in_the_other_stream_are_seen():
    val, test = world(300, 0), world(400, 1)
    mine, theirs = (measure(c, val, test, FACTORS, n_queries=0).numbers for c in (axes(), Apart()))
    assert theirs["same_recovery"] == pytest.approx(mine["same_recovery"], abs=1e-6)
    assert theirs["fvu"] == pytest.approx(mine["fvu"], abs=1e-6)
    assert theirs["cross_recovery"] < 0.6
    assert theirs["cross_found"] == 0
    assert theirs["jaccard"] < 0.3
    assert theirs["intra"] < mine["intra"] - 0.3
    assert theirs["mms"] < mine["mms"] - 0.1


def test_captions_that_do_not_say_a_factor_do_not_count():
    val, test = world(300, 0), world(400, 1)
    silent = test.stated["shape"]
    text = test.acts["text"].clone()
    text[~silent, 4:7] = torch.randn(int((~silent).sum()), 3)  # nonsense where nothing is said
    told = test._replace(acts={**test.acts, "text": text})
    codes = [{n: encoded(axes(), x, n) for n, x in p.acts.items()} for p in (val, told)]
    assert np.nanmean(recover_across(*codes, val, told, FACTORS).auroc) > 0.99
    everything = told._replace(stated={})
    assert np.nanmean(recover_across(*codes, val, everything, FACTORS).auroc) < 0.95
    features = test.features(FACTORS, "text")
    assert features.shape == (400, 7)
    assert_close(features.sum(1), 1 + torch.as_tensor(silent).float())
    assert (test.features(FACTORS, "image").sum(1) == 2).all()


def test_matching_afterwards_finds_the_partners():
    train = world(500, 2)
    core = TopK(D, D, k=3, aux_coefficient=0).eval()
    other = TopK(D, D, k=3, aux_coefficient=0).eval()
    order = torch.randperm(D, generator=torch.Generator().manual_seed(0))
    for made, rows in ((core, torch.eye(D)), (other, torch.eye(D)[order])):
        with torch.no_grad():
            made.W_enc.copy_(rows)
            made.W_dec.copy_(rows)
    both = Matched.on_pairs({"image": core, "text": other}, train.acts)
    test = world(300, 3)
    one, two = (both.encode_stream(n, x).dense() for n, x in test.acts.items())
    assert ((one[:, :7] > 0.5) == (two[:, :7] > 0.5)).float().mean() > 0.99
    assert_close(both.dictionaries["text"][:7], torch.eye(D)[:7])
    made = both.decode_stream("text", both.encode_stream("text", test.acts["text"]))
    assert_close(made, other.decode(other.encode(test.acts["text"])))
    assert measure(both, train, test, FACTORS, n_queries=0).numbers["cross_recovery"] > 0.99


def test_one_dictionary_for_all_streams_and_one_code_for_all_of_them():
    core = TopK(D, D, k=3).eval()
    union = coder_of(core, ["image", "text"])
    x = torch.randn(5, D)
    assert_close(union.encode_stream("text", x).dense(), core.encode(x).dense())
    mean = {"image": torch.ones(D), "text": torch.zeros(D)}
    centred = Union(core, ["image", "text"], mean)
    assert_close(centred.decode_stream("image", centred.encode_stream("image", x)), core(x - 1) + 1)
    with pytest.raises(MmsaeError, match="Crosscoder has one code for all its streams"):
        coder_of(Crosscoder({"image": D, "text": D}, 8), ["image", "text"])
    dense = random_coder(D, 40, 4, world(50, 0), 0).encode_stream("image", x)
    assert (dense.l0() == 4).all()


class Data:
    """A datamodule of stored pairs, with or without a source."""

    value_names = {"colour": list("abcd"), "shape": list("xyz")}  # noqa: RUF012
    has_items, source = False, None

    def __init__(self, union=False):
        self.union = union
        self.pairs = {"train": world(200, 5), "val": world(300, 0), "test": world(400, 1)}

    def stated(self, split):
        return self.pairs[split].stated

    def rows(self, split):
        held = self.pairs[split]
        ids = torch.as_tensor(held.samples)
        labels = {f"label.{name}": torch.as_tensor(v) for name, v in held.labels.items()}
        for own in ids.split(64):
            batch = {"sample_id": own, "pair_id": own, **{n: v[own] for n, v in labels.items()}}
            acts = {name: x[own] for name, x in held.acts.items()}
            if not self.union:
                yield {ACTS: acts, **batch}
                continue
            n = len(own)
            twice = {name: torch.cat([v, v]) for name, v in batch.items()}
            kinds = torch.tensor([MODALITIES["image"]] * n + [MODALITIES["text"]] * n)
            number = torch.tensor([0] * n + [1] * n)
            yield {ACTS: {"embedding": torch.cat(list(acts.values()))}, **twice, "stream": number, "modality": kinds}


def test_pairs_are_put_together_by_their_ids():
    shared, union = (
        pairs_of(core, data, "test", 1000) for core, data in ((axes(), Data()), (TopK(D, D, k=3), Data(union=True)))
    )
    for found in (shared, union):
        assert list(found.acts) == ["image", "text"]
        assert_close(found.acts["text"], world(400, 1).acts["text"])
        assert found.labels["colour"].tolist() == world(400, 1).labels["colour"].tolist()
        assert found.stated["shape"].tolist() == world(400, 1).stated["shape"].tolist()
    assert len(pairs_of(axes(), Data(), "test", 100).samples) == 100
    with pytest.raises(MmsaeError, match="there are no pairs: give a source of two streams"):
        pairs_of(TopK(D, D, k=3), Data(), "test", 100)


@pytest.mark.parametrize("union", [False, True])
def test_the_analysis_says_it_with_controls_and_intervals(union):
    data = Data(union)
    core = axes()
    if union:
        core = TopK({"embedding": D}, D, k=3).eval()
        with torch.no_grad():
            core.W_enc.copy_(torch.eye(D))
            core.W_dec.copy_(torch.eye(D))
    latents = LatentStore.build(core, data.rows("test"), split="test")
    assert [side.name for side in sides_of(core, latents)] == ["image", "text"]
    found = CrossModal(n_bootstrap=20, n_queries=10).run(core, latents, data)
    numbers = found.numbers
    assert numbers["dictionary/cross_recovery"] > 0.98
    assert numbers["dictionary/jaccard"] == pytest.approx(0.5 if union else 1, abs=0.02)  # the union codes the gap
    assert numbers["dictionary/jaccard_shuffled"] < numbers["dictionary/jaccard"] - 0.2
    assert numbers["random/cross_recovery"] < 0.95
    assert numbers["dictionary/r@1"] < 0.2  # twelve kinds of pairs: nobody tells partners of one kind apart
    assert numbers["dense/gap"] > 0.5
    assert [t.title for t in found.tables][-1] == "The latent of each factor value, in the other stream"
    assert len(found.tables[-1].rows) == 14
    row = next(row for row in found.tables[2].rows if row[0].startswith("AUROC of the latent"))
    low, high = map(float, row[-1].split(" to "))
    assert low <= numbers["dictionary/cross_recovery"] + 1e-3
    assert high >= numbers["dictionary/cross_recovery"] - 1e-3
    assert "both streams" in found.title


def test_without_labels_only_the_codes_speak():
    data = Data()
    data.value_names = {}
    core = axes()
    found = CrossModal(n_bootstrap=5).run(core, LatentStore.build(core, data.rows("test")), data)
    assert "dictionary/cross_recovery" not in found.numbers
    assert found.numbers["dictionary/jaccard"] > 0.99
    assert len(found.tables) == 2


def test_intervals_of_shares():
    low, high = wilson(0.5, 100)
    assert (low, high) == (pytest.approx(0.404, abs=2e-3), pytest.approx(0.596, abs=2e-3))
    assert wilson(0.0, 100)[0] == 0


def test_concepts_help_where_embeddings_are_confused():
    """An axis of noise as large as the classes misleads embeddings; the code leaves it out."""
    val, test = world(300, 0, gap=0.0), world(400, 1, gap=0.0)
    prompts = torch.eye(4, D)

    def confused(pairs, seed):
        x = pairs.acts["image"].clone()
        x[:, 9:] += 2 * torch.randn(len(x), 3, generator=torch.Generator().manual_seed(seed))
        return x

    prompts = prompts + torch.cat([torch.zeros(4, 9), torch.randn(4, 3, generator=torch.Generator().manual_seed(9))], 1)

    class Clean:
        outputs, d_latent = ("image", "text"), D

        def encode_stream(self, stream, x):
            z = x.clone()
            z[:, 4:] = 0
            return Codes(z.relu(), None, D)

    given = (confused(val, 1), confused(test, 2), prompts, val.labels["colour"], test.labels["colour"], "image")
    found = decide(Clean(), *given)
    assert found.alpha > 0
    assert found.with_concepts.mean() > found.base.mean() + 0.1
    assert found.by_alpha[0] < max(found.by_alpha)

    class Useless(Clean):
        def encode_stream(self, stream, x):
            return Codes(torch.ones(len(x), D), None, D)

    none = decide(Useless(), *given)
    assert none.alpha == 0
    assert none.with_concepts.tolist() == none.base.tolist()


def test_zero_shot_runs_on_a_source_of_two_towers():
    class Source:
        prompts = {"colour": list("abcd"), "taste": ["sweet"]}  # noqa: RUF012

        def embed_texts(self, texts):
            return torch.eye(len(texts), D)

    data = Data()
    data.source = Source()
    core = axes()
    latents = LatentStore.build(core, data.rows("test"))
    found = ZeroShotConcepts(n_bootstrap=50).run(core, latents, data)
    for name in ("dictionary", "random", "PCA"):
        assert {f"{name}/base", f"{name}/gain"} <= set(found.numbers)
    assert found.numbers["dictionary/base"] > 0.95
    assert found.numbers["dictionary/codes_alone"] > 0.95
    assert "dictionary/colour/alpha" in found.numbers
    assert not any("taste" in name for name in found.numbers)
    pca = components(data.pairs["train"], 3)
    assert (pca.encode_stream("text", data.pairs["test"].acts["text"]).l0() <= 3).all()
    data.source = None
    assert ZeroShotConcepts().run(core, latents, data).title.startswith("not measured")
    data.source = Source()
    with pytest.raises(MmsaeError, match="no label has prompts"):
        ZeroShotConcepts(prompts={"taste": ["sweet"]}).run(core, latents, data)


def test_what_it_gives_can_be_saved_and_is_the_same_twice(tmp_path):
    data, core = Data(), axes()
    latents = LatentStore.build(core, data.rows("test"))
    before = {k: v.clone() for k, v in core.state_dict().items()}
    first, again = (CrossModal(n_bootstrap=20).run(core, latents, data) for _ in range(2))
    assert Result.load(first.save(tmp_path)) == first
    assert first.title
    assert all(type(v) is float for v in first.numbers.values())
    assert str(first) == str(again)  # NaN differs from itself
    assert all(torch.equal(before[k], v) for k, v in core.state_dict().items())

import numpy as np
import pytest
import torch
from tiny import live

from datamodules import ActivationDataModule
from mmsae.analyses import HeadAttribution
from mmsae.analyses.head_attribution import heads_of, read_heads
from mmsae.cores import ITDA, AbsTopK, TopK
from mmsae.errors import MmsaeError
from mmsae.latents import LatentStore
from mmsae.metrics.attention import by_source, encoder_rows, head_share
from mmsae.sources import CausalLM
from mmsae.spec import ACTS, TARGET

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog"]
TEXTS = ["the cat sat", "a dog and the cat saw a mat", "on the mat sat a dog", "and the dog saw the cat and a cat"]
SIZE = {"vocab_size": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
MODELS = {
    "llama": (
        {"model_type": "llama", **SIZE, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2},
        "model.layers.1.self_attn.o_proj:input",
    ),
    "gpt2": (
        {"model_type": "gpt2", **SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4}, "transformer.h.1.attn.c_proj:input",
    ),
    "gpt_neox": (
        {"model_type": "gpt_neox", **SIZE, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4},
        "gpt_neox.layers.1.attention.dense:input",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    names = ["<unk>", "<s>", "</s>", "<pad>", *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def data_of(tokenizer, kind, stream=None, **arguments):
    config, own = MODELS[kind]
    source = CausalLM(tokenizer, [stream or own], config=config, device="cpu", **arguments)
    for weight in source.model.parameters():
        weight.mul_(3)  # away from a uniform pattern
    data = ActivationDataModule(source=source, batch_size=8, examples_per_forward=2)
    data.items = lambda split: [{"text": text, "sample_id": i} for i, text in enumerate(TEXTS)]
    return data


@pytest.fixture(params=MODELS)
def data(request, tokenizer, monkeypatch):
    monkeypatch.setattr(ActivationDataModule, "has_items", True)  # they are given to the object, not by a subclass
    return data_of(tokenizer, request.param)


def run(core, data, **arguments):
    core = core.eval()
    return HeadAttribution(**arguments).run(core, LatentStore.build(core, data.rows("test"), split="test"), data)


def dictionary(stream, width=32):
    torch.manual_seed(0)
    return TopK({stream: width}, 40, k=3)


def test_it_reads_what_the_model_computes(data):
    stream = data.source.points[0].name
    assert heads_of(data.source, stream, 32) == 4
    before = data.source.model.config._attn_implementation
    heads = read_heads(data.source, data.items("test")[1], stream, 4)
    assert data.source.model.config._attn_implementation == before
    rows = data.source.read(data.source.collate([data.items("test")[1]]))
    core = dictionary(stream)
    encoder, constant = encoder_rows(core, torch.arange(40))
    want = core.pre_activations(rows[ACTS][stream])
    found = by_source(heads.pattern, heads.values, encoder).sum((-1, -2)) + constant
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_tables_hold_heads_latents_and_sources(data):
    stream = data.source.points[0].name
    core = dictionary(stream)
    result = run(core, data, n_latents=5, n_examples=2)
    table, heads, concentrated, examples = result.tables
    share = head_share(core.dictionary.detach(), 4)
    latents = LatentStore.build(core, data.rows("test"))
    live = np.flatnonzero(latents.firings)
    counts = share[live].argmax(1).bincount(minlength=4)
    assert [row[1] for row in heads.rows] == counts.tolist()
    assert result.numbers["median_share"] == pytest.approx(float(np.median(share[live].amax(1))), abs=1e-6)
    assert result.numbers["median_share/low"] <= result.numbers["median_share"] <= result.numbers["median_share/high"]
    assert [row[0] for row in table.rows] == ["dictionary", "random dictionary"]
    assert 5 <= len(examples.rows) <= 10
    assert [row[0] for row in concentrated.rows] == live[share[live].amax(1).argsort(descending=True)[:5]].tolist()
    for latent, head, value, words in concentrated.rows:
        assert (head, value) == (int(share[latent].argmax()), pytest.approx(float(share[latent].max())))
        assert len(words.split()) == 3
    for latent, _, value, fires, reads, part in examples.rows:
        assert 0 < value <= latents.strongest[latent] * (1 + 1e-5)
        assert 0 < part <= 1
        assert int(reads.split()[-1]) <= int(fires.split()[-1])  # nothing is read from later tokens
    assert result.settings["n_heads"] == 4


def test_an_example_by_hand(tokenizer, data):
    stream = data.source.points[0].name
    core = dictionary(stream)
    row = run(core, data, n_latents=1, n_examples=1).tables[3].rows[0]
    latents = LatentStore.build(core, data.rows("test"))
    sample, place, value = latents.top_samples(row[0], 1)[0]
    t = int(latents.columns["position"][place])
    item = data.items("test")[sample]
    heads = read_heads(data.source, item, stream, 4)
    part = by_source(heads.pattern, heads.values, core.W_enc[row[0]][None].detach())[t, 0]
    words = data.source.render(item)["tokens"]
    s = int(part.sum(0).argmax())
    assert row[1] == int(part.sum(1).argmax())
    assert row[2] == pytest.approx(value)
    assert row[3] == f"{words[t].strip()!r} at {t}"
    assert row[4] == f"{words[s].strip()!r} at {s}"
    assert row[5] == pytest.approx(float(part.sum(0)[s] / part.sum(0).clamp_min(0).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "stream"),
    [
        ("llama", "model.layers.1"),
        ("llama", "model.layers.1.self_attn.o_proj"),
        ("gpt2", "transformer.h.1.mlp.c_proj:input"),
    ],
)
def test_streams_that_are_no_heads_are_told(tokenizer, kind, stream):
    data = data_of(tokenizer, kind, stream)
    width = data.spec.d_in
    result = run(dictionary(stream, width), data)
    assert (
        result.title == f"not measured: {stream} is not known to be the heads of an attention layer; n_heads would tell"
    )


def test_without_a_model_the_decoder_alone_is_read():
    core = TopK({"0": 8}, 16, k=3)
    result = run(core, live(20), n_heads=4)
    assert len(result.tables) == 2
    assert result.settings["examples"] == "not measured: there is no model, only stored activations"
    with pytest.raises(MmsaeError, match="n_heads=3 does not divide the width 8"):
        run(core, live(20), n_heads=3)


def test_signed_codes_are_attributed_in_their_own_direction(data):
    stream = data.source.points[0].name
    torch.manual_seed(0)
    core = AbsTopK({stream: 32}, 40, k=3)
    rows = run(core, data, n_latents=40).tables[3].rows
    assert any(row[2] < 0 for row in rows)
    assert all(row[5] > 0 for row in rows)


def test_codes_that_are_no_pre_activations_are_told(data):
    """A later step of matching pursuit reads what the earlier ones left."""
    core = ITDA({data.source.points[0].name: 32}, 40, k=3, threshold=0.1)
    for batch in data.rows("train"):
        core.partial_fit(batch)
    result = run(core, data, n_latents=40)
    assert result.settings["examples"] == "not measured: codes of ITDA are not its pre-activations"
    assert len(result.tables) == 2


def test_transcoders_are_refused(tokenizer):
    data = data_of(tokenizer, "gpt2")
    stream = data.source.points[0].name
    core = TopK({stream: 32, TARGET: 32}, 40, k=3).eval()
    with pytest.raises(MmsaeError, match="does not write the heads that it reads"):
        HeadAttribution().run(core, LatentStore.build(core, data.rows("test")), data)

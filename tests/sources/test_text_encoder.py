import pytest
import torch
from torch.testing import assert_close
from words import save_llama, word_tokenizer

from mmsae.errors import MmsaeError
from mmsae.sources import TextEncoder

BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 160,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2}
FAMILIES = {
    "bert": (BERT, "encoder.layer"),
    "roberta": ({**BERT, "pad_token_id": 3}, "encoder.layer"),
    "modernbert": ({**BERT, "pad_token_id": 3, "global_attn_every_n_layers": 2, "local_attention": 4}, "layers"),
    "t5": (T5, "encoder.block"),
}
BERT_PARTS = ("output.dense", "attention.output.dense", "attention.output.dense")
PARTS = {  # MLP out, attention out, and the module that the heads' outputs go into
    "bert": BERT_PARTS,
    "roberta": BERT_PARTS,
    "modernbert": ("mlp", "attn", "attn.Wo"),
    "t5": ("layer.1.DenseReluDense", "layer.0.SelfAttention", "layer.0.SelfAttention.o"),
}
BERT_TOKENS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
T5_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
ITEMS = [{"text": text, "sample_id": i} for i, text in enumerate(("the cat sat", "a dog and the cat saw a mat", "on"))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("encoders")
    bert = word_tokenizer(special=BERT_TOKENS, headers=(), template=None, around="[CLS] $A [SEP]")
    bert.save_pretrained(home / "bert")
    word_tokenizer(special=T5_TOKENS, headers=(), template=None, around="$A </s>").save_pretrained(home / "t5")
    return home


def encoder(folders, family, hook_points=None, **arguments):
    config, layers = FAMILIES[family]
    given = {"model_type": family, **config}
    folder = folders / ("t5" if family == "t5" else "bert")
    return TextEncoder(folder, hook_points or [f"{layers}.*"], config=given, device="cpu", **arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_what_the_model_reports(family, folders):
    source = encoder(folders, family)
    assert list(source.spec.streams.values()) == [16, 16]
    batch = source.collate(ITEMS)
    read, mask = source.read(batch), batch["attention_mask"].bool()
    with torch.no_grad():
        told = source.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
    first = next(iter(read["acts"].values()))
    assert_close(first, told.hidden_states[1][mask])
    assert not hasattr(source.model, "decoder")
    alone = source.read(source.collate(ITEMS[:1]))
    n = len(alone["kind"])
    assert_close(alone["acts"], {name: rows[:n] for name, rows in read["acts"].items()}, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_layer_are_read(family, folders):
    mlp, attention, out = (f"{FAMILIES[family][1]}.1.{part}" for part in PARTS[family])
    source = encoder(folders, family, [mlp, attention, f"{out}:input"])
    acts = source.read(source.collate(ITEMS))["acts"]
    assert acts[mlp].shape[1] == 16
    with torch.no_grad():
        assert_close(source.model.get_submodule(out)(acts[f"{out}:input"]), acts[attention])


def test_start_and_end_are_no_words(folders):
    read = (source := encoder(folders, "bert")).read(source.collate(ITEMS))
    assert read["kind"].tolist() == [1, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 2]
    read = (source := encoder(folders, "t5")).read(source.collate(ITEMS))
    assert read["kind"].tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2]
    assert set(read) >= {"token_id", "position", "sample_id"}


def test_a_cut_text_keeps_its_end_token_and_shows_its_words(folders):
    source = encoder(folders, "bert", context_length=5)
    assert source.render(ITEMS[1])["tokens"] == ["[CLS]", "a", " dog", " and", "[SEP]"]
    assert source.collate(ITEMS)["input_ids"].shape == (3, 5)


def test_one_row_per_text(folders):
    every = encoder(folders, "bert")
    rows = every.read(every.collate(ITEMS))
    for positions in ("mean", "first"):
        source = encoder(folders, "bert", ["encoder.layer.1"], positions=positions)
        read = source.read(source.collate(ITEMS))
        assert read["sample_id"].tolist() == [0, 1, 2]
        acts, kind = rows["acts"]["encoder.layer.1"][:5], rows["kind"][:5]
        expected = acts[kind == 0].mean(0) if positions == "mean" else acts[0]
        assert_close(read["acts"]["encoder.layer.1"][0], expected, atol=1e-5, rtol=1e-4)


def test_pooled_outputs_have_one_position(folders):
    source = encoder(folders, "bert", ["pooler"])
    assert source.read(source.collate(ITEMS))["acts"]["pooler"].shape == (3, 16)


def test_a_checkpoint_without_pooler_is_read_but_not_at_its_pooler(folders, tmp_path):
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders / "bert").save_pretrained(tmp_path)
    assert TextEncoder(tmp_path, ["encoder.layer.*"], 16, device="cpu").spec.d_in == 16
    with pytest.raises(MmsaeError, match=r"lack 'pooler\.dense\.bias' and 1 more"):
        TextEncoder(tmp_path, ["pooler"], 16).model  # noqa: B018


def test_the_encoder_of_a_checkpoint_with_a_decoder(folders, tmp_path):
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    whole = T5ForConditionalGeneration(T5Config(**T5)).eval()
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders / "t5").save_pretrained(tmp_path)
    source = TextEncoder(tmp_path, ["encoder.block.*"], device="cpu")
    batch = source.collate(ITEMS)
    with torch.no_grad():
        told = whole.encoder(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[1]
    assert_close(source.read(batch)["acts"]["encoder.block.0"], told[batch["attention_mask"].bool()])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "./nowhere"}, "there is no folder './nowhere' with a model"),
        ({"model": "no/such-model"}, "neither a local folder nor can it be fetched"),
        ({"config": {"model_type": "roberta", **BERT, "pad_token_id": 3}, "context_length": 157}, "between 1 and 156"),
        ({"config": {"model_type": "brt"}}, "transformers cannot build"),
        ({"config": {"model_type": "bart"}}, "cannot load the encoder of 'bart' without its decoder"),
        ({"config": {"model_type": "bert", **BERT}, "hook_points": ["encoder.layers.0"]}, "has no module that matches"),
    ],
)
def test_what_cannot_be_loaded_is_named(arguments, said, folders):
    with pytest.raises(MmsaeError, match=said):
        TextEncoder(**{"model": folders / "bert", "hook_points": ["encoder.layer.*"], **arguments}).model  # noqa: B018


def test_a_causal_model_is_an_encoder_too(tmp_path):
    folder = save_llama(tmp_path, word_tokenizer())  # as the embedding models that are made of language models
    assert TextEncoder(folder, ["layers.*"], device="cpu").spec.streams == {"layers.0": 16, "layers.1": 16}

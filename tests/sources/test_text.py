import math
import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.sources import CausalLM

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog"]
TEXTS = ["the cat sat", "a dog and the cat saw a mat", "on"]
SIZE = {"vocab_size": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
LLAMA = {
    **SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
GPT2 = {**SIZE, "n_embd": 16, "n_layer": 3, "n_head": 2}
DATA = Path(os.environ.get("MMSAE_DATA", Path(__file__).parents[3] / "shared" / "data"))


def items(texts=TEXTS):
    return [{"text": text, "sample_id": i} for i, text in enumerate(texts)]


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    built = LlamaForCausalLM(LlamaConfig(**LLAMA)) if request.param == "llama" else GPT2LMHeadModel(GPT2Config(**GPT2))
    built.save_pretrained(path)
    save_tokenizer(path)
    return path


def blocks(folder):
    return "model.layers.*" if folder.name.startswith("llama") else "transformer.h.*"


def test_layers_are_what_the_model_reports(folder):
    source = CausalLM(folder, [blocks(folder)], device="cpu")
    batch = source.collate(items())
    read = source.read(batch)
    with torch.no_grad():
        told = source.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
    for stream, reported in zip(list(read["acts"].values())[:2], told.hidden_states[1:], strict=False):
        assert_close(stream, reported[batch["attention_mask"].bool()])
    alone = source.read(source.collate(items()[:1]))  # padding does not change what is read
    assert_close(alone["acts"], {name: rows[:4] for name, rows in read["acts"].items()}, atol=1e-5, rtol=1e-4)


def test_padding_is_never_read_and_the_start_token_is_special(folder):
    source = CausalLM(folder, [blocks(folder)], context_length=6, device="cpu")
    read = source.read(source.collate(items()))
    assert read["sample_id"].bincount().tolist() == [4, 6, 2]
    assert read["position"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]
    assert read["kind"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert read["modality"].unique().tolist() == [1]
    assert read["row"].unique().tolist() == [-1]
    for positions, expected in (("last", [3, 5, 1]), ("first", [1, 1, 1]), ("mean", [-1, -1, -1])):
        one = CausalLM(folder, [blocks(folder)], 6, positions=positions, drop_special=True, device="cpu")
        assert one.read(one.collate(items()))["position"].tolist() == expected


def test_cross_entropy_is_that_of_transformers(folder):
    source = CausalLM(folder, [blocks(folder)], device="cpu")
    batch = source.collate(items())
    with torch.no_grad():
        found = source.outcomes(source.forward(batch), batch)["cross_entropy"]
        ids = source.collate(items()[:1])["input_ids"]
        assert_close(found[0], source.model(ids, labels=ids).loss, atol=1e-5, rtol=1e-4)
    assert math.log(16) / 2 < found.mean() < 2 * math.log(16)


def test_special_tokens_in_the_text_and_given_ids(folder):
    source = CausalLM(folder, [blocks(folder)], device="cpu")
    read = source.read(source.collate([{"input_ids": [1, 4, 2, 5, 0], "sample_id": 0}]))
    assert read["kind"].tolist() == [1, 0, 2, 0, 0]  # an unknown word is a word
    assert source.render({"input_ids": [1, 4, 2], "sample_id": 0})["tokens"] == ["<s>", "the", "</s>"]


def test_tokens_along_positions_read_like_the_text(folder):
    source = CausalLM(folder, [blocks(folder)], context_length=6, device="cpu")
    for item in items():
        tokens = source.render(item)["tokens"]
        assert len(tokens) == source.collate([item])["input_ids"].shape[1]
        assert item["text"].startswith("".join(tokens[1:]))
    bare = CausalLM(folder, [blocks(folder)], prepend_bos=False, device="cpu")
    assert bare.render(items()[0])["tokens"] == ["the", " cat", " sat"]


def test_byte_level_tokens_show_spaces_as_spaces(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["the cat the cat"], trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=264))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(tmp_path)
    source = CausalLM(tmp_path, ["model.layers.0"], config={"model_type": "llama", **LLAMA, "vocab_size": 300})
    item = {"text": "the café\nthe cat 🙂", "sample_id": 0}
    tokens = source.render(item)["tokens"]
    assert "".join(tokens) == item["text"]
    assert " " in "".join(tokens)
    assert len(tokens) == source.collate([item])["input_ids"].shape[1]
    ids = source.collate([{"text": "the cat", "sample_id": 0}])["input_ids"][0].tolist()
    assert "".join(source.render({"input_ids": ids, "sample_id": 0})["tokens"]) == "the cat"


def test_random_weights_from_a_configuration(folder):
    given = {"model_type": "llama", **LLAMA, "hidden_size": 8}
    one, two = (CausalLM(folder, ["model.layers.0"], config=given, device="cpu") for _ in range(2))
    assert one.spec.streams == {"model.layers.0": 8}
    assert one.identity == two.identity


def test_missing_weights_are_not_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state.pop(sorted(state)[3])
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MmsaeError, match="lack"):
        CausalLM(tmp_path, [blocks(folder)]).model  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "./nowhere"}, "there is no folder './nowhere' with a model"),
        ({"model": "no/such-model"}, "neither a local folder nor can it be fetched .* give the path"),
        ({"context_length": 256}, "context_length=256 is out of range: it must be between 1 and 128"),
        ({"context_length": 0}, "context_length=0 is out of range"),
        ({"config": {"model_type": "lama"}}, "transformers cannot build"),
        ({"config": {"model_type": "llama", **LLAMA, "vocab_size": 8}}, "has 13 tokens but the model .* only 8"),
        ({"hook_points": ["model.layer.0"]}, "has no module that matches 'model.layer.0'; nearest:"),
    ],
)
def test_what_cannot_be_loaded_is_named(arguments, said, folder):
    with pytest.raises(MmsaeError, match=said):
        CausalLM(**{"model": folder, "hook_points": [blocks(folder)], **arguments}).model  # noqa: B018


def test_an_empty_folder_and_empty_texts_are_named(folder, tmp_path):
    with pytest.raises(MmsaeError, match="holds no model that transformers can load"):
        CausalLM(tmp_path, ["a"]).model  # noqa: B018
    with pytest.raises(MmsaeError, match="item 5 has no text"):
        CausalLM(folder, ["a"]).collate([{"text": "", "sample_id": 5}])


@pytest.mark.skipif(not (DATA / "stories260k").is_dir(), reason="set MMSAE_DATA to a folder with stories260k")
def test_a_trained_model():
    source = CausalLM(DATA / "stories260k", ["model.layers.3"], context_length=64, device="cpu")
    stories = (DATA / "stories260k" / "generated_stories.txt").read_text()[:40_000].split("<|endoftext|>")[:16]
    data = items([story.strip() for story in stories])
    batch = source.collate(data)
    assert source.read(batch)["acts"]["model.layers.3"].shape == (16 * 64, 64)
    with torch.no_grad():
        loss = source.outcomes(source.forward(batch), batch)["cross_entropy"].mean()
    assert 0.8 < loss < 1.4  # nats; the beginnings of its own stories
    assert data[0]["text"].startswith("".join(source.render(data[0])["tokens"][1:]))

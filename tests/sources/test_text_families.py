"""Every family of causal language models gives what transformers reports, at all four kinds of hook points."""

import pytest
import torch
from torch.testing import assert_close
from words import save_llama, word_tokenizer

from mmsae.sources import CausalLM

ROPE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 160,
}  # fmt: skip
LLAMA = "model.layers.*"
LLAMA_LIKE = (LLAMA, f"{LLAMA}.mlp", f"{LLAMA}.self_attn", f"{LLAMA}.self_attn.o_proj:input")
GPT2 = "transformer.h.*"
GPT2_LIKE = (GPT2, f"{GPT2}.mlp", f"{GPT2}.attn", f"{GPT2}.attn.c_proj:input")
NEOX = "gpt_neox.layers.*"
NEOX_LIKE = (NEOX, f"{NEOX}.mlp", f"{NEOX}.attention", f"{NEOX}.attention.dense:input")
FAMILIES = {
    "gpt2": ({"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 160}, GPT2_LIKE, 16),
    "gpt_neox": ({**{k: v for k, v in ROPE.items() if k not in ("head_dim", "num_key_value_heads")}}, NEOX_LIKE, 16),
    "llama": (ROPE, LLAMA_LIKE, 24),
    "mistral": (ROPE, LLAMA_LIKE, 24),
    "gemma2": ({**ROPE, "sliding_window": 4}, LLAMA_LIKE, 24),
    "gemma3_text": ({**ROPE, "sliding_window": 4}, LLAMA_LIKE, 24),
    "qwen2": ({**ROPE, "head_dim": None}, LLAMA_LIKE, 16),
    "qwen3": (ROPE, LLAMA_LIKE, 24),
}
ITEMS = [{"text": text, "sample_id": i} for i, text in enumerate(("the cat sat", "a dog and the cat saw a mat", "on"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("words"), word_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_are_those_of_transformers(family, folder):
    config, (residual, mlp, attention, heads), width = FAMILIES[family]
    given = {"model_type": family, **{k: v for k, v in config.items() if v is not None}}
    source = CausalLM(folder, [residual, mlp, attention, heads], config=given, device="cpu")
    assert list(source.spec.streams.values()) == [16] * 6 + [width] * 2
    batch = source.collate(ITEMS)
    read = source.read(batch)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        told = source.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
    acts = read["acts"]
    first, second = (residual.replace("*", str(i)) for i in range(2))
    assert_close(acts[first], told.hidden_states[1][mask])
    final = source.model.base_model.get_submodule({"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(family, "norm"))
    assert_close(final(acts[second]), told.hidden_states[2][mask])  # transformers reports the last one normalised
    output = source.model.get_submodule(heads.replace("*", "1").removesuffix(":input"))
    with torch.no_grad():
        assert_close(output(acts[heads.replace("*", "1")]), acts[attention.replace("*", "1")])
    assert read["token_id"].tolist() == batch["input_ids"][mask].tolist()
    alone = source.read(source.collate(ITEMS[:1]))  # neither padding nor company changes what is read
    assert_close(alone["acts"], {name: rows[:4] for name, rows in acts.items()}, atol=1e-5, rtol=1e-4)


def test_predictions_are_the_tokens_that_come(folder):
    source = CausalLM(folder, ["model.layers.0"], device="cpu")
    batch = source.collate(ITEMS)
    with torch.no_grad():
        output = source.forward(batch)
        logits, truth = source.predictions(output, batch)
    ids = source.collate(ITEMS[:1])["input_ids"]
    assert truth[:3].tolist() == ids[0, 1:].tolist()
    assert len(truth) == int(batch["attention_mask"].sum()) - 3
    mean = source.outcomes(output, batch)["cross_entropy"]
    total = (mean * (batch["attention_mask"].sum(1) - 1)).sum()
    assert_close(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"), total)

"""FAST (arXiv 2506.07691): a dictionary for dialogues learns from dialogues that the model reads one by one.

A random transformer of one layer, real sources and datamodules; the three arrangements of the paper with equal rows.
"""

import json

import numpy as np
import pytest
import torch
from synthetic import train
from words import save_llama, word_tokenizer

from datamodules import Dialogues, TextFiles
from mmsae.cores import TopK
from mmsae.sources import CausalLM

STREAM = "model.layers.0"
N_TOPICS, TOPIC_WORDS, D = 8, 7, 48
WORDS = [f"w{i}" for i in range(61)]
TEMPLATE = "{{ bos_token }}{% for message in messages %} <|{{ message.role }}|> {{ message.content }}{% endfor %}"


def write_dialogues(path, n, seed):
    """Dialogues of 6 to 19 tokens, start and headers included, about one of eight topics."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(n):
            topic = TOPIC_WORDS * rng.integers(N_TOPICS)
            words = [WORDS[topic + i] for i in rng.integers(TOPIC_WORDS, size=rng.integers(3, 17))]
            turn = rng.integers(1, len(words))
            said = {"user": words[:turn], "assistant": words[turn:]}
            messages = [{"role": role, "content": " ".join(part)} for role, part in said.items()]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def write_texts(path, n_words, seed):
    """Texts of 200 words, all words equally likely."""
    drawn = np.random.default_rng(seed).integers(len(WORDS), size=(n_words // 200, 200))
    path.write_text("\n\n".join(" ".join(WORDS[i] for i in row) for row in drawn))
    return str(path)


def random_model(folder, seed, context):
    """One layer, embeddings of variance 1, weights of variance 1 / width, values and outputs times `context`."""
    from transformers import LlamaForCausalLM

    tokenizer = word_tokenizer(WORDS, {"bos_token": "<s>"}, ("<|user|>", "<|assistant|>"), TEMPLATE)
    size = {"hidden_size": D, "intermediate_size": 2 * D, "num_hidden_layers": 1, "num_attention_heads": 4}
    save_llama(folder, tokenizer, seed, initializer_range=D**-0.5, **size)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        model.model.embed_tokens.weight.normal_(generator=generator)
        for name in ("v_proj", "o_proj"):
            model.model.layers[0].self_attn.get_submodule(name).weight.mul_(context)
    model.save_pretrained(folder)
    return folder


def arrangements(home, seed, context=3.0):
    """The three data of the paper, and the test rows."""
    home.mkdir()
    model = random_model(home / "model", seed, context)
    read = {"source": CausalLM(model, [STREAM], context_length=64, device="cpu"), "seed": seed, "val_share": 0}
    path = write_dialogues(home / "chat.jsonl", 3300, seed)
    dialogues = {"path": path, "test_share": 1 / 11, "split_seed": seed, **read}
    fast = Dialogues(**dialogues)
    test = list(fast.test_dataloader())
    texts = write_texts(home / "texts.txt", 44_000, seed + 100)
    made = {
        "FAST": fast,
        "BT(F)": Dialogues(arrangement="blocks", block_len=64, **dialogues),
        "BT(P)": TextFiles(texts, arrangement="blocks", block_len=64, test_share=0, **read),
    }
    pools = {n: torch.cat([b["acts"][STREAM] for b in data.train_dataloader()]) for n, data in made.items()}
    rows = min(map(len, pools.values()))
    assert rows > 35_000
    joined = {key: torch.cat([batch[key] for batch in test]) for key in ("kind", "position")}
    return {n: pool[:rows] for n, pool in pools.items()}, torch.cat([b["acts"][STREAM] for b in test]), joined


def errors(pool, x, where, seed):
    """Squared error per row of the test: over all, over special tokens, and without position 0."""
    torch.manual_seed(seed)
    core = train(TopK(D, 256, k=6), pool, 1500, 256, seed).eval()
    with torch.no_grad():
        error = (core.decode(core.encode(x)) - x).pow(2).sum(1)
    chosen = {"all": slice(None), "special": where["kind"] > 0, "without position 0": where["position"] > 0}
    return {name: float(error[rows].mean()) for name, rows in chosen.items()}


@pytest.mark.slow
def test_dialogues_read_one_by_one_are_learnt_best(tmp_path):
    # The share .5 of BT(F) that a simpler model gives is not reached by a whole layer of Llama: .54, .58, .58.
    found = {}
    for seed in range(3):
        pools, x, where = arrangements(tmp_path / str(seed), seed)
        found[seed] = {name: errors(pool, x, where, seed) for name, pool in pools.items()}
    print(found)
    for rows in ("all", "special", "without position 0"):
        fast, blocks, texts = (np.array([found[s][n][rows] for s in range(3)]) for n in ("FAST", "BT(F)", "BT(P)"))
        assert (fast < blocks).all()
        assert (blocks < texts).all()
        assert fast.mean() < 0.65 * blocks.mean()
        assert blocks.mean() < 0.5 * texts.mean()


@pytest.mark.slow
def test_without_context_the_arrangement_does_not_matter(tmp_path):
    for seed in range(3):  # the idea switched off: attention writes nothing, so what stands before a token is the same
        pools, x, where = arrangements(tmp_path / str(seed), seed, context=0.0)
        found = {name: errors(pools[name], x, where, seed)["all"] for name in ("FAST", "BT(F)")}
        print(found)
        assert max(found.values()) < 0.01  # with context 80 and more


def test_a_batch_mixes_the_dialogues_of_its_chunk(tmp_path):
    """Two rows of a dialogue meet in a batch with probability batch_size / chunk_rows."""
    source = CausalLM(random_model(tmp_path / "model", 0, 3.0), [STREAM], context_length=64, device="cpu")
    path = write_dialogues(tmp_path / "chat.jsonl", 600, 0)
    data = Dialogues(
        path, source=source, val_share=0, test_share=0, batch_size=50, chunk_rows=2500, columns=["document"],
        examples_per_forward=50,
    )  # fmt: skip
    batches = [batch["document"] for batch in data.train_dataloader()]
    pairs = lambda documents: sum(n * (n - 1) // 2 for n in documents.bincount().tolist())  # noqa: E731
    met = sum(pairs(batch) for batch in batches) / pairs(torch.cat(batches))
    assert met == pytest.approx(50 / 2500, rel=0.2)  # a chunk overshoots by up to one forward pass

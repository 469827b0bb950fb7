import json

import pytest
import torch
from words import dialogue, save_llama, word_tokenizer

from datamodules import Dialogues
from mmsae.errors import MmsaeError
from mmsae.sources import CausalLM

TWO = [{"messages": dialogue("the cat", "sat")}, {"messages": dialogue("a dog and a mat")}]
HUMAN = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat on a mat"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("model"), word_tokenizer())
    return CausalLM(folder, ["model.layers.*"], context_length=32, device="cpu")


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8")
    return str(path)


def data(path, source, **arguments):
    return Dialogues(str(path), source=source, **{"val_share": 0, "test_share": 0, **arguments})


def test_both_ways_to_write_a_dialogue(tmp_path, source):
    messages = dialogue("the cat", "sat on a mat")
    write(tmp_path / "a.jsonl", {"messages": messages}, {"conversations": HUMAN, "id": 7})
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "\xc3\xbc"}]}\r\n\r\n')
    (tmp_path / "c.txt").write_text("left out")
    items = data(tmp_path, source).items("train")
    assert [items[i]["messages"] for i in range(3)] == [messages, messages, [{"role": "user", "content": "ü"}]]
    assert [items[i]["document"] for i in range(3)] == [0, 1, 2]


def test_a_dialogue_is_read_by_itself(tmp_path, source):
    path = write(tmp_path / "a.jsonl", *TWO)
    rows = next(iter(data(path, source).rows("train")))
    names = Dialogues.roles
    assert [names[r] for r in rows["role"].tolist()] == [
        *["template"] * 2, *["user"] * 2, *["template"] * 2, "assistant", "template",
        *["template"] * 2, *["user"] * 5, "template",
    ]  # fmt: skip
    assert rows["document"].tolist() == [0] * 8 + [1] * 8
    assert rows["position"].tolist() == [*range(8), *range(8)]
    assert (rows["kind"] > 0).sum() == 1 + 4 + 1 + 2
    alone = source.read(source.collate([{"messages": dialogue("a dog and a mat"), "sample_id": 0}]))
    for stream, acts in alone["acts"].items():  # what came before is not seen
        torch.testing.assert_close(acts, rows["acts"][stream][8:], atol=1e-5, rtol=1e-4)


def test_blocks_let_dialogues_see_each_other(tmp_path, source):
    path = write(tmp_path / "a.jsonl", *TWO)
    blocks = data(path, source, arrangement="blocks", block_len=10)
    rows, alone = next(iter(blocks.rows("train"))), next(iter(data(path, source).rows("train")))
    assert torch.equal(rows["role"], alone["role"])  # the same tokens with the same columns
    assert torch.equal(rows["token_id"], alone["token_id"])
    assert torch.equal(rows["document"], alone["document"])
    assert rows["position"].tolist() == [*range(10), *range(6)]
    stream = "model.layers.1"
    torch.testing.assert_close(rows["acts"][stream][:8], alone["acts"][stream][:8], atol=1e-5, rtol=1e-4)
    assert (rows["acts"][stream][8:] - alone["acts"][stream][8:]).norm(dim=1).min() > 1e-3  # rounding: 1e-8


def test_splits_are_cut_by_dialogue(tmp_path, source):
    path = write(tmp_path / "a.jsonl", *({"messages": dialogue(f"the cat {i}", "sat")} for i in range(20)))
    for arrangement in ("sequential", "blocks"):
        found = data(path, source, arrangement=arrangement, val_share=0.2, test_share=0.1)
        homes = [set(torch.cat([b["document"] for b in found.rows(s)]).tolist()) for s in ("train", "val", "test")]
        assert [len(home) for home in homes] == [14, 4, 2]
        assert len(set.union(*homes)) == 20


def test_dialogues_can_be_shown_with_and_without_a_model(tmp_path, source):
    path = write(tmp_path / "a.jsonl", {"messages": dialogue("the cat", "sat")})
    shown = data(path, source)
    tokens = shown.render(shown.items("train")[0])["tokens"]
    assert " ".join(t.strip() for t in tokens) == "<s> <|user|> the cat <|end|> <|assistant|> sat <|end|>"
    bare = Dialogues(path, store=str(tmp_path), val_share=0, test_share=0)
    assert "".join(bare.render(bare.items("train")[0])["tokens"]) == "user: the cat assistant: sat "


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"a\.jsonl, line 2: this is no JSON"),
        ("[1]", r"a\.jsonl, line 2: there is no list of messages under 'messages', 'conversations'"),
        ('{"text": "a"}', r"line 2: there is no list of messages"),
        ('{"messages": []}', r"line 2: there is no list of messages"),
        ('{"messages": ["hello"]}', r"line 2, message 1: 'hello' is no message"),
        ('{"messages": [{"content": "a"}]}', r"line 2, message 1: there is no 'role'"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', r"role 'usr' is unknown; nearest: user"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', r"role \['user'\] is unknown"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": " "}]}', "message 2: .*no text"),
        ('{"messages": [{"role": "user", "content": null}]}', r"message 1: there is no text in 'content'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(line, said, tmp_path, source):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n' + line + "\n")
    with pytest.raises(MmsaeError, match=said):
        data(tmp_path, source)  # before any model is loaded


def test_no_files_and_no_dialogues_are_told(tmp_path, source):
    with pytest.raises(MmsaeError, match=r"names no \.jsonl file"):
        data(tmp_path, source)
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(MmsaeError, match="holds no dialogue"):
        data(tmp_path, source)


def test_a_model_without_a_chat_template_is_told(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": dialogue("the cat", "sat")})
    folder = save_llama(tmp_path / "model", word_tokenizer(template=None))
    with pytest.raises(MmsaeError, match="has no chat template; give the source chat_template="):
        next(iter(data(path, CausalLM(folder, ["model.layers.0"], device="cpu")).rows("train")))

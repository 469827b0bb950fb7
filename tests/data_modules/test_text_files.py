import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import vectors_source
from words import save_llama, word_tokenizer

from datamodules import TextFiles
from datamodules.documents import spans
from mmsae.errors import MmsaeError
from mmsae.sources import CausalLM


def files(path, **arguments):
    return TextFiles(str(path), source=vectors_source(), **{"val_share": 0, "test_share": 0, **arguments})


def texts(data, split="train"):
    return [data.items(split)[i]["text"] for i in range(len(data.items(split)))]


def test_documents_of_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\n two \n\n\n\n   \n\nthree")
    assert texts(files(tmp_path)) == ["one\nstill one", "two", "three"]
    assert texts(files(tmp_path / "a.txt", separator="")) == ["one\nstill one\n\n two \n\n\n\n   \n\nthree"]
    assert texts(files(tmp_path / "a.txt", separator="still")) == ["one", "one\n\n two \n\n\n\n   \n\nthree"]


def test_columns_of_json_and_json_lines(tmp_path):
    # a line separator may stand inside a string of JSON; only a newline ends a record
    rows = [{"body": "one\u2028still one"}, {"body": "zwei – ü"}, {"body": "  "}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", "utf-8")
    (tmp_path / "b.json").write_text(json.dumps([{"body": "three"}]))
    (tmp_path / "c.csv").write_text("left,out")
    assert texts(files(tmp_path, text_key="body")) == ["one\u2028still one", "zwei – ü", "three"]
    assert texts(files(tmp_path / "*.json", text_key="body")) == ["three"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("one", "utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}', "utf-8-sig")
    assert texts(files(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text \(.* at byte 3\)"),
        ("a.txt", b" \n\n ", r"data\.path=.* holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{', r"a\.jsonl is no JSON with a column 'text'"),
        ("a.jsonl", b'{"body": "a"}', r"a\.jsonl is no JSON with a column 'text' .* set text_key"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl is no JSON with a column 'text' .*None"),
        ("a.json", b'{"text": "a"}', r"a\.json is no JSON with a column 'text'"),
        ("a.json", b'[{"text": 3}]', r"a\.json is no JSON with a column 'text' .*3"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MmsaeError, match=said):
        texts(files(tmp_path))


def test_a_path_without_texts_is_told_before_any_model_is_loaded(tmp_path):
    with pytest.raises(MmsaeError, match=r"names no \.txt, \.jsonl, \.json or \.parquet file"):
        files(tmp_path / "nothing*")


def test_splits_never_cut_through_a_document(tmp_path):
    documents = [" ".join(f"d{i}w{j}" for j in range(60)) for i in range(30)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    data = files(tmp_path, max_characters=50, val_share=0.2, test_share=0.2)
    homes = {s: {w.split("w")[0] for t in texts(data, s) for w in t.split()} for s in ("train", "val", "test")}
    assert [len(h) for h in homes.values()] == [18, 6, 6]
    assert len(set.union(*homes.values())) == 30
    assert max(len(t) for s in homes for t in texts(data, s)) <= 50


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab-\t\n ü\u2003"), max_size=80), size=st.integers(1, 20))
def test_pieces_of_a_long_document_are_the_document(text, size):
    found = list(spans(text, size))
    assert all(0 < end - start <= size and text[start:end].strip() for start, end in found)
    outside = [0, *(edge for span in found for edge in span), len(text)]
    assert not any(text[a:b].strip() for a, b in zip(outside[::2], outside[1::2], strict=True))
    bare = lambda t: "".join(t.split())  # noqa: E731
    assert bare("".join(text[a:b] for a, b in found)) == bare(text)


def test_pieces_break_at_white_space(tmp_path):
    (tmp_path / "a.txt").write_text("well-known words\tstay whole")
    assert texts(files(tmp_path, max_characters=12)) == ["well-known ", "words\tstay ", "whole"]


def test_documents_are_numbered_over_all_splits(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"one{i} two{i}" for i in range(10)))
    data = files(tmp_path, max_characters=5, val_share=0.2, test_share=0.2)
    for split in ("train", "val", "test"):
        for item in (data.items(split)[i] for i in range(len(data.items(split)))):
            assert item["text"].strip() in (f"one{item['document']}", f"two{item['document']}")


def test_parquet_is_mapped_into_memory(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (home := tmp_path / "texts").mkdir()
    for name, rows in (("a", ["one", None, "  "]), ("b", ["two two", "three"])):
        datasets.Dataset.from_dict({"body": rows, "n": [1] * len(rows)}).to_parquet(home / f"{name}.parquet")
    (home / "c.txt").write_text("zero")
    data = files(home, text_key="body", max_characters=5)
    assert texts(data) == ["zero", "one", "two ", "two", "three"]
    assert [data.items("train")[i]["document"] for i in range(5)] == [0, 1, 4, 4, 5]
    assert data._table.cache_files  # on disk: rows are read when they are asked for
    for key, said in (("text", r"a\.parquet has no text column 'text': set text_key to one of body, n"), ("n", "'n'")):
        with pytest.raises(MmsaeError, match=said):
            texts(files(home, text_key=key))
    (home / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(MmsaeError, match=r"d\.parquet cannot be read as Parquet"):
        texts(files(home, text_key="body"))


def test_without_its_library_parquet_names_the_extra(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MmsaeError, match=r"reading \.parquet files needs datasets: pip install 'mmsae\[text\]'"):
        texts(files(tmp_path))


def blocks(home, tokenizer, **arguments):
    source = CausalLM(save_llama(home / "model", tokenizer), ["model.layers.0"], context_length=8, device="cpu")
    given = {"val_share": 0, "test_share": 0, "arrangement": "blocks", **arguments}
    return TextFiles(str(home / "a.txt"), source=source, **given)


def test_blocks_join_documents_and_cut_anywhere(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat\n\na dog\n\non a mat and on a mat")
    tokenizer = word_tokenizer()
    data = blocks(tmp_path, tokenizer, block_len=4)
    items = [data.items("train")[i] for i in range(len(data.items("train")))]
    assert [tokenizer.convert_ids_to_tokens(item["input_ids"]) for item in items] == [
        ["<s>", "the", "cat", "sat"], ["<s>", "a", "dog", "<s>"], ["on", "a", "mat", "and"], ["on", "a", "mat"],
    ]  # fmt: skip
    rows = next(iter(data.rows("train")))
    assert rows["document"].tolist() == [0] * 4 + [1] * 3 + [2] * 8
    assert rows["kind"].tolist() == [1, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]  # a start in the middle is no prefix
    assert data.identity("train")["block_len"] == 4
    whole = blocks(tmp_path, tokenizer)
    assert [len(whole.items("train")[i]["input_ids"]) for i in range(2)] == [8, 7]


def test_documents_without_a_start_token_are_told_apart_by_their_end(tmp_path):
    (tmp_path / "a.txt").write_text("the cat\n\na dog")
    tokenizer = word_tokenizer(special={"eos_token": "<end>", "unk_token": "<unk>"})
    data = blocks(tmp_path, tokenizer)
    names = tokenizer.convert_ids_to_tokens(data.items("train")[0]["input_ids"])
    assert names == ["the", "cat", "<end>", "a", "dog", "<end>"]


def test_blocks_are_refused_without_a_tokenizer_or_beyond_the_context(tmp_path):
    (tmp_path / "a.txt").write_text("the cat")
    with pytest.raises(MmsaeError, match="block_len=9 is out of range: it must be between 1 and 8"):
        blocks(tmp_path, word_tokenizer(), block_len=9).items("train")
    with pytest.raises(MmsaeError, match="arrangement=blocks cuts tokens: give a source with a tokenizer"):
        files(tmp_path / "a.txt", arrangement="blocks").items("train")
    with pytest.raises(MmsaeError, match="arrangement='packed' is unknown; choose sequential or blocks"):
        files(tmp_path / "a.txt", arrangement="packed")

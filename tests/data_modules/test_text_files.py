import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import vectors_source

from datamodules import TextFiles
from mmsae.errors import MmsaeError


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
    with pytest.raises(MmsaeError, match=r"names no \.txt, \.jsonl or \.json file"):
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
@given(text=st.text(st.sampled_from("ab-\t\n ü"), min_size=1, max_size=80).filter(str.strip), size=st.integers(1, 20))
def test_pieces_of_a_long_document_are_the_document(text, size, tmp_path_factory):
    home = tmp_path_factory.mktemp("t")
    (home / "a.txt").write_text("x")
    pieces = files(home, max_characters=size)._pieces(text.strip())
    assert all(0 < len(p) <= size for p in pieces)
    assert all(p.strip() for p in pieces)
    bare = lambda t: "".join(t.split())  # noqa: E731
    assert bare("".join(pieces)) == bare(text)


def test_pieces_break_at_white_space(tmp_path):
    (tmp_path / "a.txt").write_text("well-known words\tstay whole")
    assert texts(files(tmp_path, max_characters=12)) == ["well-known ", "words\tstay ", "whole"]

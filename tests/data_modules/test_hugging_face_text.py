import pytest
from tiny import vectors_source

from datamodules import HuggingFaceText
from mmsae.errors import MmsaeError

datasets = pytest.importorskip("datasets")
ROWS = ["one", "two two", None, "three", "four"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def data(path, **arguments):
    return HuggingFaceText(str(path), source=vectors_source(), **{"val_share": 0, "test_share": 0, **arguments})


def texts(found, split="train"):
    return [found.items(split)[i]["text"] for i in range(len(found.items(split)))]


def test_folders_of_save_to_disk(tmp_path):
    table = datasets.Dataset.from_dict({"text": ROWS, "n": range(5)})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    assert texts(data(tmp_path / "one")) == ["one", "two two", "three", "four"]
    assert texts(data(tmp_path / "splits", split="test")) == ["one"]
    found = data(tmp_path / "one", max_characters=4)
    assert texts(found) == ["one", "two ", "two", "thre", "e", "four"]
    assert [found.items("train")[i]["document"] for i in range(6)] == [0, 1, 1, 3, 3, 4]
    assert found._table.cache_files  # mapped into memory, not read into it
    with pytest.raises(MmsaeError, match="has no split 'dev'; it has train, test"):
        texts(data(tmp_path / "splits", split="dev"))


def test_files_of_a_format_and_folders_of_files(tmp_path):
    table = datasets.Dataset.from_dict({"body": [f"text {i}" for i in range(20)]})
    table.to_json(tmp_path / "rows.jsonl")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "rows.parquet")
    for found in (
        data("json", data_files=str(tmp_path / "rows.jsonl"), text_key="body", val_share=0.2, test_share=0.1),
        data(tmp_path / "folder", text_key="body", val_share=0.2, test_share=0.1),
    ):
        homes = [set(texts(found, split)) for split in ("train", "val", "test")]
        assert [len(home) for home in homes] == [14, 4, 2]
        assert len(set.union(*homes)) == 20
    few = data("json", data_files=str(tmp_path / "rows.jsonl"), text_key="body", split="train[:10%]")
    assert texts(few) == ["text 0", "text 1"]


def test_what_cannot_be_loaded_is_named(tmp_path):
    datasets.Dataset.from_dict({"body": ["a"], "n": [1]}).save_to_disk(tmp_path / "one")
    with pytest.raises(MmsaeError, match="has no column 'text'; nearest: body, n"):
        texts(data(tmp_path / "one"))
    with pytest.raises(MmsaeError, match=r"row 0 of .* holds int in 'n', no text"):
        texts(data(tmp_path / "one", text_key="n"))
    with pytest.raises(MmsaeError, match=r"'no/such-data' .* cannot be loaded .* without a connection give the path"):
        texts(data("no/such-data"))


def test_without_its_library_the_extra_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MmsaeError, match=r"HuggingFaceText needs datasets: pip install 'mmsae\[text\]'"):
        texts(data(tmp_path))

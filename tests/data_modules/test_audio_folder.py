import json

import numpy as np
import pytest
import soundfile
from towers import save_clap, tone

from datamodules import AudioFolder
from datamodules.base import SPLITS
from mmsae.errors import MmsaeError
from mmsae.sources import CLAP


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return CLAP(str(save_clap(tmp_path_factory.mktemp("clap"))), ["audio_model.audio_encoder.norm"], device="cpu")


def write(path, seconds=1.0, rate=16_000, hertz=440.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(hertz, seconds, rate), rate)


def digits(folder, n=20):
    """Names as in the Free Spoken Digit Dataset, and a table."""
    rows = ["file,text,speaker,digit"]
    for i in range(n):
        name = f"{i % 5}_{'abcde'[i // 4]}_{i}.wav"
        write(folder / name, 0.5, 8_000, 200 + 50 * i)
        rows.append(f"{name},number {i % 5},{'abcde'[i // 4]},{i % 5}")
    (folder / "captions.csv").write_text("\n".join(rows))
    return str(folder)


def every(data, split):
    items = data.items(split)
    return [items[i] for i in range(len(items))]


def test_long_sounds_come_in_parts_that_stay_together(tmp_path, source):
    for i in range(10):
        write(tmp_path / f"{i}.wav", 2.1 + (i == 3) * 0.5)
    data = AudioFolder(str(tmp_path), window_s=1.0, source=source, examples_per_forward=4)
    parts = {split: every(data, split) for split in SPLITS}
    files = {split: {item["audio"] for item in found} for split, found in parts.items()}
    assert sum(map(len, files.values())) == len(set().union(*files.values())) == 10
    assert sum(map(len, parts.values())) == 21  # a rest of .1 s is left out, one of .6 s is not
    row = next(iter(data.rows("val")))
    assert set(row["crop_start_s"].tolist()) == {0.0, 1.0} | ({2.0} if len(parts["val"]) == 3 else set())
    samples = source.render(parts["val"][1])["samples"]
    whole, _ = soundfile.read(parts["val"][1]["audio"], dtype="float32")
    assert np.abs(samples - whole[16_000:32_000]).max() < 1e-6


def test_speakers_are_never_on_both_sides(tmp_path, source):
    data = AudioFolder(
        digits(tmp_path), str(tmp_path / "captions.csv"), group="speaker", labels=["digit", "speaker"],
        val_share=0.2, test_share=0.2, source=source,
    )  # fmt: skip
    speakers = {split: {item["labels"]["speaker"] for item in every(data, split)} for split in SPLITS}
    assert [len(speakers[split]) for split in SPLITS] == [3, 1, 1]
    assert len(set().union(*speakers.values())) == 5
    assert data.factors["digit"] == ("0", "1", "2", "3", "4")
    item = every(data, "test")[0]
    assert item["text"] == f"number {item['labels']['digit']}"
    batch = next(iter(data.rows("test")))
    assert set(batch["label.speaker"].tolist()) == speakers["test"]
    assert float(batch["start_s"].max()) < 0.5  # they are half a second long


def test_folders_are_classes_and_texts_beside_are_captions(tmp_path, source):
    for i in range(12):
        write(tmp_path / ("bell" if i % 2 else "horn") / f"{i}.flac")
    (tmp_path / "bell" / "1.txt").write_text("one bell\n")
    data = AudioFolder(str(tmp_path), source=source)
    assert data.factors == {"class": ("bell", "horn")}
    found = [item for split in SPLITS for item in every(data, split)]
    assert {item["audio"][-7:]: item["text"] for item in found}["/1.flac"] == "one bell"
    assert all(("bell", "horn")[item["labels"]["class"]] in item["audio"] for item in found)


def test_own_splits_are_kept(tmp_path, source):
    for split in SPLITS:
        for i in range(2):
            write(tmp_path / split / f"{split}{i}.wav", 0.3)
    data = AudioFolder(str(tmp_path), source=source)
    assert all(split in item["audio"].split("/")[-1] for split in SPLITS for item in every(data, split))


def test_damaged_sounds_are_named(tmp_path, source):
    good = tmp_path / "good.wav"
    write(good)
    content = good.read_bytes()
    cases = {
        "short.wav": (content[: len(content) // 2], r"'.*short.wav' is cut off: it has 16022 of 32044 bytes"),
        "none.wav": (b"", "none.wav' cannot be read"),
        "text.wav": (b"no sound at all", "text.wav' cannot be read"),
    }
    for name, (bad, said) in cases.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(MmsaeError, match=said):
            source.collate([{"audio": str(tmp_path / name), "sample_id": 0}])
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(MmsaeError, match=r"empty.wav' is empty"):
        source.collate([{"audio": str(tmp_path / "empty.wav"), "sample_id": 0}])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file,text\nnone.wav,a\n", r"captions.csv names 'none.wav' in line 2, but there is no"),
        ("name,text\n0.wav,a\n", "line 2 of captions.csv names no file: give a column file or image"),
        ("file,text\n", "has no rows"),
        ("file,text\n0.wav,a\n", "captions.csv has no 'speaker' in line 2"),
    ],
)
def test_wrong_tables_are_told_before_any_model_is_loaded(tmp_path, source, table, said):
    labels = ["speaker"] if "speaker" in said else []
    write(tmp_path / "0.wav")
    (tmp_path / "captions.csv").write_text(table)
    with pytest.raises(MmsaeError, match=said):
        AudioFolder(str(tmp_path), str(tmp_path / "captions.csv"), labels=labels, source=source)


def test_wrong_folders_are_told(tmp_path, source):
    with pytest.raises(MmsaeError, match=r"data\.root=.*none is no folder"):
        AudioFolder(str(tmp_path / "none"), source=source)
    with pytest.raises(MmsaeError, match="holds no sounds"):
        AudioFolder(str(tmp_path), source=source)
    with pytest.raises(MmsaeError, match="columns of a table: give captions"):
        AudioFolder(str(tmp_path), group="speaker", source=source)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(MmsaeError, match=r"a line of '.*bad.jsonl' is no JSON"):
        AudioFolder(str(tmp_path), str(tmp_path / "bad.jsonl"), source=source)


def test_few_groups_are_named(tmp_path, source):
    write(tmp_path / "0.wav")
    rows = [json.dumps({"audio": "0.wav", "caption": "a", "speaker": name}) for name in "ab"]
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    data = AudioFolder(str(tmp_path), str(tmp_path / "c.jsonl"), group="speaker", source=source)
    with pytest.raises(MmsaeError, match=r"only 2 groups \(a, b\)"):
        data.items("train")

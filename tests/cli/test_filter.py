"""`mmsae filter` in process, on a tiny LLaVA of random weights."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsae.cli import scoring
from mmsae.cli.main import main
from mmsae.errors import MmsaeError

pytest.importorskip("transformers")
N = 24
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, pictures, conversations, and a dictionary trained on them."""
    from tiny_lmm import save_lmm

    folder = tmp_path_factory.mktemp("home")
    save_lmm(folder / "model", "llava")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(N):
        colour = ("red", "blue")[i % 2]
        pixels = np.array(COLOURS[colour]) + rng.integers(-30, 30, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "pictures" / f"{i}.png")
        said = [
            {"from": "human", "value": "<image>\nwhat colour is the cat ?"},
            {"from": "gpt", "value": f"a {colour}"},
        ]
        # unusual spacing and keys of others must come out as they went in
        lines.append(json.dumps({"id": i, "image": f"{i}.png", "conversations": said}, indent=None if i % 3 else 0))
    text = "\n".join(line.replace("\n", " ") for line in lines)
    (folder / "talks.jsonl").write_bytes(text.encode())  # the last line has no end
    main(["fit", "--data=Conversations", f"--data.path={folder / 'talks.jsonl'}",
          f"--data.images={folder / 'pictures'}",
          "--data.source=VisionLanguage", f"--data.source.model={folder / 'model'}",
          '--data.source.hook_points=["model.language_model.layers.0"]', "--data.columns=[token_type]",
          "--data.batch_size=64", "--data.examples_per_forward=5", "--data.val_share=0.1", "--data.test_share=0.3",
          "--model.core=SAEV", "--model.core.d_latent=48", "--model.core.target_l0=6", "--model.normalise=center_scale",
          "--trainer.max_steps=30", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--threads=1",
          '--trainer.logger={"class_path": "CSVLogger", "init_args": {"save_dir": "' + str(folder)
          + '", "name": "", "version": "run"}}'])  # fmt: skip
    return folder


@pytest.fixture
def words(home):
    """The words of the command."""

    def make(*more, path=None):
        path = path or home / "talks.jsonl"
        return ["filter", f"--run={home / 'run'}", f"--path={path}", f"--images={home / 'pictures'}", "--n=4", *more]

    return make


def read(path="kept.scores.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_best_half_is_kept_byte_by_byte_and_in_order(home, words, capsys):
    main(words("--keep=0.5"))
    said = capsys.readouterr().out
    assert "kept:   kept.jsonl (12 of 24 conversations, the best by cosine_co)" in said
    lines = (home / "talks.jsonl").read_bytes().splitlines(keepends=True)
    table = read()
    assert [row["line"] for row in table] == [str(i + 1) for i in range(N)]
    kept = [i for i, row in enumerate(table) if row["kept"] == "1"]
    assert len(kept) == N // 2
    assert Path("kept.jsonl").read_bytes() == b"".join(lines[i] for i in kept)
    scores = np.array([float(row["cosine_co"]) for row in table])
    assert scores[kept].min() >= np.delete(scores, kept).max()
    assert {row["image_tokens"] for row in table} == {"16"}
    assert set(table[0]) == {"file", "line", "kept", *scoring.COLUMNS}


@pytest.mark.parametrize("score", ["co_l0", "l0", "l1", "co_occurrence", "cosine", "association", "random"])
@pytest.mark.parametrize("normalise", ["none", "tokens"])
def test_every_score_ranks(score, normalise, words, monkeypatch):
    main(words("--keep=0.25"))
    monkeypatch.setattr(scoring.Scores, "_scored", None)  # another score does not run the model again
    main(words("--keep=0.25", f"--score={score}", f"--normalise={normalise}", "--out=other.jsonl"))
    table = read("other.scores.csv")
    assert sum(row["kept"] == "1" for row in table) == 6
    if normalise == "none":
        scores = np.array([float(row[score]) for row in table])
        kept = np.array([row["kept"] == "1" for row in table])
        assert scores[kept].min() >= scores[~kept].max()


def test_an_interrupted_pass_goes_on_and_gives_the_same(home, words, monkeypatch):
    for old in (home / "run" / "scores").glob("*"):
        old.unlink()
    main(words("--out=whole.jsonl", "--examples_per_forward=4"))
    (file,) = (home / "run" / "scores").glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:7]) + lines[7][:9])  # torn in the middle of a line
    inner, seen = scoring.Scores._scored, []

    def counted(self, core, weights, latents, chosen):
        seen.extend(chosen)
        return inner(self, core, weights, latents, chosen)

    monkeypatch.setattr(scoring.Scores, "_scored", counted)
    main(words("--out=again.jsonl", "--examples_per_forward=4"))
    assert seen == list(range(7, N))
    one, other = read("whole.scores.csv"), read("again.scores.csv")
    for name in scoring.COLUMNS:  # other batches, so other rounding
        values = [[float(row[name]) for row in table] for table in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-3), name


def test_weights_are_found_once_and_stored_with_the_run(home, words, monkeypatch):
    main(words())
    before = (home / "run" / "cross_modal.safetensors").read_bytes()
    monkeypatch.setattr(scoring, "strongest_tokens", None)
    main(words("--keep=0.75"))
    assert (home / "run" / "cross_modal.safetensors").read_bytes() == before
    monkeypatch.undo()


def talks(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


WITH = {
    "image": "0.png",
    "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "cat"}],
}
WITHOUT = {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "cat"}]}


def test_conversations_without_a_picture(words, refused, tmp_path):
    path = talks(tmp_path / "mixed.jsonl", WITH, WITHOUT, WITH)
    assert "mixed.jsonl, line 2: this conversation has no picture" in refused(*words(path=path))
    main(words("--without_picture=keep", "--keep=0.5", path=path))
    assert [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()] == [WITH, WITHOUT]
    assert read()[1]["cosine_co"] == ""
    main(words("--without_picture=drop", "--keep=1", path=path))
    assert [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()] == [WITH, WITH]
    alone = talks(tmp_path / "alone.jsonl", WITHOUT)
    assert "no conversation of" in refused(*words("--without_picture=drop", path=alone))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--keep=0"], "keep=0 is out of range"),
        (["--keep=1.5"], "keep=1.5 is out of range"),
        (["--score=clip"], "--score=clip is none of 'cosine_co', 'cosine'"),
        (["--run=nowhere"], "nowhere is no run of mmsae fit"),
        (["--images=nowhere"], "data.images=nowhere is no folder"),
        (["--path=nowhere.jsonl"], "names no .jsonl file"),
        (["--n=3000"], "too few for the 3000 strongest of a latent"),
    ],
)
def test_wrong_words_are_refused_in_one_sentence(more, said, words, refused):
    assert said in refused(*words(*more))
    assert not Path("kept.jsonl").exists()


def test_wrong_files_are_refused_in_one_sentence(words, refused, tmp_path):
    assert "holds no conversation" in refused(*words(path=talks(tmp_path / "empty.jsonl")))
    missing = talks(tmp_path / "missing.jsonl", WITH, {**WITH, "image": "lost.png"})
    assert "missing.jsonl, line 2: there is no picture" in refused(*words(path=missing))
    assert "line 1: this is no JSON" in refused(*words(path=talks(tmp_path / "torn.jsonl", '{"image": ')))


def test_a_run_on_words_alone_cannot_score(words, refused, home, tmp_path):
    run = tmp_path / "words"
    run.mkdir()
    config = (home / "run" / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("tokens: all", "tokens: image"))
    assert "it does not read both kinds of tokens" in refused(*words(f"--run={run}", f"--sae={home / 'run'}"))


def test_what_was_there_survives_a_failure(words, monkeypatch):
    main(words())
    before = Path("kept.jsonl").read_bytes()

    def broken(*_):
        raise MmsaeError("no")

    monkeypatch.setattr(scoring, "association", broken)
    with pytest.raises(SystemExit):
        main(words("--keep=0.1"))
    assert Path("kept.jsonl").read_bytes() == before

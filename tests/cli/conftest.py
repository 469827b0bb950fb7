import warnings
from pathlib import Path

import pytest
import torch
from synthetic import flat

from mmsae.cli.main import main
from mmsae.spec import ACTS
from mmsae.store import Writer

D, WIDE = 32, 48
ROWS = {"train": 4096, "val": 600, "test": 600}


def write_store(folder, width=D, splits=ROWS, stream="x"):
    for i, (split, n) in enumerate(splits.items()):
        writer = Writer(folder / split, {}, "float32", rows_per_shard=1024)
        writer.resume()
        rows = flat(2 * width, width, s=4, seed=0).rows(n, seed=i)
        writer.add({ACTS: {stream: rows}, "sample_id": torch.arange(n)})
        writer.close()
        writer.finish({"class": "Synthetic"}, {"class": "flat", "split": split}, {})
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """32 wide, features known."""
    return write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():  # quiet() adds filters
        yield


TOPK = ["--model.core=TopK", "--model.core.d_latent=64", "--model.core.k=4"]
FAST = ["--threads=1", "--trainer.accelerator=cpu", "--model.lr_warmup_steps=5", "--data.batch_size=128"]


def fit_words(store, *words, core=TOPK, steps=20, fast=FAST):
    return ["fit", "--data=Stored", f"--data.store={store}", *core, *fast, f"--trainer.max_steps={steps}", *words]


@pytest.fixture
def words(store):
    """The words of `mmsae fit` on the store."""
    return lambda *more, **options: fit_words(options.pop("store", store), *more, **options)


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """48 wide."""
    return write_store(tmp_path_factory.mktemp("wide"), WIDE, {"train": 512, "val": 128, "test": 128})


@pytest.fixture
def fit(store):
    """Runs `mmsae fit` on the store; gives the folder of the run."""

    def run(*words, **options):
        before = set(Path("runs").glob("version_*"))
        main(fit_words(store, *words, **options))
        (made,) = set(Path("runs").glob("version_*")) - before
        return made

    return run


@pytest.fixture
def refused(capsys):
    """Runs words that must end in one sentence, and gives it."""

    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        said = capsys.readouterr()
        assert stop.value.code == 2, said
        lines = [line for line in said.err.splitlines() if line.strip() and "it/s" not in line]
        assert len(lines) == 1, said.err
        assert lines[0].startswith(f"mmsae {words[0]}: ")
        assert "Traceback" not in said.err
        assert "usage" not in said.err
        return lines[0]

    return run

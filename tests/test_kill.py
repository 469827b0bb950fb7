"""Power cuts: a command that is killed at any moment and typed again ends with the same bytes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import planted, write_store

pytestmark = pytest.mark.slow

CALLBACKS = """\
trainer:
  callbacks:
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {save_last: true, filename: '{step}', every_n_train_steps: 5}
"""


def drive(what, folder, seed, kills, sleep):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_driver.py")), what, str(folder), str(seed), str(kills)],
        capture_output=True, text=True, timeout=550, check=False, cwd=folder,
        env={**os.environ, "KILL_SLEEP": str(sleep), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = (folder / "log.txt").read_text() if (folder / "log.txt").is_file() else ""
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + log[-4000:]
    return int(re.search(r"kills: (\d+)", done.stdout).group(1)), log


def bytes_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_killed_extraction_ends_with_the_same_bytes(tmp_path):
    hits, _ = drive("extract", tmp_path, seed=0, kills=12, sleep=0.02)
    assert hits >= 12
    calm = bytes_of(tmp_path / "calm")
    for folder in tmp_path.glob("wild*"):
        wild = bytes_of(folder)
        assert set(wild) == set(calm)
        for name, data in calm.items():
            assert wild[name] == data, name
    assert {f"{s}/manifest.json" for s in ("train", "val", "test")} <= set(calm)


def test_a_killed_encoding_ends_with_the_same_bytes(tmp_path):
    write_store(tmp_path / "store", planted(8000), rows_per_shard=8000)
    (tmp_path / "callbacks.yaml").write_text(CALLBACKS)
    hits, _ = drive("encode", tmp_path, seed=2, kills=12, sleep=0)
    assert hits >= 12
    calm = bytes_of(tmp_path / "calm")
    for folder in tmp_path.glob("wild*"):
        assert bytes_of(folder) == calm
    assert {f"{s}/{name}" for s in ("train", "val", "test") for name in ("manifest.json", "top_4.safetensors")} <= set(
        calm
    )


def test_a_killed_training_ends_with_the_same_dictionary(tmp_path):
    write_store(tmp_path / "store", planted(1000))
    (tmp_path / "callbacks.yaml").write_text(CALLBACKS)
    hits, log = drive("fit", tmp_path, seed=1, kills=12, sleep=0)
    assert hits >= 12
    (calm,) = (tmp_path / "calm").glob("version_*/sae/sae.safetensors")
    for folder in tmp_path.glob("wild*"):
        finished = list(folder.glob("version_*/sae/sae.safetensors"))
        assert finished
        assert all(p.read_bytes() == calm.read_bytes() for p in finished), log[-2000:]
    resumed = list(tmp_path.glob("wild*/version_[1-9]*"))
    assert len(resumed) > 2  # and not begun anew each time

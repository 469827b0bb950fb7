"""What a user can do wrong with good words: each ends within seconds in one sentence."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mmsae
from mmsae.cli.main import sentence
from mmsae.cores import TopK
from mmsae.errors import MmsaeError
from mmsae.store import DiskChunks
from mmsae.training.module import SAEModule

SOURCE = (
    "{class_path: OpenCLIP, init_args: {model: ViT-B-32, hook_points: [HOOK], device: cpu, config: "
    "{embed_dim: 16, vision_cfg: {image_size: 32, layers: 1, width: 32, patch_size: 16, head_width: 16}, "
    "text_cfg: {context_length: 8, vocab_size: 49408, width: 16, heads: 2, layers: 1}}}}"
)
BLOCK = "visual.transformer.resblocks.0"
TOPK = ["--model.core=TopK", "--model.core.d_latent=64", "--model.core.k=4"]
FAST = ["--threads=1", "--trainer.accelerator=cpu", "--trainer.max_steps=5"]


def live(data, hook=BLOCK, **options):
    more = [f"--data.{name}={value}" for name, value in options.items()]
    return [f"--data={data}", f"--data.source={SOURCE.replace('HOOK', hook)}", *more]


@pytest.fixture
def copy(store, tmp_path):
    return Path(shutil.copytree(store, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = [t for t in set(threading.enumerate()) - before if t.name.startswith("ThreadPool")]
    for thread in left:
        thread.join(5)
    assert not [t for t in left if t.is_alive()]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model.core.k=65"], "k=65 is larger than d_latent=64"),
        (["--model.core.k=0"], "k=0 is out of range"),
        (["--data.batch_size=99999"], "batch_size=99999 is larger than the data (4096 activation rows)"),
        (["--data.batch_size=0"], "batch_size=0 is out of range"),
        (["--model.lr_decay=7"], "lr_decay=7 is out of range"),
        (["--threads=-1"], "threads=-1 is out of range"),
        (["--data.columns=[label.foo]"], "label.foo"),
        (["--trainer.accelerator=cup"], "--trainer: "),
        (["--trainer.accelerator=gpu", "--trainer.devices=99"], "--trainer: "),
        (["--data.store=nix"], "no activation store at nix/train"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings_that_do_not_fit(refused, words, more, said):
    assert said in refused(*words(*more))


def test_a_diverging_run_says_so(refused, words):
    said = refused(*words("--model.optimizer=SGD", "--model.optimizer.lr=1e38", "--model.gradient_clip=0"))
    assert "is not finite" in said


def test_a_corrupt_shard_is_named_before_training(refused, words, copy):
    shard = next((copy / "train").glob("000-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert str(shard) in refused(*words(store=copy))


def test_a_shard_that_vanishes_while_training_stops_the_reader(refused, words, copy, monkeypatch):
    read, calls = DiskChunks.read, []

    def broken(self, *place):
        calls.append(place)
        if len(calls) > 3:
            raise MmsaeError("shard 3 ended while it was read")
        return read(self, *place)

    monkeypatch.setattr(DiskChunks, "read", broken)
    assert "ended while it was read" in refused(*words("--data.chunk_rows=512", store=copy, steps=200))


def test_rows_that_are_not_finite(refused, words, copy):
    for shard in (copy / "train").glob("000-*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-400:] = b"\xff" * 400
        shard.write_bytes(data)
    assert "checksum" in refused(*words(store=copy))
    assert "not finite" in refused(*words("--data.verify=size", store=copy, steps=100))


def test_a_bad_number_in_the_middle_of_training(refused, words, monkeypatch):
    step = SAEModule.training_step

    def poisoned(self, batch, index):
        if index == 3:
            batch["acts"]["x"][0] = float("nan")
        return step(self, batch, index)

    monkeypatch.setattr(SAEModule, "training_step", poisoned)
    assert "activations at x are not finite" in refused(*words(steps=20))


def test_no_permission_and_no_folder(refused, words, store):
    Path("runs").write_text("a file")
    said = refused(*words())
    assert "runs" in said
    Path("acts").write_text("a file")
    few = live("Scenes", n_train=4, n_val=4, n_test=4)
    assert "acts" in refused("extract", *few, "--model.out=acts/x", "--threads=1", "--trainer.accelerator=cpu")


def test_a_full_disk_is_a_sentence():
    error = OSError(28, "No space left on device", "runs/x.ckpt")
    assert sentence(error) == "runs/x.ckpt: No space left on device."
    wrapped = RuntimeError("PytorchStreamWriter failed writing file data/12")
    wrapped.__cause__ = error
    assert "No space left on device" in sentence(wrapped)
    assert sentence(KeyError("a bug")) is None


def test_a_hook_point_that_does_not_exist(refused):
    said = refused("fit", *TOPK, *FAST, *live("Scenes", hook="visual.transformer.resblocks.9", n_train=8))
    assert "visual.transformer.resblocks.9" in said
    assert BLOCK in said


def test_no_pictures_and_broken_pictures(refused, tmp_path):
    folder = tmp_path / "pictures"
    words = ["fit", *TOPK, *FAST, *live("ImageFolder", root=folder), "--data.batch_size=4"]
    assert "is no folder" in refused(*words)
    folder.mkdir()
    assert "holds no pictures" in refused(*words)
    for i in range(10):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    assert "bad.png" in refused(*words)


def test_a_dictionary_of_another_width(fit, refused, wide):
    run = fit(steps=5)
    mmsae.save(TopK({"x": 48}, 64, 4), "other")
    said = refused("evaluate", f"--run={run}", "--sae=other")
    assert "d_in=48" in said
    assert "x (32)" in said
    assert "x (48)" in refused("evaluate", f"--run={run}", f"--store={wide}")
    words = [f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt", f"--data.store={wide}"]
    assert "32" in refused("test", *words)


def test_a_damaged_artifact(fit, refused):
    run = fit(steps=5)
    save_file({"W_enc": torch.zeros(2)}, run / "sae" / "sae.safetensors")
    assert "damaged" in refused("evaluate", f"--run={run}")
    (run / "sae" / "config.json").write_text(json.dumps({"format": 99}))
    assert "update mmsae" in refused("evaluate", f"--run={run}")


def test_a_config_edited_by_hand(fit, refused):
    run = fit(steps=5)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("datamodules.Stored", "datamodules.Storde"))
    assert "Storde" in refused("evaluate", f"--run={run}")
    (run / "config.yaml").write_text("a: [")
    assert "config.yaml" in refused("evaluate", f"--run={run}")

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import mmsae
from mmsae.cli.main import main
from mmsae.cores import SAECore
from mmsae.subclasses import subclasses


def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_one_folder_holds_everything_and_the_terminal_is_quiet(fit, capsys, recwarn):
    run = fit(steps=60)
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"dictionary: {run}/sae", f"next:       mmsae evaluate --run {run}"]
    assert [line for line in said.err.splitlines() if line and "training" not in line] == []
    assert [str(w.message) for w in recwarn if w.category is not DeprecationWarning] == []
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.csv", "sae", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert any(row["fvu"] for row in csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    core = mmsae.load(run)
    assert core.k == 4
    assert mmsae.artifact.describe(run)["metrics"]["val/fvu"] < 1


def test_the_saved_config_runs_again(fit):
    first = fit()
    main(["fit", f"--config={first}/config.yaml"])
    assert same(mmsae.load("runs/version_1").state_dict(), mmsae.load(first).state_dict())


def test_validate_test_and_predict(fit, capsys):
    run = fit()
    words = [f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt"]
    main(["validate", *words])
    main(["test", *words])
    assert "test/fvu" in capsys.readouterr().out
    main(["predict", *words])
    path = capsys.readouterr().out.strip().removeprefix("codes: ")
    codes = load_file(path)
    assert codes["values"].shape == codes["indices"].shape == (600, 4)
    assert codes["sample_id"].tolist() == list(range(600))


def test_resume_ends_where_one_run_ends(fit, words):
    whole = fit("--model.schedule_steps=60", steps=60)
    half = fit("--model.schedule_steps=60", steps=30)
    main(["fit", "--resume", str(half), "--trainer.max_steps=60"])
    one, two = state(whole), state(Path("runs/version_2"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step"):
        assert same(one[key], two[key]), key
    assert same(mmsae.load(whole).state_dict(), mmsae.load("runs/version_2").state_dict())


def test_a_killed_run_is_resumed(fit, words):
    often = "{class_path: ModelCheckpoint, init_args: {save_last: true, every_n_train_steps: 10}}"
    endless = words(f"--trainer.callbacks=[{often}]", steps=1_000_000)
    run = Path("runs/version_0")
    process = subprocess.Popen([sys.executable, "-m", "mmsae", *endless], stderr=subprocess.DEVNULL)
    last, stop = run / "checkpoints" / "last.ckpt", time.time() + 60
    while not last.is_file() and process.poll() is None and time.time() < stop:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = state(run)["global_step"]
    main(["fit", f"--resume={run}", f"--trainer.max_steps={reached + 5}"])
    assert state(Path("runs/version_1"))["global_step"] == reached + 5


def test_ctrl_c_says_how_to_go_on(words):
    endless = [sys.executable, "-m", "mmsae", *words(steps=1_000_000)]
    process = subprocess.Popen(endless, stderr=subprocess.PIPE, text=True)
    stop = time.time() + 60
    begun = Path("runs/version_0/metrics.csv")
    while not begun.is_file() and process.poll() is None and time.time() < stop:
        time.sleep(0.05)
    time.sleep(0.3)
    for _ in range(4):  # Python drops an interrupt that falls into the callback of a weak reference; a user tries again
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=20)
            break
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 130
    assert "--resume RUN" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_resumed_run_refuses_another_dictionary(fit, refused):
    run = fit(steps=5)
    assert "k=4, not 5" in refused("fit", "--resume", str(run), "--model.core.k=5")
    assert "holds a TopK, not a BatchTopK" in refused("fit", "--resume", str(run), "--model.core=BatchTopK")
    torch.save({"x": os.system}, "evil.ckpt")
    assert "damaged, or holds more" in refused("fit", f"--config={run}/config.yaml", "--ckpt_path=evil.ckpt")


def test_also_equals_each_alone(fit):
    other = ["--model.core=ReLU", "--model.core.d_latent=48"]
    seed = "--seed_everything=3"
    alone = fit(seed), fit(seed, core=other)
    both = fit(seed, "--model.also={second: {class_path: ReLU, init_args: {d_latent: 48}}}")
    one, two = mmsae.load(alone[0]), mmsae.load(both / "sae")
    assert_close(one.state_dict(), two.state_dict())
    again = mmsae.load(both / "sae-second")
    assert (type(again).__name__, again.d_latent) == ("ReLU", 48)
    assert again.rows_seen == mmsae.load(alone[1]).rows_seen


@pytest.mark.parametrize("name", sorted(n for n, c in subclasses(SAECore).items() if c.__module__.startswith("mmsae.")))
def test_every_core_trains(fit, name, capsys):
    width = 128 if name in ("MultiTopK", "PolySAE", "SAEV") else 32  # room for the default k
    core = [f"--model.core={name}", f"--model.core.d_latent={width}"]
    if name == "PolySAE":
        core += ["--model.core.rank2=8", "--model.core.rank3=8"]  # at most the width
    asks = {
        "SkipTranscoder": "SkipTranscoder needs a stream 'target'",  # the store has no second stream
        "JumpReLUSkipTranscoder": "JumpReLUSkipTranscoder needs a stream 'target'",
        **{
            core: f"{core} reads two or more streams, but the data have only 'x'"
            for core in ("GroupSparse", "VLSAE", "AlignmentAutoencoder")
        },
        "SAEV": "SAEV tells text from image tokens by a column 'token_type'",
        "Temporal": "Temporal needs the timestep of every row",
        "GradientTopK": "GradientTopK reads gradients of the model's loss: set data.gradients=true",
    }
    if name in asks:
        with pytest.raises(SystemExit):
            fit(core=core, steps=5)
        assert asks[name] in capsys.readouterr().err
        return
    run = fit(core=core, steps=5)
    assert type(mmsae.load(run)).__name__ == name


def test_a_core_of_ones_own(fit, monkeypatch):
    Path("my_file.py").write_text("from mmsae.cores import TopK\nclass MyCore(TopK):\n    'Mine.'\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    run = fit(core=["--model.core=my_file.MyCore", "--model.core.d_latent=64", "--model.core.k=4"], steps=5)
    assert type(mmsae.load(run)).__module__ == "my_file"


def test_a_user_can_switch_off_bar_and_checkpoints(fit):
    run = fit("--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false", steps=5)
    assert (run / "sae").is_dir()
    assert not (run / "checkpoints").exists()

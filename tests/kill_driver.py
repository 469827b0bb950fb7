"""Runs commands of mmsae in children that are killed at random moments: `python kill_driver.py WHAT FOLDER SEED KILLS`.

The libraries are imported once, and every child is a fork of this process, which runs no threads; so a child begins in
milliseconds and a kill lands in the work and not in the imports. Prints the number of kills that hit.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

torch.set_num_threads(1)

import mmsae.cli.encode  # noqa: E402
import mmsae.cli.extract  # noqa: E402
import mmsae.cli.fit  # noqa: E402, F401
from mmsae.cli.main import main  # noqa: E402
from mmsae.sources import Custom  # noqa: E402

SLOW = float(os.environ.get("KILL_SLEEP", "0"))


class SlowNet(torch.nn.Module):
    """Takes its time, so that a kill finds it at work."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 6, 16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(SLOW)
        return self.patches(x)


class SlowSource(Custom):
    """A `Custom` source that the command line can name."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(SlowNet, ["patches"], input_shape=[3, 64, 64], device=device)


def child(command: list[str], log: Path) -> int:
    """Fork, run a command there, and give its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        main(command)
        os._exit(0)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(70)


def finish(pid: int, seconds: float | None) -> str:
    """Wait; after so many seconds kill. Gives "killed", or "done"; any other end is an error."""
    until = time.monotonic() + (seconds if seconds is not None else 300)
    while time.monotonic() < until:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            assert os.waitstatus_to_exitcode(status) == 0, f"the command failed ({status}), see the log"
            return "done"
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert seconds is not None, "the command hangs"
    return "killed"


def extract_command(out: Path) -> list[str]:
    """Some hundred forward passes, shards of less than three of them."""
    return [
        "extract", f"--model.out={out}", "--model.rows_per_shard=100", "--data=Scenes", "--data.n_train=120",
        "--data.n_val=20", "--data.n_test=20", "--data.examples_per_forward=3", "--data.source=__main__.SlowSource",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def fit_command(folder: Path, store: Path, config: Path) -> list[str]:
    """120 steps with a checkpoint every 5, from a YAML file of callbacks."""
    loggers = '[{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "%s", "name": ""}}]'
    return [
        "fit", f"--config={config}", "--data=Stored", f"--data.store={store}", "--data.batch_size=64",
        "--data.chunk_rows=256", "--data.block_rows=16", "--model.core=BatchTopK", "--model.core.d_latent=32",
        "--model.core.k=4", "--model.lr_warmup_steps=20", "--trainer.max_steps=120", "--trainer.accelerator=cpu",
        "--trainer.val_check_interval=50", f"--trainer.logger={loggers % folder}",
    ]  # fmt: skip


def encode_command(out: Path, run: Path) -> list[str]:
    """Some hundred batches, shards of less than three of them."""
    return [
        "encode", f"--run={run}", f"--out={out}", "--rows_per_shard=150", "--n_top=4", "--split=all", "--threads=1",
        "--accelerator=cpu",
    ]  # fmt: skip


def newest(folder: Path) -> Path | None:
    """The newest run that has a configuration (a kill while Lightning writes it leaves an empty file)."""
    runs = [p for p in folder.glob("version_*") if (p / "config.yaml").is_file() and (p / "config.yaml").stat().st_size]
    return max(runs, key=lambda p: int(p.name.removeprefix("version_")), default=None)


def until_done(command, folder: Path, seed: int, kills: int, log: Path) -> int:
    """Restart the command until `kills` hit, at moments spread over one undisturbed run; then let it finish."""
    begin = time.monotonic()
    assert finish(child(command(folder / "calm"), log), None) == "done"
    length, rng, hits = time.monotonic() - begin, random.Random(seed), 0
    print(f"undisturbed: {length:.1f} s", flush=True)
    number = 0
    while True:
        # short enough that several kills fall into one run, long enough to get somewhere
        wait = rng.uniform(0.15, 0.5) * length if hits < kills else None
        if finish(child(command(folder / f"wild{number}"), log), wait) == "killed":
            hits += 1
        elif hits < kills:
            number += 1  # came through in spite of them: once more from the beginning
        else:
            return hits


if __name__ == "__main__":
    what, home, seed, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if what == "extract":
        hit = until_done(extract_command, home, seed, kills, home / "log.txt")
    elif what == "encode":
        fitted = home / "run"
        begun = fit_command(fitted, home / "store", home / "callbacks.yaml")
        assert finish(child(begun, home / "log.txt"), None) == "done"
        run = newest(fitted)
        assert run is not None
        hit = until_done(lambda out: encode_command(out, run), home, seed, kills, home / "log.txt")
    else:

        def command(runs: Path) -> list[str]:
            """Begin, or resume the newest run."""
            last = newest(runs)
            begun = fit_command(runs, home / "store", home / "callbacks.yaml")
            return ["fit", f"--resume={last}"] if last else begun

        hit = until_done(command, home, seed, kills, home / "log.txt")
    print(f"kills: {hit}")

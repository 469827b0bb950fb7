"""Contenders in processes of their own that take turns, and the tables of what they took."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

CONSOLE = Console(width=None if sys.stdout.isatty() else 140)


class Turn(NamedTuple):
    """What some steps took.

    Attributes:
        steps: How many.
        wall: Seconds.
        cpu: Seconds of all threads of the process.
        peak: Bytes at most, above those before the model was made.
    """

    steps: int
    wall: float
    cpu: float
    peak: int


class Memory:
    """Peak memory above what was there at the start: resident memory, or what was allocated on the accelerator."""

    def __init__(self, device: str) -> None:
        self.on_device = device.startswith("cuda")
        self.start = torch.cuda.memory_allocated() if self.on_device else self._status("VmRSS")
        self.reset()

    def _status(self, key: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:  # not Linux
            return 0
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    def reset(self) -> None:
        """Forget the peak."""
        if self.on_device:
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes above the start since the last reset."""
        return (torch.cuda.max_memory_allocated() if self.on_device else self._status("VmHWM")) - self.start


class Gate:
    """Hands out batches while it is the turn of this process, and lets it wait otherwise.

    It stands where a trainer asks for the next batch, so a turn covers everything that the trainer does in a step.
    """

    def __init__(self, connection: Connection, device: str) -> None:
        self.connection, self.device = connection, device
        self.asked, self.left = 0, 0
        self.began, self.cpu = 0.0, 0.0
        self.memory: Memory | None = None

    def start(self) -> None:
        """Take the memory of this moment as the ground level."""
        self.memory = Memory(self.device)

    def __call__(self) -> None:
        """Before each batch."""
        if self.left == 0:
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            assert self.memory is not None, "start() comes before the first batch"
            turn = None
            if self.asked:
                now, cpu = time.perf_counter(), time.process_time()
                turn = Turn(self.asked, now - self.began, cpu - self.cpu, self.memory.peak())
            self.connection.send(turn)
            self.asked = self.left = self.connection.recv()
            self.memory.reset()
            self.began, self.cpu = time.perf_counter(), time.process_time()
        self.left -= 1


class Batches:
    """A fixed number of batches, slices of rows in memory, over and over.

    Args:
        rows: `[n, d_in]`.
        batch_size: Rows per batch.
        n_batches: Batches in all.
        gate: Asked before each batch.
    """

    def __init__(self, rows: Tensor, batch_size: int, n_batches: int, gate: Callable[[], None] | None = None) -> None:
        self.rows, self.batch_size, self.n_batches, self.gate = rows, batch_size, n_batches, gate

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Tensor]:
        parts = self.rows.split(self.batch_size)
        for number in range(self.n_batches):
            if self.gate is not None:
                self.gate()
            yield parts[number % len(parts)]


Work = Callable[[Gate], dict[str, Any]]
"""What a process does: it calls `gate.start()`, draws batches through the gate, and returns facts."""


def _serve(connection: Connection, work: Work, device: str, threads: int, log: str) -> None:
    with open(log, "w") as file:  # peers print and draw progress bars
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        connection.send(work(Gate(connection, device)))
    except Exception as error:
        traceback.print_exc()
        connection.send(error if type(error).__module__ == "builtins" else RuntimeError(str(error)))


class Worker:
    """A process that does `work`, some steps at a time.

    Args:
        name: In tables.
        work: What it does; it travels to the process by pickle.
        device: Where it computes.
        threads: Of PyTorch.
    """

    def __init__(self, name: str, work: Work, device: str = "cpu", threads: int = 1) -> None:
        self.name = name
        self.log = Path(tempfile.mkstemp(suffix=".log")[1])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "mmsae.training.module"])  # else each process imports for seconds
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other, work, device, threads, str(self.log)), daemon=True, name=name
        )
        self.process.start()
        other.close()

    def receive(self) -> Any:
        """The next message; an exception that ended the work is raised here."""
        try:
            message = self.connection.recv()
        except EOFError:
            message = RuntimeError("the process was killed; was there enough memory?")
        if isinstance(message, Exception):
            self.process.join()
            raise RuntimeError(
                f"{self.name} failed with {type(message).__name__}: {message} (see {self.log})"
            ) from message
        return message

    def run(self, n_steps: int) -> Turn:
        """Let it do some steps."""
        self.connection.send(n_steps)
        turn: Turn = self.receive()
        return turn

    def finish(self) -> dict[str, Any]:
        """Let it do the last step, and get its facts."""
        self.connection.send(1)
        facts: dict[str, Any] = self.receive()
        self.process.join()
        self.log.unlink()
        return facts


class Result(NamedTuple):
    """Of one contender.

    Attributes:
        warm_up: The first turn, with all that is made once.
        turns: One per round.
        facts: What its work returned.
    """

    warm_up: Turn
    turns: list[Turn]
    facts: dict[str, Any]

    @property
    def seconds(self) -> list[float]:
        """Per step, by round."""
        return [turn.wall / turn.steps for turn in self.turns]

    def record(self) -> dict[str, Any]:
        """Everything, as JSON."""
        turns = [turn._asdict() for turn in self.turns]
        return {"warm_up": self.warm_up._asdict(), "turns": turns, "facts": self.facts}


def n_batches(rounds: int, steps: int, warm_up: int) -> int:
    """Batches that `interleave` draws from each worker; the last is only there to end the turn before it."""
    return warm_up + rounds * steps + 1


def interleave(workers: Sequence[Worker], rounds: int, steps: int, warm_up: int, title: str) -> dict[str, Result]:
    """Let all workers take turns; each round begins with another one. A worker that fails drops out with a line."""
    alive = list(workers)
    warm: dict[str, Turn] = {}
    turns: dict[str, list[Turn]] = {}
    facts: dict[str, dict[str, Any]] = {}

    def each(order: Sequence[Worker], action: Callable[[Worker], object]) -> None:
        for worker in order:
            try:
                action(worker)
            except RuntimeError as error:
                alive.remove(worker)
                CONSOLE.print(f"[red]{error}[/red]")
            progress.advance(task)

    with Progress(console=CONSOLE, transient=True) as progress:
        task = progress.add_task(title, total=(rounds + 3) * len(workers))
        each(list(alive), lambda worker: worker.receive())  # ready
        each(list(alive), lambda worker: warm.update({worker.name: worker.run(warm_up)}))
        for number in range(rounds):
            shift = number % max(len(alive), 1)
            order = alive[shift:] + alive[:shift]
            each(order, lambda worker: turns.setdefault(worker.name, []).append(worker.run(steps)))
        each(list(alive), lambda worker: facts.update({worker.name: worker.finish()}))
    return {worker.name: Result(warm[worker.name], turns[worker.name], facts[worker.name]) for worker in alive}


def spread(values: Sequence[float], form: str = ".2f") -> tuple[str, str, str]:
    """Median, minimum and maximum."""
    return tuple(f"{value:{form}}" for value in (statistics.median(values), min(values), max(values)))  # type: ignore[return-value]


def ratios(result: Result, reference: Result) -> list[float]:
    """Time over that of the reference in the same round."""
    return [a / b for a, b in zip(result.seconds, reference.seconds, strict=True)]


def comparison(title: str, results: Mapping[str, Result], reference: str, batch_size: int) -> Table:
    """Ratios of time, rates and memory; ratios above 1 mean that the reference is faster."""
    table = Table(title=title)
    for column in ("", f"time / {reference}", "min", "max", "CPU time", "ms per step", "rows/s", "peak MB", "in steps"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in results.items():
        base = results[reference]
        cpu = [a.cpu / max(b.cpu, 1e-9) for a, b in zip(result.turns, base.turns, strict=True)]
        seconds = statistics.median(result.seconds)
        in_steps = max(turn.peak for turn in result.turns)
        table.add_row(
            name,
            *spread(ratios(result, base)),
            f"{statistics.median(cpu):.2f}",
            f"{1000 * seconds:.1f}",
            f"{batch_size / seconds:,.0f}",
            *(f"{peak / 1e6:,.0f}" for peak in (max(in_steps, result.warm_up.peak), in_steps)),
        )
    return table


MEMORY_NOTE = (
    "Memory: the peak above that of the process with its libraries loaded and the data in place, so weights, "
    "gradients, optimizer state and work space; of the whole run, and of the timed steps alone."
)


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {"cpu": cpu, "gpu": gpu, "threads": threads, "torch": torch.__version__, "python": platform.python_version()}


def save(path: str | None, device: str, threads: int, records: list[dict[str, Any]]) -> None:
    """Write raw numbers, if somebody wants them."""
    if path is not None:
        Path(path).write_text(json.dumps({"machine": machine(device, threads), "records": records}, indent=1))
        print(f"wrote {path}")

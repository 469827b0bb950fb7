"""Who takes part, and what each contender does in its process."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import torch
from contenders import Contender, Dense, Mmsae, MmsaeFloat32, MmsaeLoop, Task
from rounds import CONSOLE, Batches, Gate, Result
from world import World, quality, read

from mmsae.kernels import fast_precision

OURS: dict[str, type[Contender]] = {"mmsae": Mmsae, "mmsae-fp32": MmsaeFloat32, "mmsae-loop": MmsaeLoop, "dense": Dense}
PEERS: dict[str, type[Contender]] = {
    "saelens": peers.SAELens,
    "dictionary_learning": peers.DictionaryLearning,
    "sparsify": peers.Sparsify,
    "overcomplete": peers.Overcomplete,
    "saelens-bf16": peers.SAELensBfloat16,
    "dictionary_learning-bf16": peers.DictionaryLearningBfloat16,
    "sparsify-adam": peers.SparsifyAdam,
}
DEFAULT_PEERS = ("saelens", "dictionary_learning", "sparsify", "overcomplete")
KNOWN = {**OURS, **PEERS}
REFERENCE = "mmsae"


def add_arguments(parser: argparse.ArgumentParser, sizes: str, controls: Sequence[str]) -> None:
    """What all programs that compare have in common."""
    named = "; ".join([f"known: {', '.join(PEERS)}", "'none' for none"])
    parser.add_argument("--peers", default=None, help=f"by name, with commas; default: those installed ({named})")
    parser.add_argument("--controls", default=",".join(controls), help="our own beside mmsae, by name, or 'none'")
    parser.add_argument("--sizes", default=sizes, help="d_in,d_latent,k,batch; more of them after semicolons")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="per round; default: about a second of dense products")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("auto", "32-true", "bf16-mixed"), default="auto", help="of mmsae")
    parser.add_argument("--json", default=None, help="file for the raw numbers")


def names(text: str, known: Sequence[str]) -> list[str]:
    """Names from the command line."""
    chosen = [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise SystemExit(f"There is no contender {name!r}; known: {', '.join(known)}.")
    return chosen


def obstacle(name: str, core: str, device: str) -> str | None:
    """A sentence that says why a contender cannot take part, if so."""
    contender = KNOWN[name]
    if contender.package and importlib.util.find_spec(contender.package) is None:
        return f"{name} is not installed: pip install 'mmsae[benchmark]' brings it."
    if core not in contender.cores:
        return f"{name} has no {core}; it has {', '.join(contender.cores)}."
    if device not in contender.devices:
        return f"{name} does not work on {device}."
    return None


def choose(args: argparse.Namespace, core: str = "TopK") -> list[str]:
    """Names of those who take part; what cannot is an error if it was named, a line otherwise."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here: use --device cpu.")
    chosen = [REFERENCE]
    asked = names(args.controls, list(OURS)) + names(args.peers or "none", list(PEERS))
    for name in [*asked, *(DEFAULT_PEERS if args.peers is None else ())]:
        reason = obstacle(name, core, args.device)
        if reason is not None and args.peers is not None and name in PEERS:
            raise SystemExit(reason)
        if reason is not None:
            CONSOLE.print(reason)
        elif name not in chosen:
            chosen.append(name)
    return chosen


def tasks(args: argparse.Namespace, **arguments: Any) -> list[Task]:
    """One per size, with the precision decided."""
    torch.set_num_threads(args.threads)
    precision = fast_precision(args.device) if args.precision == "auto" else args.precision
    try:
        sizes = [[int(number) for number in size.split(",")] for size in args.sizes.split(";") if size]
        found = [
            Task(d_in, d_latent, k, batch, device=args.device, precision=precision, **arguments)
            for d_in, d_latent, k, batch in sizes
        ]
    except ValueError:
        raise SystemExit(f"--sizes={args.sizes} should read like 512,8192,32,4096;768,24576,32,4096.") from None
    return found


def with_reference(results: dict[str, Result]) -> dict[str, Result]:
    """The results, if there is something to compare with."""
    if REFERENCE not in results:
        raise SystemExit(f"{REFERENCE} itself failed, so there is nothing to compare with.")
    return results


def default_steps(task: Task) -> int:
    """Steps per round: about a second's worth of the five products of a dense step, between 2 and 200."""
    operations = 10 * task.batch_size * task.d_in * task.d_latent
    per_second = 4e13 if task.device == "cuda" else 2e11
    return int(min(max(per_second / operations, 2), 200))


def train(name: str, task: Task, data: Path, judged: World | None, gate: Gate) -> dict[str, Any]:
    """Train under the gate; with a world to be judged in, the facts are the quality."""
    contender = KNOWN[name]
    toy = replace(task, d_in=16, d_latent=64, k=4, batch_size=8, steps=4, warmup=0.25)
    contender(toy).train(Batches(torch.randn(64, 16, device=task.device), 8, toy.steps))  # imports what it will
    rows = read(data, task.device)
    torch.manual_seed(0)
    gate.start()
    trained = contender(task)
    trained.train(Batches(rows, task.batch_size, task.steps, gate))
    return {} if judged is None else quality(trained, judged)._asdict()


def encode(name: str, task: Task, data: Path, gate: Gate) -> dict[str, Any]:
    """Encode batches under the gate."""
    contender = KNOWN[name](task)
    rows = read(data, task.device)
    gate.start()
    contender.build()
    with torch.inference_mode():
        for x in Batches(rows, task.batch_size, task.steps, gate):
            contender.encode(x)
    return {}

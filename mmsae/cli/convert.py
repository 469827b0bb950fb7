"""`mmsae convert`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import mmsae.artifact
from mmsae import formats
from mmsae.cli.messages import Parser
from mmsae.cores import SAECore
from mmsae.errors import MmsaeError
from mmsae.formats.check import TOLERANCE, answer_of, compare, random_rows, width_of
from mmsae.formats.tensors import Answer, read_safetensors
from mmsae.store import Store

N_ROWS = 4096  # of given activations
CHECK = "Compare codes and reconstructions of what was read and what was written, and print the largest difference."


def convert(
    sae: str,
    out: str,
    to: Literal["saelens", "sparsify", "dictionary_learning", "mmsae"] = "saelens",
    source: str | None = None,
    check: bool = False,
    activations: str | None = None,
) -> None:
    """Write a trained dictionary in the format of another library, or one of theirs in ours.

    SRC and DST may also be given as the first two words: mmsae convert SRC DST --to=sparsify --check.

    Args:
        sae: The dictionary: a run, an sae folder or hub id of ours, or a folder or file of another library.
        out: Folder to write.
        to: Format to write.
        source: Format to read; by default the files tell.
        check: Whether to compare codes and reconstructions of what was read and what was written, by the library
            itself where it is installed; more than 1e-5 apart is an error.
        activations: Also compare on these: a store, or a file .npy or .safetensors with one matrix.
    """
    path = Path(sae)
    name = source or ("mmsae" if is_ours(path) else formats.detect(path))
    core = mmsae.artifact.load(sae) if name == "mmsae" else formats.load(path, name)
    rows = {"random rows": random_rows(core)} if check or activations else {}
    if activations:
        rows[activations] = _read_rows(Path(activations), core)
    if to == "mmsae":
        written = mmsae.artifact.save(core, out)
        again = mmsae.artifact.load(written)
    else:
        written = formats.export(core, out, to, _metadata(sae) if name == "mmsae" else _theirs(path, name))
        again = formats.load(written, to)
    print(f"dictionary: {written}")
    apart = []
    for said, answer in _answers(path, name, written, to, again) if rows else ():
        # a library that is asked about the source speaks in the unit of what was read
        dictionary = None if said.endswith("source") else again.dictionary
        for what, x in rows.items():
            difference = compare(core, answer, x, dictionary)
            print(f"{said}, {what}: {difference}")
            if not difference.agrees:
                apart.append(f"{said} on {what}")
    if apart:
        raise MmsaeError(
            f"{written} does not compute what {sae} does, to {TOLERANCE:g}, by {', '.join(apart)}: do not use it."
        )


def is_ours(path: Path) -> bool:
    """Whether `mmsae.artifact` shall look for it, which also knows hub ids and says what is missing."""
    if not path.exists():
        return True
    return any((p / mmsae.artifact.CONFIG).is_file() and (p / mmsae.artifact.WEIGHTS).is_file() for p in _places(path))


def _places(path: Path) -> tuple[Path, Path]:
    return path, path / "sae"


def _metadata(sae: str) -> dict[str, Any]:
    origin = mmsae.artifact.describe(sae).get("activations", {})
    metadata = {"model_name": (origin.get("source") or {}).get("model"), "hook_name": origin.get("stream")}
    return {key: value for key, value in metadata.items() if value}


def _theirs(path: Path, name: str) -> dict[str, Any]:
    """What a foreign dictionary says about its model."""
    about = getattr(formats.READ[name], "about", None)
    return about(path) if about else {}


def _answers(path: Path, name: str, written: Path, to: str, again: SAECore) -> Iterator[tuple[str, Answer]]:
    """Everyone who can be asked: our reader, and the libraries of source and target."""
    yield "read again", answer_of(again)
    for module, folder, role in ((name, path, "source"), (to, written, "result")):
        library = formats.READ.get(module)
        if library is None or not hasattr(library, "ask"):
            continue
        try:
            answer = library.ask(folder)
        except ImportError:
            print(f"{library.PACKAGE} is not installed, so it was not asked about the {role}.")
            continue
        except Exception as error:  # anything, in a library that we do not know
            why = f"{library.PACKAGE} cannot read {folder} ({type(error).__name__}: {error})"
            if role == "result":
                raise MmsaeError(f"{why}: do not use it.") from error
            print(f"{why}, so it was not asked about the source.")
            continue
        yield f"{library.PACKAGE} on the {role}", answer


def _read_rows(path: Path, core: SAECore) -> Tensor:
    """At most `N_ROWS` activations `[n, d_in]`, several streams side by side."""
    if path.is_dir():
        store = Store(path, verify="size")
        acts = next(store.in_order(N_ROWS))["acts"]
        if len(core.outputs) > 1 and set(core.outputs) <= set(acts):
            rows = core.joined(acts)
        else:
            rows = acts[core.spec.input if core.spec.input in acts else store.spec.input]
    elif path.suffix == ".npy" and path.is_file():
        try:
            rows = torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, TypeError) as error:
            raise MmsaeError(f"{path} holds no plain array of numbers ({error}).") from error
    elif path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        if len(tensors) != 1:
            raise MmsaeError(f"{path} holds {len(tensors)} tensors ({', '.join(tensors)}) instead of one matrix.")
        rows = next(iter(tensors.values()))
    else:
        raise MmsaeError(f"--activations={path} is neither a store nor a file .npy or .safetensors.")
    if rows.ndim != 2 or rows.shape[1] != width_of(core) or not len(rows):
        raise MmsaeError(f"{path} holds activations of shape {list(rows.shape)}, not [n, {width_of(core)}].")
    return rows[:N_ROWS].float()


def run(args: list[str]) -> None:
    """Parse and run."""
    words = args[1:]
    for i, option in enumerate(("--sae", "--out")):
        if i < len(words) and not words[i].startswith("-"):
            words[i] = f"{option}={words[i]}"
    about = str(convert.__doc__).partition("    Args:")[0]
    parser = Parser(prog="mmsae convert", description=" ".join(about.split()))
    parser.add_argument("--config", action="config", help="Options from a YAML file.")
    parser.add_function_arguments(convert, skip={"source", "check"}, as_group=False)
    known = Literal["mmsae", *formats.READ]  # type: ignore[valid-type]
    parser.add_argument("--from", type=known, help="Format to read; by default the files tell.")
    parser.add_argument("--check", action="store_true", help=CHECK)
    options = parser.parse_args(words).as_dict()
    options.pop("config", None)
    convert(source=options.pop("from"), **options)

"""Optional libraries and weight files, with a sentence where one is missing."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.errors import MmsaeError


def needs(module: str, user: str, extra: str) -> Any:
    """Import an optional library; MmsaeError with the command that installs it.

    Args:
        module: Its import name.
        user: Who needs it, for the sentence.
        extra: The extra of mmsae that brings it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # also what two libraries say that do not fit each other
        raise MmsaeError(f"{user} needs {module}: pip install 'mmsae[{extra}]' ({error}).") from error


def located(name: str) -> str:
    """The folder of a miniature that ships with the package for `miniature:NAME`, else the name as it is."""
    if not name.startswith("miniature:"):
        return name
    root = Path(__file__).parent.parent / "miniatures"
    known = sorted(path.parent.name for path in root.glob("*/config.json")) + sorted(
        path.parent.name for path in root.glob("*/model_index.json")
    )
    wanted = name.removeprefix("miniature:")
    if wanted not in known:
        raise MmsaeError(f"there is no miniature {wanted!r}; there are {', '.join(known)}.")
    return str(root / wanted)


@cache
def hub_or_cache() -> None:
    """Ask the hub, once, whether it answers; if not, its libraries look into their cache alone from now on.

    They would otherwise try again for most of a minute before they say that there is no connection.
    """
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session
    except ImportError:
        return
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever library it speaks HTTP with
        constants.HF_HUB_OFFLINE = True


@contextmanager
def without_logs() -> Iterator[None]:
    """Keep quiet libraries that log an error and raise it besides."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def first_line(error: BaseException, limit: int = 160) -> str:
    """The beginning of a foreign error, to quote in a sentence of ours."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= limit else text[: limit - 1] + "…"


def existing_file(path: str | Path) -> Path:
    """The path, with `~` expanded; MmsaeError if there is no such file."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise MmsaeError(f"there is no weight file {str(path)!r}; give the path of a .safetensors or .pt file.")
    return found


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict into a model, every name and shape as the model has it.

    Args:
        model: Where to.
        path: `.safetensors`, or a PyTorch file with a state dict, bare or under `state_dict` or `model`.

    Raises:
        MmsaeError: No such file, not a weight file, or one of another model.
    """
    path = existing_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Any] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)  # a pickle could run code
    except Exception as error:
        raise MmsaeError(f"the weight file {str(path)!r} cannot be read ({first_line(error)}).") from error
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    fitting(model, state, path)


def fitting(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """`load_state_dict`, with one sentence instead of a list of a hundred names."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = model.state_dict()
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    wrong = [("lacks", sorted(missing)), ("also has", sorted(extra)), ("has in another shape", sorted(shapes))]
    found = [(verb, names[0], f" and {len(names) - 1} more" if names[1:] else "") for verb, names in wrong if names]
    if found:
        said = ", ".join(f"{verb} {name!r}{more}" for verb, name, more in found)
        raise MmsaeError(f"{str(path)!r} holds weights of another model than {type(model).__name__}: it {said}.")
    model.load_state_dict(state)


def fetched(fetch: Any, name: str, what: str, revision: str | None = None, **arguments: Any) -> Any:
    """Call a `from_pretrained` of transformers: with a local folder or miniature, offline, or else with a hub id.

    Args:
        fetch: The function.
        name: Local folder, `miniature:NAME`, or id on the Hugging Face hub.
        what: What is loaded, for the sentence.
        revision: Branch, tag or commit on the hub.
        arguments: Further ones of the function.
    """
    name = located(name)
    folder = Path(name).expanduser()
    if not folder.is_dir() and (name[:1] in ("/", ".", "~") or name.count("/") > 1):
        raise MmsaeError(f"there is no folder {name!r} with a {what}; give a folder in the layout of transformers.")
    try:
        if folder.is_dir():
            return fetch(str(folder), local_files_only=True, **arguments)
        hub_or_cache()
        return fetch(name, revision=revision or "main", **arguments)
    except Exception as error:  # OSError, ValueError, safetensors' own … the libraries agree on no type
        why = first_line(error)
        if folder.is_dir():
            raise MmsaeError(f"the folder {name!r} holds no {what} that transformers can load ({why}).") from error
        raise MmsaeError(
            f"the {what} {name!r} is neither a local folder nor can it be fetched from the hub ({why}); give the path "
            "of a downloaded folder."
        ) from error

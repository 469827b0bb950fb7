"""Errors of the command line parser, in one sentence with the nearest right word."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from datamodules import ActivationDataModule
from mmsae.analyses import Analysis
from mmsae.cli.help import Formatter
from mmsae.cores import SAECore
from mmsae.errors import MmsaeError, nearest
from mmsae.sources import Source
from mmsae.steering.judges import Judge
from mmsae.subclasses import subclasses

BASES: dict[str, type[Any]] = {
    "core": SAECore, "also": SAECore, "source": Source, "data": ActivationDataModule, "analyses": Analysis,
    "callbacks": Callback, "logger": Logger, "optimizer": Optimizer, "judge": Judge,
}  # fmt: skip
"""Last word of an option that names a class, and what the class must be."""


class Parser(LightningArgumentParser):
    """A parser that answers in one sentence, without its usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Formatter, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Translate; parsers inside other parsers raise as before."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise MmsaeError(translate(message, self)) from ex

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a file, and name it when something is wrong with it."""
        try:
            return super().parse_path(cfg_path, *args, **kwargs)
        except MmsaeError as error:
            raise MmsaeError(f"{cfg_path}: {error}") from error


def translate(message: str, parser: ArgumentParser) -> str:
    """One sentence for what went wrong.

    jsonargparse nests its message like the options: `Parser key "data"` / `class_path 'Scenes'` / `Parser key "source"`
    / ... / the reason. The first reason from the top is that of the first type that was tried, which is the right one.
    """
    place = Place(parser)
    lines = message.splitlines()
    for i, line in enumerate(lines):
        if "Expected a path but" in line:  # a class may be given as a file, too
            continue
        place.enter(line)
        for pattern, say in REASONS.items():
            if found := re.search(pattern, line):
                return say(place, found[1], " ".join(lines[i:]))
    return re.sub(r"\s+", " ", message).strip()


class Place:
    """How deep in the options a line of a message is."""

    def __init__(self, parser: ArgumentParser) -> None:
        actions = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        self.verbs: dict[str, Any] = next((action.choices for action in actions), {})  # type: ignore[assignment]
        self.parser, self.option, self.types = parser, "", ""
        self.cls: type[Any] | None = None

    def enter(self, line: str) -> None:
        """Take the key, the class and the allowed types that a line names."""
        for key in re.findall(r'Parser key "([^"]+)"', line):
            self.option, self.types = self.below(key), ""
        if found := re.search(r"class_path[=:]? ?'(\w[\w.]*)\.(\w+)'", line):
            self.cls = getattr(import_module(found[1]), found[2], None)
        if found := re.search(r"Subtypes: \[(.*)\]", line):
            self.types = found[1]

    def below(self, key: str) -> str:
        """The full name of an option; `fit.data` is called `--data`."""
        first, _, rest = key.partition(".")
        key = rest if rest and first in self.verbs else key
        return f"{self.option}.{key}" if self.option else key

    def known(self, option: str) -> str:
        """Names of the classes that an option takes, in brackets; nothing for an option that takes no class."""
        base = BASES.get(option.rpartition(".")[2])
        return f" ({', '.join(subclasses(base))})" if base else ""

    def options(self) -> Iterable[str]:
        """Of the class, or of the parser where no class is named."""
        if self.cls is None:
            found = {action.dest for parser in (self.parser, *self.verbs.values()) for action in parser._actions}
            return {name for name in found if not name.endswith(("help", "subcommand"))}
        inner = ArgumentParser()
        given = issubclass(self.cls, SAECore | Optimizer)  # their first argument comes from the data, or the core
        inner.add_class_arguments(self.cls, skip={1} if given else set(), fail_untyped=False)
        return inner.get_defaults().keys()


def _no_class(place: Place, name: str, rest: str) -> str:
    base = BASES.get(place.option.rpartition(".")[2])
    if base is None or "." in name:
        return f"--{place.option}={name} is no class: give a dotted path such as my_file.MyClass."
    return f"--{place.option}={name}: no {base.__name__} is called so; nearest: {nearest(name, subclasses(base))}."


def _no_option(place: Place, name: str, rest: str) -> str:
    if place.cls in BASES.values():
        return _no_class_yet(place)
    if place.cls is not None and issubclass(place.cls, SAECore) and name in ("spec", "d_in", "d_out"):
        return f"--{place.option}.{name} cannot be set: the data decide the widths."
    owner = "there is" if place.cls is None else f"{place.cls.__name__} has"
    return f"{owner} no option {name!r}; nearest: {nearest(name, place.options())}."


def _no_class_yet(place: Place, *_: str) -> str:
    return f"name the class before its options: --{place.option}=NAME{place.known(place.option)}."


def _unrecognized(place: Place, word: str, rest: str) -> str:
    if not word.startswith("-"):
        return f"{word!r} is no option: options are written --name=value."
    return _no_option(place, place.below(word.lstrip("-").partition("=")[0]), rest)


def _missing(place: Place, names: str, rest: str) -> str:
    wanted = [f"--{option}{place.known(option)}" for option in map(place.below, names.rstrip(".").split(", "))]
    return f"{'give' if place.cls is None else f'{place.cls.__name__} needs'} {' and '.join(wanted)}."


def _wrong_type(place: Place, kind: str, rest: str) -> str:
    value = re.search(r"(?:Got|Given) value: (.*?)(?:\.? Got value: |$| +-? ?Expected| - )", rest)
    kinds = re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", place.types or kind).replace("NoneType", "null")
    kinds, n_literals = re.subn(r"Literal\[(.*?)\]", r"\1", re.sub(r"\w+\.(?=\w)", "", kinds))
    said = f"is none of {kinds}" if n_literals else f"is not of type {kinds.replace(', ', ' or ')}"
    return f"--{place.option}={value[1] if value else '?'} {said}."


REASONS: dict[str, Callable[[Place, str, str], str]] = {
    r"Expected a dot import path string: (.*)": _no_class,
    r"Expected '([\w.]+)' to be a subclass": _no_class,
    r"(?:Option|does not accept option) '([^']+)'": _no_option,
    r"Dict must include a (class_path)": _no_class_yet,
    r"unrecognized arguments: (\S+)": _unrecognized,
    r"arguments are required: (.*?)(?:\. Got value|$)": _missing,
    r"--> ([\w.]+):": lambda place, name, _: f"--{name} cannot be set: the data decide it.",
    r"File does not exist: (.*)": lambda place, path, _: f"--{place.option or 'config'}: there is no file {path}.",
    r"Unable to load config '([^']*)'": lambda place, path, _: f"--{place.option}={path} is neither file nor mapping.",
    r"Problems parsing config: (.*)": lambda place, why, rest: (
        "this is no YAML: " + re.sub(r"\s+", " ", re.sub(r'in "<[^>]*>",', "at", rest.partition("config: ")[2])) + "."
    ),
    r"(No module named '.*?'|module '.*?' has no attribute '.*?')": (
        lambda place, why, _: f"--{place.option} names a class that cannot be imported ({why})."
    ),
    r"Expected an? (.+?)(?:\. Got value|$)": _wrong_type,
}

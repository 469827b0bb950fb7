"""Errors of the command line parser, in one sentence with the nearest right word."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from mmsae.errors import nearest
from mmsae.subclasses import subclasses


class Parser(LightningArgumentParser):
    """A parser that prints one sentence instead of its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Translate, print, exit with 2; parsers inside other parsers raise as before."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"mmsae: {translate(message, self)}", file=sys.stderr)
        sys.exit(2)


def translate(message: str, parser: Any) -> str:
    """One sentence for what went wrong."""
    inner = re.findall(r"MmsaeError: (.+)", message)
    if inner:
        return inner[-1]
    text = re.sub(r"\s+", " ", message)
    for base in _bases():
        known = subclasses(base)
        options = "|".join(_KEYS[base.__name__])
        wrong = re.search(rf"[\"']?(?:{options})[\"']?.*?(?:import path|import_module|not a subclass|given) [\"']?([\w.]+)", text)
        if "import path" in text and (value := re.search(r"value[:=]? [\"']?([\w.]+)", text) or wrong):
            if re.search(rf"({options})[\"']?:", text) or f"{base.__name__}" in text:
                name = value.group(1)
                return f"{name!r} is no {base.__name__}; nearest: {nearest(name, known)}."
    unknown = re.search(r"[Oo]ption '?(?:--)?([\w.]+)'? is not accepted|[Uu]nrecognized arguments: (?:--)?([\w.]+)|"
                        r"Key '?([\w.]+)'? is not expected|does not accept.*?'([\w.]+)'", text)
    if unknown:
        name = next(group for group in unknown.groups() if group)
        return f"there is no option {name!r}; nearest: {nearest(name, _options(parser))}."
    return text.strip()


_KEYS = {
    "SAECore": ("model.core", "core"),
    "Source": ("data.source", "source"),
    "ActivationDataModule": ("data",),
    "Analysis": ("analyses",),
}


def _bases() -> list[type[Any]]:
    from datamodules import ActivationDataModule
    from mmsae.analyses import Analysis
    from mmsae.cores import SAECore
    from mmsae.sources import Source

    return [SAECore, Source, ActivationDataModule, Analysis]


def _options(parser: Any) -> list[str]:
    return [action.dest for action in parser._actions if action.dest and action.dest != "help"]

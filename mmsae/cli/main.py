"""`mmsae VERB ...`."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from importlib import import_module

from mmsae.errors import MmsaeError, nearest

VERBS = {
    "extract": ("mmsae.cli.extract", "run a model over a data set and store its activations"),
    "fit": ("mmsae.cli.fit", "train a dictionary, from a store or from the running model"),
    "validate": ("mmsae.cli.fit", "measure a training checkpoint on the validation split"),
    "test": ("mmsae.cli.fit", "measure a training checkpoint on the test split"),
    "predict": ("mmsae.cli.fit", "write the codes of the test split"),
    "encode": ("mmsae.cli.encode", "write the codes of a trained dictionary to disk"),
    "evaluate": ("mmsae.cli.evaluate", "run analyses on a trained dictionary"),
    "filter": ("mmsae.cli.filter", "rank conversations about pictures and keep the best"),
    "similarity": ("mmsae.cli.similarity", "compare layers of models by their dictionaries and activations"),
    "steer": ("mmsae.cli.steer", "steer a model with latents; steer bench measures it"),
    "report": ("mmsae.cli.report", "draw the page of an evaluated run"),
    "convert": ("mmsae.cli.convert", "write a dictionary in the format of another library, or read one"),
}

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
AGAIN = {
    "fit": "--resume RUN goes on from its last checkpoint",
    "extract": "the same command goes on where it stopped",
    "encode": "the same command goes on where it stopped",
    "steer": "bench goes on where it stopped with the same command",
    "filter": "the same command goes on where it stopped",
}

HELP = """\
mmsae: sparse autoencoders for every modality

  mmsae VERB [--config FILE.yaml] [--option=value ...]

{verbs}

  mmsae VERB --help               all options of a verb
  mmsae fit --model.core.help=X   the options of core X
  mmsae fit --resume RUN          go on with an interrupted run

Start: mmsae fit --config recipes/scenes_topk.yaml"""


def help_text() -> str:
    """Of the command itself; nothing heavy is imported for it."""
    return HELP.format(verbs="\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items()))


def main(args: list[str] | None = None) -> None:
    """Run a verb.

    Args:
        args: Words after `mmsae`; None takes them from the command line.
    """
    words = sys.argv[1:] if args is None else list(args)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    if words[0] in ("--version", "version"):
        print(import_module("mmsae").__version__)
        return
    try:
        _verb(words[0])(words)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise  # of --help; Lightning turns Ctrl-C into exit(1)
        print(f"mmsae {words[0]}: interrupted; {AGAIN.get(words[0], 'run it again')}.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        print(f"mmsae {words[0]}: {said}", file=sys.stderr)
        raise SystemExit(2) from error


def sentence(error: BaseException) -> str | None:
    """What to tell the user, or None for a bug of ours; libraries in between may have wrapped the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MmsaeError):
            return str(cause)
        if isinstance(cause, OSError) and cause.strerror and (cause is error or cause.errno in DISK):
            return f"{cause.filename or 'writing'}: {cause.strerror}."
        cause = cause.__cause__ or cause.__context__
    return None


def _verb(name: str) -> Callable[[list[str]], None]:
    if name not in VERBS:
        raise MmsaeError(f"there is no such verb; nearest: {nearest(name, VERBS)}. See mmsae --help.")
    if name == "report":  # draws from files; torch would take longer to load than the page to draw
        return import_module(VERBS[name][0]).run
    home = import_module("datamodules")
    if not hasattr(home, "ActivationDataModule"):
        where = getattr(home, "__file__", None) or next(iter(getattr(home, "__path__", ["?"])))
        raise MmsaeError(f"{where} stands in the way of mmsae's own datamodules: rename it, or run elsewhere.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for --model.core=my_file.MyCore; last, so that it hides nothing
    return import_module(VERBS[name][0]).run

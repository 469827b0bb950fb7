"""`mmsae report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser, auto_cli

from mmsae.errors import MmsaeError
from mmsae.report.page import write_report
from mmsae.results import Result

ORDER = ["Training", "Fidelity", "AFA", "FactorRecovery", "CrossModal", "ZeroShotConcepts", "Downstream"]


class Parser(ArgumentParser):
    """Answers in one sentence; unlike the parser of the other verbs it needs no torch."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong."""
        raise MmsaeError(f"{' '.join(message.split())}; see mmsae report --help.") from ex


def report(run: str, out: str | None = None, title: str | None = None) -> None:
    """Draw the page of an evaluated run, from its results alone.

    Args:
        run: Folder of a `mmsae fit` run after `mmsae evaluate`.
        out: The HTML file; default: report.html in the run.
        title: Heading of the page; default: dictionary and hook point.
    """
    folder = Path(run)
    results = [Result.load(path) for path in sorted((folder / "results").glob("*.json"))]
    if not results:
        raise MmsaeError(f"{folder} has no results to draw: run mmsae evaluate --run {run} first.")
    results.sort(key=lambda r: ORDER.index(r.name) if r.name in ORDER else len(ORDER))
    facts, heading = _facts(folder)
    path = write_report(results, Path(out) if out else folder / "report.html", title or heading, facts)
    print(f"report: {path.resolve()}")


def _facts(folder: Path) -> tuple[dict[str, str], str]:
    path = folder / "sae" / "config.json"
    if not path.is_file():
        return {}, f"dictionary of {folder.name}"
    config = json.loads(path.read_text())
    origin = config.get("activations", {})
    source, data = origin.get("source") or {}, origin.get("data") or {}
    model = str(source.get("model") or source.get("class", ""))
    if Path(model).is_dir():
        model = Path(model).name
    stream = origin.get("stream", "")
    facts = {
        "model": model,
        "hook point": str(stream),
        "data": str(data.get("class", "")),
        "dictionary": f"{config['core']}, {config['config'].get('d_latent')} latents",
        "trained on": f"{config.get('training', {}).get('rows', 0):,} activations",
        "normalised by": str(origin.get("normalise", "")),
    }
    return {k: v for k, v in facts.items() if v}, f"{config['core']} on {stream}" + (f" of {model}" if model else "")


def run(args: list[str]) -> None:
    """Parse and run."""
    auto_cli(report, args=args[1:], as_positional=False, parser_class=Parser)

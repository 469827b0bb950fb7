"""`mmsae convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

import mmsae.artifact
from mmsae.cli.messages import Parser
from mmsae.formats import saelens


def convert(sae: str, out: str, to: Literal["saelens", "mmsae"] = "saelens") -> None:
    """Write a trained dictionary in SAELens format, or one of SAELens in ours.

    Args:
        sae: The dictionary: a run, an sae folder or hub id of ours, or a folder of SAELens.
        out: Folder to write.
        to: Format to write.
    """
    if to == "saelens":
        description = mmsae.artifact.describe(sae)
        source = description.get("activations", {}).get("source") or {}
        metadata = {"model_name": source.get("model"), "hook_name": description.get("activations", {}).get("stream")}
        path = saelens.export(mmsae.artifact.load(sae), Path(out), {k: v for k, v in metadata.items() if v})
    else:
        path = mmsae.artifact.save(saelens.load(Path(sae)), out)
    print(f"dictionary: {path}")


def run(args: list[str]) -> None:
    """Parse and run."""
    auto_cli(convert, args=args[1:], as_positional=False, parser_class=Parser)

"""Measurements on disk, one line each, as soon as they are made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Ledger:
    """What has been measured; the same work begun again goes on where it stopped.

    Args:
        path: File of JSON lines; None keeps them in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path is None or not path.is_file():
            return
        whole = 0
        with open(path, "rb") as file:
            for line in file:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None:  # the last one, of a run that was killed while it wrote
                    break
                self.found[entry["key"]] = entry["value"]
                whole += len(line)
        if whole < path.stat().st_size:
            os.truncate(path, whole)

    def get(self, key: str) -> dict[str, Any] | None:
        """What was measured under this name, if it was."""
        return self.found.get(key)

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep a measurement."""
        self.found[key] = value
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())

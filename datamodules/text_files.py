"""Text in files."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.documents import TextDocuments
from mmsae.errors import MmsaeError
from mmsae.sources.weights import first_line, needs

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


class TextFiles(TextDocuments):
    """Documents from .txt files (cut at `separator`), or .jsonl, .json and .parquet files with a text column.

    Splits never cut through a document; documents longer than `max_characters` become several examples.
    `arrangement=blocks` joins documents and cuts them into blocks of `block_len` tokens instead. Parquet is read
    through a memory map, the other files lie in memory.

    Args:
        path: A file, a folder, or a glob.
        separator: What stands between two documents of a .txt file; empty takes the file as one document.
        text_key: Name of the text column in .jsonl, .json and .parquet files.
        **kwargs: See `TextDocuments`, `Documents` and `ActivationDataModule`.
    """

    def __init__(self, path: str, separator: str = "\n\n", text_key: str = "text", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path, self.separator, self.text_key = path, separator, text_key
        _ = self._files

    @property
    def n_documents(self) -> int:
        """Those in files of text and JSON, then the rows of the Parquet files."""
        n = len(self._texts) + (0 if self._table is None else len(self._table))
        if not n:
            raise MmsaeError(f"data.path={self.path} holds no text.")
        return n

    def document(self, index: int) -> dict[str, Any]:
        """Its text."""
        if index < len(self._texts):
            return {"text": self._texts[index]}
        return {"text": self._table[index - len(self._texts)][self.text_key] or ""}  # a null is an empty document

    @cached_property
    def _files(self) -> list[Path]:
        root = Path(self.path)
        found = sorted(root.rglob("*")) if root.is_dir() else [Path(p) for p in sorted(glob.glob(self.path))]
        files = [p for p in found if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not files:
            raise MmsaeError(f"data.path={self.path} names no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file.")
        return files

    @cached_property
    def _texts(self) -> list[str]:
        files = [path for path in self._files if path.suffix.lower() != ".parquet"]
        return [d for path in files for d in self._read(path) if d.strip()]

    @cached_property
    def _table(self) -> Any:
        """The rows of all Parquet files, copied once to a cache that can be mapped into memory; None without any."""
        files = [path for path in self._files if path.suffix.lower() == ".parquet"]
        if not files:
            return None
        datasets = needs("datasets", "reading .parquet files", "text")
        for path in files:
            try:
                kind = str(dict(_columns(path)).get(self.text_key))
            except Exception as error:  # of pyarrow
                raise MmsaeError(f"{path} cannot be read as Parquet ({first_line(error)}).") from error
            if "string" not in kind:
                names = ", ".join(name for name, _ in _columns(path))
                raise MmsaeError(f"{path} has no text column {self.text_key!r}: set text_key to one of {names}.")
        return datasets.Dataset.from_parquet([str(path) for path in files], columns=[self.text_key])

    def _read(self, path: Path) -> Iterator[str]:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise MmsaeError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
        if path.suffix.lower() == ".txt":
            yield from text.split(self.separator) if self.separator else [text]
            return
        try:
            lines = text.split("\n") if path.suffix.lower() == ".jsonl" else None
            rows = json.loads(text) if lines is None else [json.loads(line) for line in lines if line.strip()]
            texts = [row[self.text_key] for row in rows]
            if wrong := [t for t in texts if not isinstance(t, str)]:
                raise TypeError(f"one entry is {wrong[0]!r}, which is no text")
            yield from texts
        except (ValueError, KeyError, TypeError) as error:
            raise MmsaeError(f"{path} is no JSON with a column {self.text_key!r} ({error}): set text_key.") from error


def _columns(path: Path) -> list[tuple[str, Any]]:
    """Names and types of the columns of a Parquet file, from its footer."""
    from pyarrow import parquet

    return [(field.name, field.type) for field in parquet.read_schema(path)]

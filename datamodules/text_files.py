"""Text in files."""

from __future__ import annotations

import glob
import json
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items, cut
from mmsae.errors import MmsaeError, checked


class TextFiles(ActivationDataModule):
    """Documents from .txt files (cut at `separator`), or .jsonl and .json files with a text column.

    Splits never cut through a document; documents longer than `max_characters` become several examples.

    Args:
        path: A file, a folder, or a glob.
        separator: What stands between two documents of a .txt file; empty takes the file as one document.
        text_key: Name of the text column in .jsonl and .json files.
        max_characters: Longest example, broken at white space; the source cuts at its context length as well.
        val_share: Share of documents to choose latents on.
        test_share: Share of documents to measure on.
        split_seed: Of the cut into splits.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self,
        path: str,
        separator: str = "\n\n",
        text_key: str = "text",
        max_characters: int = 2000,
        val_share: float = 0.1,
        test_share: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.separator, self.text_key = path, separator, text_key
        self.max_characters = checked("max_characters", max_characters, 1)
        self.val_share, self.test_share, self.split_seed = val_share, test_share, split_seed
        _ = self._files

    @cached_property
    def _files(self) -> list[Path]:
        root = Path(self.path)
        found = sorted(root.rglob("*")) if root.is_dir() else [Path(p) for p in sorted(glob.glob(self.path))]
        files = [p for p in found if p.suffix.lower() in (".txt", ".jsonl", ".json") and p.is_file()]
        if not files:
            raise MmsaeError(f"data.path={self.path} names no .txt, .jsonl or .json file.")
        return files

    @cached_property
    def _documents(self) -> list[str]:
        documents = [d for path in self._files for d in self._read(path) if d.strip()]
        if not documents:
            raise MmsaeError(f"data.path={self.path} holds no text.")
        return documents

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

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Pieces of documents."""
        chosen = cut(len(self._documents), split, self.val_share, self.test_share, self.split_seed)
        pieces = [piece for i in chosen for piece in self._pieces(self._documents[i].strip())]
        return Items(pieces, lambda text, sample_id: {"text": text, "sample_id": sample_id})

    def _pieces(self, text: str) -> list[str]:
        if len(text) <= self.max_characters:
            return [text]
        pieces = textwrap.wrap(
            text, self.max_characters, expand_tabs=False, replace_whitespace=False, drop_whitespace=False,
            break_on_hyphens=False,
        )  # fmt: skip
        return [piece for piece in pieces if piece.strip()]

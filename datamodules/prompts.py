"""Prompts for models that draw."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items, cut
from mmsae.errors import MmsaeError


class Prompts(ActivationDataModule):
    """Prompts in a file: one in each line of a .txt file, or one object in each line of a .jsonl file.

    An object has the prompt under `text_key` and may have `labels`, a dict from factor to the name of its value. A
    prompt that stands there twice is read once, so that no prompt is on both sides of a split.

    Args:
        path: The file.
        text_key: Name of the prompt in .jsonl files.
        val_share: Share of prompts to choose latents on.
        test_share: Share of prompts to measure on.
        split_seed: Of the cut into splits.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self,
        path: str,
        text_key: str = "text",
        val_share: float = 0.1,
        test_share: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.text_key = path, text_key
        self.val_share, self.test_share, self.split_seed = val_share, test_share, split_seed
        _ = self._prompts  # a wrong file must be told before any model is loaded

    @cached_property
    def _prompts(self) -> list[tuple[str, dict[str, str]]]:
        """The different prompts and their labels, in the order of the file."""
        file = Path(self.path)
        if file.suffix.lower() not in (".txt", ".jsonl") or not file.is_file():
            raise MmsaeError(f"data.path={self.path} names no .txt or .jsonl file of prompts.")
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise MmsaeError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
        found: dict[str, dict[str, str]] = {}
        for number, line in enumerate(lines, start=1):
            if line.strip():
                prompt, labels = self._parsed(line, number) if file.suffix.lower() == ".jsonl" else (line.strip(), {})
                found.setdefault(prompt, labels)
        if not found:
            raise MmsaeError(f"data.path={self.path} holds no prompts.")
        return list(found.items())

    def _parsed(self, line: str, number: int) -> tuple[str, dict[str, str]]:
        try:
            row = json.loads(line)
            prompt, labels = row[self.text_key], row.get("labels", {})
            if not isinstance(prompt, str) or not prompt.strip():
                raise TypeError(f"{prompt!r} is no prompt")
            return prompt.strip(), {str(factor): str(value) for factor, value in labels.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MmsaeError(f"{self.path}, line {number} has no prompt {self.text_key!r} ({error}).") from error

    @property
    def factors(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """The values of each label, sorted."""
        values: dict[str, set[str]] = {}
        for _, labels in self._prompts:
            for factor, value in labels.items():
                values.setdefault(factor, set()).add(value)
        return {factor: tuple(sorted(names)) for factor, names in sorted(values.items())}

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Prompts and the indices of their labels."""
        chosen = cut(len(self._prompts), split, self.val_share, self.test_share, self.split_seed)
        factors = self.factors

        def make(index: int, sample_id: int) -> dict[str, Any]:
            prompt, labels = self._prompts[index]
            item: dict[str, Any] = {"text": prompt, "sample_id": sample_id}
            if factors:
                item["labels"] = {f: names.index(labels[f]) if f in labels else -1 for f, names in factors.items()}
            return item

        return Items(chosen, make)

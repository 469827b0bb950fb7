"""What data sets of documents have in common: splits by document, and how documents become examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items, cut
from mmsae.errors import MmsaeError, checked
from mmsae.sources.text import TextModel

Arrangement = Literal["sequential", "blocks"]
WHITE = " \n\t\r\x0b\x0c"


class Documents(ActivationDataModule, ABC):
    """Documents, each by itself or joined and cut into blocks of tokens; splits never cut through one.

    A subclass says how many there are and what each holds. Rows carry the column `document`, the number of their
    document over all splits.

    Args:
        arrangement: "sequential" gives each document to the model by itself; "blocks" joins the tokens of a split and
            cuts them every `block_len`, whatever stands there.
        block_len: Tokens of a block; None is the context length of the source.
        val_share: Share of documents to choose latents on.
        test_share: Share of documents to measure on.
        split_seed: Of the cut into splits.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self,
        arrangement: Arrangement = "sequential",
        block_len: int | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if arrangement not in ("sequential", "blocks"):
            raise MmsaeError(f"arrangement={arrangement!r} is unknown; choose sequential or blocks.")
        self.arrangement = arrangement
        self.block_len = block_len if block_len is None else checked("block_len", block_len, 1)
        self.val_share, self.test_share, self.split_seed = val_share, test_share, split_seed
        self._by_split: dict[Split, Dataset[dict[str, Any]]] = {}

    @property
    @abstractmethod
    def n_documents(self) -> int:
        """How many there are in all splits."""

    @abstractmethod
    def document(self, index: int) -> dict[str, Any]:
        """Content of a document for the source: `text` or `messages`."""

    def examples(self, chosen: list[int]) -> Dataset[dict[str, Any]]:
        """One example per document."""
        return Items(chosen, lambda i, sample_id: {**self.document(i), "document": i, "sample_id": sample_id})

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Documents of a split, pieces of them, or blocks."""
        if split not in self._by_split:
            chosen = cut(self.n_documents, split, self.val_share, self.test_share, self.split_seed)
            made = self._blocks(chosen) if self.arrangement == "blocks" else self.examples(chosen)
            self._by_split[split] = made
        return self._by_split[split]

    def identity(self, split: Split) -> dict[str, Any]:
        """Class, arguments, split and size of the data set."""
        shared = ("arrangement", "block_len", "val_share", "test_share", "split_seed")
        return {**super().identity(split), **{name: getattr(self, name) for name in shared}}

    def _blocks(self, chosen: list[int]) -> Blocks:
        source = self.source
        if not isinstance(source, TextModel):
            raise MmsaeError("arrangement=blocks cuts tokens: give a source with a tokenizer, such as CausalLM.")
        length = self.block_len or source.context_length
        checked("block_len", length, 1, source.context_length)
        ids: list[np.ndarray] = []
        columns: dict[str, list[np.ndarray]] = {"document": []}
        for i in chosen:
            content = self.document(i)
            if "text" in content and not content["text"].strip():
                continue
            coded = source.coded({**content, "sample_id": i}, whole=True)
            row = list(coded.ids)
            if "text" in content and row[0] not in source.special and source.tokenizer.eos_token_id is not None:
                row.append(source.tokenizer.eos_token_id)  # texts without a start token are told apart by their end
            ids.append(np.asarray(row, np.int32))
            columns["document"].append(np.full(len(row), i, np.int32))
            for name, values in coded.columns.items():
                columns.setdefault(name, []).append(np.asarray(values, np.int32))
        if not ids:
            raise MmsaeError(f"the documents of {type(self).__name__} hold no text.")
        return Blocks(np.concatenate(ids), {name: np.concatenate(parts) for name, parts in columns.items()}, length)


class TextDocuments(Documents):
    """Documents of plain text; long ones become several examples.

    Args:
        max_characters: Longest example, broken at white space; the source cuts at its context length as well.
        **kwargs: See `Documents`.
    """

    def __init__(self, max_characters: int = 2000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_characters = checked("max_characters", max_characters, 1)

    def examples(self, chosen: list[int]) -> Dataset[dict[str, Any]]:
        """Pieces of documents: where they stand is kept, the text is looked up."""
        places = ((i, *span) for i in chosen for span in spans(self.document(i)["text"], self.max_characters))
        pieces = np.fromiter(places, np.dtype((np.int64, 3)))
        return Items(pieces, self._piece)  # type: ignore[arg-type]  # an array: 24 bytes per piece

    def identity(self, split: Split) -> dict[str, Any]:
        """Class, arguments, split and size of the data set."""
        return {**super().identity(split), "max_characters": self.max_characters}

    def _piece(self, place: np.ndarray, sample_id: int) -> dict[str, Any]:
        i, start, end = (int(n) for n in place)
        return {"text": self.document(i)["text"][start:end], "document": i, "sample_id": sample_id}


class Blocks(Dataset[dict[str, Any]]):
    """Consecutive tokens, cut every `length`; the last block may be shorter.

    Args:
        ids: Of the tokens, `[n]`.
        columns: Name to one number per token, `[n]`.
        length: Tokens of a block.
    """

    def __init__(self, ids: np.ndarray, columns: dict[str, np.ndarray], length: int) -> None:
        self.ids, self.columns, self.length = ids, columns, length

    def __len__(self) -> int:
        return -(-len(self.ids) // self.length)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(index * self.length, (index + 1) * self.length)
        columns = {name: values[part] for name, values in self.columns.items()}
        return {"input_ids": self.ids[part], "token_columns": columns, "sample_id": index}


def spans(text: str, longest: int) -> Iterator[tuple[int, int]]:
    """Start and end of pieces of at most `longest` characters, none of them blank, broken behind white space.

    A word that is longer is broken. What stands outside all pieces is white space.
    """
    start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
    while start < stop:
        end = min(start + longest, stop)
        if end < stop and not text[end].isspace():
            behind = max(text.rfind(white, start, end) for white in WHITE) + 1
            end = behind if behind > start else end
        if not text[start:end].isspace():
            yield start, end
        start = end

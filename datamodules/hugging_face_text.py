"""Data sets of the Hugging Face hub."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.documents import TextDocuments
from mmsae.errors import MmsaeError, nearest
from mmsae.sources.weights import first_line, needs


class HuggingFaceText(TextDocuments):
    """The text column of a data set of Hugging Face, mapped into memory: from the hub, or from a folder, offline.

    Splits into training, validation and test are cut from `split` by document; documents longer than `max_characters`
    become several examples.

    Args:
        path: Id on the hub, folder written by `save_to_disk`, folder of data files, or a format (`json`, `csv`,
            `parquet`) with `data_files`.
        name: Configuration of the data set.
        split: Its split that is read; `train[:1%]` takes the beginning.
        text_key: Name of the text column.
        data_files: Files of a format, a glob or a list.
        revision: Branch, tag or commit on the hub.
        **kwargs: See `TextDocuments`, `Documents` and `ActivationDataModule`.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        text_key: str = "text",
        data_files: str | list[str] | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.name, self.split, self.text_key = path, name, split, text_key
        self.data_files, self.revision = data_files, revision

    @property
    def n_documents(self) -> int:
        """Rows of the split."""
        return len(self._table)

    def document(self, index: int) -> dict[str, Any]:
        """Its text; nothing where the column holds a null."""
        text = self._table[index][self.text_key]
        if text is not None and not isinstance(text, str):
            raise MmsaeError(f"row {index} of {self.path!r} holds {type(text).__name__} in {self.text_key!r}, no text.")
        return {"text": text or ""}

    @cached_property
    def _table(self) -> Any:
        datasets = needs("datasets", "HuggingFaceText", "text")
        folder = Path(self.path).expanduser()
        try:
            if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
                found = self._from_disk(datasets, folder)
            else:
                path = str(folder) if folder.exists() else self.path
                chosen: dict[str, Any] = {"data_files": self.data_files, "revision": self.revision}
                found = datasets.load_dataset(path, self.name, split=self.split, **chosen)
        except MmsaeError:
            raise
        except Exception as error:  # ConnectionError, FileNotFoundError, ValueError, the hub's own …
            raise MmsaeError(
                f"the data set {self.path!r} (name={self.name}, split={self.split!r}) cannot be loaded "
                f"({first_line(error)}); without a connection give the path of a folder written by save_to_disk."
            ) from error
        if self.text_key not in found.column_names:
            close = nearest(self.text_key, found.column_names)
            raise MmsaeError(f"the data set {self.path!r} has no column {self.text_key!r}; nearest: {close}.")
        return found.select_columns(self.text_key)

    def _from_disk(self, datasets: Any, folder: Path) -> Any:
        found = datasets.load_from_disk(str(folder))
        if not isinstance(found, dict):
            return found  # a single split
        if self.split not in found:
            raise MmsaeError(f"the data set {self.path!r} has no split {self.split!r}; it has {', '.join(found)}.")
        return found[self.split]

"""Sounds in folders."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items
from datamodules.tables import captioned, cut_groups
from mmsae.errors import MmsaeError, checked
from mmsae.sources.sound import sound_length

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"}
SHORTEST_S = 0.25  # a rest of a file that is shorter is left out


class _Part(NamedTuple):
    file: Path
    start_s: float
    length_s: float
    text: str
    labels: dict[str, int]


class AudioFolder(ActivationDataModule):
    """All sounds below a folder, or those that a table names; long ones in parts, all of a file in the same split.

    The caption of a sound is in the table, or in a .txt file of the same name. Without `labels` the name of the folder
    that a sound lies in is its label "class". With subfolders called train, val and test, and no table, those are the
    splits.

    Args:
        root: The folder.
        captions: A table (.csv, .tsv, .jsonl) with a column `file`, from `root` on, and a column `text`.
        group: Column of the table; sounds with the same value (a speaker, say) are in the same split.
        labels: Columns of the table that are labels.
        window_s: Seconds of a part; None gives files whole.
        val_share: Share of groups or files to choose latents on.
        test_share: Share of groups or files to measure on.
        split_seed: Of the cut into splits.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self,
        root: str,
        captions: str | None = None,
        group: str | None = None,
        labels: list[str] | None = None,
        window_s: float | None = 10.0,
        val_share: float = 0.1,
        test_share: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.captions, self.group, self.labels = root, captions, group, list(labels or [])
        self.window_s = window_s if window_s is None else checked("window_s", window_s, SHORTEST_S)
        self.val_share, self.test_share, self.split_seed = val_share, test_share, split_seed
        if (group or labels) and captions is None:
            raise MmsaeError("group and labels are columns of a table: give captions.")
        self._by_split: dict[Split, Dataset[dict[str, Any]]] = {}
        _ = self._lengths  # a wrong folder and damaged sounds, of any split, must be told before any model is loaded

    @property
    def factors(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """The label columns, or the folders if there is more than one."""
        return self._values

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Paths and where to begin; sources read the samples."""
        if split not in self._by_split:
            self._by_split[split] = Items([part for i in self._chosen(split) for part in self._parts(i)], self._item)
        return self._by_split[split]

    def _chosen(self, split: Split) -> list[int]:
        if self._own_splits:
            return [i for i, (path, *_) in enumerate(self._sounds) if path.relative_to(self.root).parts[0] == split]
        groups = [group for *_, group in self._sounds]
        return cut_groups(groups, split, self.val_share, self.test_share, self.split_seed)

    def _item(self, part: _Part, sample_id: int) -> dict[str, Any]:
        place = {"crop_start_s": part.start_s, "crop_s": part.length_s}
        return {"audio": str(part.file), **place, "text": part.text, "sample_id": sample_id, "labels": part.labels}

    def _parts(self, index: int) -> list[_Part]:
        path, text, values, _ = self._sounds[index]
        labels = {name: self._values[name].index(value) for name, value in values.items() if name in self._values}
        seconds = self._lengths[index]
        window = self.window_s or seconds
        starts = [i * window for i in range(max(1, int(seconds // window) + 1))]
        kept = [s for s in starts if s == 0 or seconds - s >= SHORTEST_S]
        return [_Part(path, start, min(window, seconds - start), text, labels) for start in kept]

    @cached_property
    def _lengths(self) -> list[float]:
        """Seconds of every sound, from its header; a file that is cut off is refused."""
        found = (sound_length(path) for path, *_ in self._sounds)
        return [samples / rate for samples, rate in found]

    @cached_property
    def _own_splits(self) -> bool:
        return self.captions is None and all((Path(self.root) / split).is_dir() for split in ("train", "val", "test"))

    @cached_property
    def _sounds(self) -> list[tuple[Path, str, dict[str, str], Hashable]]:
        """Path, caption, values of the labels, and group of every sound."""
        folder = Path(self.root)
        if not folder.is_dir():
            raise MmsaeError(f"data.root={self.root} is no folder: give one that holds sounds.")
        if self.captions is not None:
            asked = [*self.labels, *([self.group] if self.group else [])]
            rows = captioned(self.captions, self.root, asked)
            return [
                (row.file, row.text, dict(zip(self.labels, row.more, strict=False)), row.more[-1])
                if self.group
                else (row.file, row.text, dict(zip(self.labels, row.more, strict=True)), str(row.file))
                for row in rows
            ]
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise MmsaeError(f"data.root={self.root} holds no sounds ({', '.join(sorted(SUFFIXES))}).")
        return [(path, _written(path), self._folder_of(path), str(path)) for path in files]

    def _folder_of(self, path: Path) -> dict[str, str]:
        folder = path.parent.relative_to(self.root)
        if self._own_splits and len(folder.parts) < 2:  # directly in the folder of a split
            return {}
        return {"class": path.parent.name}

    @cached_property
    def _values(self) -> dict[str, tuple[str, ...]]:
        names = self.labels or ["class"]
        found = {name: {values[name] for *_, values, _ in self._sounds if name in values} for name in names}
        return {name: tuple(sorted(values)) for name, values in found.items() if self.labels or len(values) > 1}


def _written(path: Path) -> str:
    """The caption in the text file of the same name, if there is one."""
    beside = path.with_suffix(".txt")
    return beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""

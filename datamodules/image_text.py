"""Pictures with captions: tables and shards."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from array import array
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items
from datamodules.tables import TABLES, TEXT_COLUMNS, Captioned, captioned, cut_groups
from mmsae.errors import MmsaeError

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class ImageText(ActivationDataModule):
    """Pictures with captions, from a table of files or from tar shards in the layout of webdataset.

    A table (.csv, .tsv, .jsonl) has a column `file` (or `image`, `path`, `file_name`) and a column `text` (or
    `caption`). In shards, members with the same name up to the first dot belong together: a .jpg or .png, and a .txt,
    or a .json with `text` or `caption`; only their places are kept in memory, 48 bytes a pair. All captions of a
    picture are in the same split; shards are split by a hash of the key, so the same key is never on both sides.

    Args:
        path: The table; a .tar file; or a folder of .tar files.
        root: Folder that the names in a table start from; None is the table's own.
        labels: Columns of the table that are labels.
        val_share: Share of pictures to choose latents on.
        test_share: Share of pictures to measure on.
        split_seed: Of the cut into splits.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        labels: list[str] | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.root, self.labels = path, root, list(labels or [])
        self.val_share, self.test_share, self.split_seed = val_share, test_share, split_seed
        self._by_split: dict[Split, Dataset[dict[str, Any]]] = {}
        if not 0 <= val_share + test_share < 1:
            raise MmsaeError(f"val_share={val_share} and test_share={test_share} leave nothing to train on.")
        if self._is_table:
            _ = self._rows  # a wrong table must be told before any model is loaded
        elif self.labels or root is not None:
            raise MmsaeError("root and labels belong to a table: shards carry everything themselves.")
        else:
            _ = self._shards

    @property
    def factors(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """The values of the label columns."""
        if not self.labels:
            return {}
        return {name: tuple(sorted({row.more[i] for row in self._rows})) for i, name in enumerate(self.labels)}

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Pictures and captions."""
        if split not in self._by_split:  # every shard is looked through
            self._by_split[split] = self._listed(split) if self._is_table else self._found(split)
        return self._by_split[split]

    def _found(self, split: Split) -> Shards:
        return Shards(self._shards, split, self.val_share, self.test_share, self.split_seed)

    def _listed(self, split: Split) -> Items:
        groups = [str(row.file) for row in self._rows]
        chosen = cut_groups(groups, split, self.val_share, self.test_share, self.split_seed)
        values = self.factors

        def make(index: int, sample_id: int) -> dict[str, Any]:
            row = self._rows[index]
            if not row.text.strip():
                raise MmsaeError(
                    f"the picture {row.file.name!r} has no caption in {Path(self.path).name}; captions are in a column "
                    f"{', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}."
                )
            labels = {name: values[name].index(value) for name, value in zip(self.labels, row.more, strict=True)}
            return {"image": str(row.file), "text": row.text, "sample_id": sample_id, "labels": labels}

        return Items(chosen, make)

    @property
    def _is_table(self) -> bool:
        return Path(self.path).suffix.lower() in TABLES

    @cached_property
    def _rows(self) -> list[Captioned]:
        return captioned(self.path, self.root, self.labels)

    @cached_property
    def _shards(self) -> list[Path]:
        path = Path(self.path)
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise MmsaeError(
                f"data.path={self.path} is no table ({', '.join(TABLES)}), no .tar file, and no folder that holds some."
            )
        return found


class Shards(Dataset[dict[str, Any]]):
    """The pairs of a split in tar files, read where they stand.

    Args:
        paths: Of the tar files, not compressed.
        split: Which pairs: those whose key falls there.
        val_share: Share of the keys.
        test_share: Share of the keys.
        seed: Of the hash.
    """

    def __init__(self, paths: list[Path], split: Split, val_share: float, test_share: float, seed: int) -> None:
        self.paths = paths
        self.places = array("q")  # shard; offset and length of the picture and of the caption; is that JSON?
        held = val_share + test_share
        low, high = {"val": (0, val_share), "test": (val_share, held), "train": (held, 1)}[split]
        for number, path in enumerate(paths):
            for key, parts in _members(path):
                if low <= _share(key, seed) < high:
                    self.places.extend((number, *parts))

    def __len__(self) -> int:
        return len(self.places) // 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image, UnidentifiedImageError

        if not 0 <= index < len(self):
            raise IndexError(index)
        number, at, length, text_at, text_length, is_json = self.places[6 * index : 6 * index + 6]
        path = self.paths[number]
        with path.open("rb") as file:
            file.seek(at)
            content = file.read(length)
            file.seek(text_at)
            said = file.read(text_length)
        try:
            image = Image.open(io.BytesIO(content)).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise MmsaeError(f"a picture of {path.name} (byte {at}) cannot be read ({error}).") from error
        return {"image": image, "text": _caption(said, bool(is_json), path, text_at), "sample_id": index}


def _members(path: Path) -> list[tuple[str, tuple[int, int, int, int, int]]]:
    """Key, and place and length of the picture and of the caption, of every pair of a shard."""
    pairs: dict[str, dict[str, tuple[int, int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                suffix = f".{ending.rpartition('.')[2].lower()}"
                kind = "image" if suffix in PICTURES else "text" if suffix in (".txt", ".json") else None
                if kind is None:
                    continue
                known = pairs.setdefault(f"{folder}/{stem}", {})
                if kind not in known or suffix == ".txt":  # a .txt says more plainly what a .json says among others
                    known[kind] = (member.offset_data, member.size, int(suffix == ".json"))
            end = path.stat().st_size
            if any(at + length > end for pair in pairs.values() for at, length, _ in pair.values()):
                raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        raise MmsaeError(
            f"the shard {str(path)!r} cannot be read ({error}): it is cut off, compressed or no tar file."
        ) from error
    if lonely := [key for key, pair in pairs.items() if len(pair) < 2]:
        has = "picture" if "image" in pairs[lonely[0]] else "caption"
        raise MmsaeError(f"{lonely[0].lstrip('/')!r} in {path.name} has a {has} only; {len(lonely)} such keys.")
    if not pairs:
        raise MmsaeError(f"the shard {str(path)!r} holds no pictures ({', '.join(PICTURES)}) with captions.")
    return [(key, (*pair["image"][:2], *pair["text"])) for key, pair in pairs.items()]


def _share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=6).digest(), "big") / 2**48


def _caption(said: bytes, is_json: bool, path: Path, at: int) -> str:
    text: Any = said.decode("utf-8", errors="replace").strip()
    if is_json:
        try:
            found = json.loads(said)
        except ValueError as error:
            raise MmsaeError(f"a .json of {path.name} (byte {at}) cannot be read ({error}).") from error
        text = found.get("text") or found.get("caption") if isinstance(found, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise MmsaeError(f"a caption of {path.name} (byte {at}) is empty.")
    return text

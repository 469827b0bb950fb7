"""Conversations about pictures, in files."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.dialogues import KEYS, SPEAKERS
from datamodules.splits import Items, cut
from mmsae.errors import MmsaeError, nearest

PLACEHOLDER = re.compile(r"(<image>)")
IMAGE_KEYS = ("image", "images")


class Conversations(ActivationDataModule):
    """Conversations about pictures from .jsonl files, in the two layouts that data sets have.

    A line is `{"image": PATH, "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt",
    "value": "A cat."}]}` as for LLaVA, or `{"messages": [{"role": "user", "content": [{"type": "image", "image": PATH},
    {"type": "text", "text": "What is this?"}]}, ...]}`. A conversation may have several pictures, or none. Splits are
    cut so that a picture is in one of them only. Of the files, only the place of each line is kept in memory.

    Args:
        path: A file, a folder, or a glob.
        images: Folder that paths of pictures are relative to; by default that of their file.
        val_share: Share of pictures to choose latents on.
        test_share: Share of pictures to measure on.
        split_seed: Of the cut into splits.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self,
        path: str,
        images: str | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.images = path, images
        self.val_share, self.test_share, self.split_seed = val_share, test_share, split_seed
        _ = self._files  # a wrong path must be told before any model is loaded

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Messages and the paths of their pictures."""
        groups = cut(int(self._lines[:, 2].max()) + 1, split, self.val_share, self.test_share, self.split_seed)
        lines = self._lines[np.isin(self._lines[:, 2], groups)]
        return Items(range(len(lines)), lambda index, sample_id: self._item(lines[index], sample_id))

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """As the source shows it; without one, the words."""
        if self.source is not None:
            return self.source.render(item)
        words = [f"{m['role']}: {p['text']}" for m in item["messages"] for p in m["content"] if p["type"] == "text"]
        shown = item.get("image", next(iter(item.get("images", [])), None))
        return super().render({**item, "text": " ".join(words)} | ({} if shown is None else {"image": shown}))

    def _item(self, line: np.ndarray, sample_id: int) -> dict[str, Any]:
        file, place, _ = (int(number) for number in line)
        with self._files[file].open("rb") as opened:
            opened.seek(place)
            talk = conversation_of(opened.readline(), f"{self._files[file]}, byte {place}")
        pictures = [str(self._where(file, name)) for name in talk.pictures]
        shown: dict[str, Any] = {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
        return {"messages": talk.messages, **(shown if pictures else {}), "sample_id": sample_id}

    def _where(self, file: int, name: str) -> Path:
        return (Path(self.images) if self.images else self._files[file].parent) / name  # an absolute name stays

    @cached_property
    def _files(self) -> list[Path]:
        if self.images is not None and not Path(self.images).is_dir():
            raise MmsaeError(f"data.images={self.images} is no folder: give the one that paths of pictures begin in.")
        root = Path(self.path)
        found = sorted(root.rglob("*.jsonl")) if root.is_dir() else [Path(p) for p in sorted(glob.glob(self.path))]
        files = [path for path in found if path.is_file()]
        if not files:
            raise MmsaeError(f"data.path={self.path} names no .jsonl file.")
        return files

    def lines(self) -> Iterator[Line]:
        """Every conversation as it stands in its file, of all splits, in order."""
        return (Line(self._files[file], number, line) for file, number, _, line in self._read())

    def _read(self) -> Iterator[tuple[int, int, int, bytes]]:
        """File, number from 1, first byte and content of every line that is not blank."""
        for file, path in enumerate(self._files):
            place = 0
            with path.open("rb") as opened:
                for number, line in enumerate(opened, 1):
                    if line.strip(b"\xef\xbb\xbf \r\n\t"):
                        yield file, number, place, line
                    place += len(line)

    @cached_property
    def _lines(self) -> np.ndarray:
        """File, first byte and group of every conversation, int64 `[n, 3]`; what shares a picture is one group.

        Every line is checked, and that its pictures exist.
        """
        lines, group_of, parent = [], {}, []  # type: ignore[var-annotated]

        def root(group: int) -> int:
            while parent[group] != group:
                parent[group] = parent[parent[group]]
                group = parent[group]
            return group

        for number, line_number, place, line in self._read():
            where = f"{self._files[number]}, line {line_number}"
            own = len(parent)
            parent.append(own)
            for name in conversation_of(line, where).pictures:
                picture = self._where(number, name)
                if picture not in group_of and not picture.is_file():
                    raise MmsaeError(f"{where}: there is no picture {str(picture)!r}.")
                parent[root(own)] = root(group_of.setdefault(picture, own))
            lines.append((number, place, own))
        if not lines:
            raise MmsaeError(f"data.path={self.path} holds no conversation.")
        found = np.array(lines, np.int64)
        _, found[:, 2] = np.unique([root(int(own)) for own in found[:, 2]], return_inverse=True)
        return found


class Line(NamedTuple):
    """A conversation as it stands in a file.

    Attributes:
        file: The file.
        number: Of the line, from 1.
        data: Its bytes, with the end of line if there is one.
    """

    file: Path
    number: int
    data: bytes


class Conversation(NamedTuple):
    """A line of such a file.

    Attributes:
        messages: Each with a `role` and a `content` of parts of type image and text.
        pictures: Paths, in the order of the image parts.
    """

    messages: list[dict[str, Any]]
    pictures: list[str]


def conversation_of(line: bytes, where: str) -> Conversation:
    """The conversation of a line of JSON; MmsaeError that says `where` something is wrong."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # of the encoding as well
        raise MmsaeError(f"{where}: this is no JSON ({error}).") from error
    found = next((row[key] for key in KEYS if key in row), None) if isinstance(row, dict) else None
    if not isinstance(found, list) or not found:
        raise MmsaeError(f"{where}: there is no list of messages under {', '.join(map(repr, KEYS[:-1]))}.")
    given: Any = next((row[key] for key in IMAGE_KEYS if row.get(key)), [])
    left = [_path(name, where) for name in (given if isinstance(given, list) else [given])]
    messages, pictures = [], []
    for number, message in enumerate(found, 1):
        role, parts = _parts(message, f"{where}, message {number}")
        content = []
        for part in parts:
            if part["type"] == "image":
                name = part.get("image", part.get("path"))
                if name is None and not left:
                    raise MmsaeError(f"{where}, message {number}: there is an <image> but no picture for it.")
                pictures.append(left.pop(0) if name is None else _path(name, where))
                part = {"type": "image"}
            content.append(part)
        messages.append({"role": role, "content": content})
    if left:
        raise MmsaeError(f"{where}: the picture {left[0]!r} has no <image> in the messages.")
    return Conversation(messages, pictures)


def _parts(message: Any, where: str) -> tuple[str, list[dict[str, Any]]]:
    """Role and parts of a message, whichever layout it has."""
    if not isinstance(message, dict):
        raise MmsaeError(f"{where}: {message!r} is no message with a role and a content.")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in SPEAKERS:
        raise MmsaeError(f"{where}: role {role!r} is unknown; nearest: {nearest(str(role), SPEAKERS)}.")
    if isinstance(content, str):
        pieces = [piece.strip() for piece in PLACEHOLDER.split(content)]
        content = [{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in pieces if p]
    if not isinstance(content, list) or not content:
        raise MmsaeError(f"{where}: there is nothing in 'content' (or 'value'); leave such conversations out.")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise MmsaeError(f"{where}: {part!r} is neither a part of type text nor one of type image.")
    return SPEAKERS[role], content


def _path(name: Any, where: str) -> str:
    if not isinstance(name, str) or "://" in name:
        raise MmsaeError(f"{where}: {name!r} is no path of a picture; download it and give its path.")
    return name

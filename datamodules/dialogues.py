"""Dialogues in files."""

from __future__ import annotations

import glob
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.documents import Documents
from mmsae.errors import MmsaeError, nearest
from mmsae.sources.chat import ROLES, Message

KEYS = ("messages", "conversations", "conversation")
SPEAKERS = {
    **{role: role for role in ROLES[1:]}, "human": "user", "gpt": "assistant", "model": "assistant",
    "developer": "system", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Names of speakers in common data sets to roles."""


class Dialogues(Documents):
    """Dialogues from .jsonl files, rendered by the chat template of the model (FAST, arXiv 2506.07691).

    A line is `{"messages": [{"role": "user", "content": "..."}, ...]}` or
    `{"conversations": [{"from": "human", "value": "..."}, ...]}`. `arrangement=sequential` gives every dialogue to the
    model by itself, from its first token on, as FAST does; `arrangement=blocks` joins them and cuts blocks of
    `block_len` tokens, the baseline BT(F). Splits are cut by dialogue. Only the place of each line is kept in memory.

    Rows carry `role`, an index into `roles`, and `document`.

    Args:
        path: A file, a folder, or a glob.
        **kwargs: See `Documents` and `ActivationDataModule`.
    """

    roles = ROLES
    """Names of the values of the column `role`."""

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = path
        _ = self._files if self.source is None else self._places  # a broken line is told before a model is loaded

    @property
    def n_documents(self) -> int:
        """Number of dialogues."""
        return len(self._places)

    def document(self, index: int) -> dict[str, Any]:
        """Its messages."""
        file, place = self._places[index]
        with self._files[file].open("rb") as opened:
            opened.seek(place)
            return {"messages": messages_of(opened.readline(), f"{self._files[file]}, byte {place}")}

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The tokens that the model reads; without a model, the words."""
        if self.source is None and "messages" in item:
            said = [f"{message['role']}: {message['content']}" for message in item["messages"]]
            return {"kind": "text", "tokens": [word + " " for line in said for word in line.split()]}
        return super().render(item)

    @cached_property
    def _files(self) -> list[Path]:
        root = Path(self.path)
        found = sorted(root.rglob("*.jsonl")) if root.is_dir() else [Path(p) for p in sorted(glob.glob(self.path))]
        files = [path for path in found if path.is_file()]
        if not files:
            raise MmsaeError(f"data.path={self.path} names no .jsonl file.")
        return files

    @cached_property
    def _places(self) -> np.ndarray:
        """File and first byte of every dialogue, int64 `[n, 2]`; every line is checked."""
        places = []
        for number, path in enumerate(self._files):
            place = 0
            with path.open("rb") as opened:
                for line_number, line in enumerate(opened, 1):
                    if line.strip(b"\xef\xbb\xbf \r\n\t"):
                        messages_of(line, f"{path}, line {line_number}")
                        places.append((number, place))
                    place += len(line)
        if not places:
            raise MmsaeError(f"data.path={self.path} holds no dialogue.")
        return np.array(places, np.int64)


def messages_of(line: bytes, where: str) -> list[Message]:
    """The messages of a line of JSON; MmsaeError that says `where` something is missing."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # of the encoding as well
        raise MmsaeError(f"{where}: this is no JSON ({error}).") from error
    found = next((row[key] for key in KEYS if key in row), None) if isinstance(row, dict) else None
    if not isinstance(found, list) or not found:
        raise MmsaeError(f"{where}: there is no list of messages under {', '.join(map(repr, KEYS[:-1]))}.")
    return [_message(message, f"{where}, message {i}") for i, message in enumerate(found, 1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise MmsaeError(f"{where}: {message!r} is no message with a role and a content.")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not role:
        raise MmsaeError(f"{where}: there is no 'role' (or 'from').")
    if not isinstance(role, str) or role not in SPEAKERS:
        raise MmsaeError(f"{where}: role {role!r} is unknown; nearest: {nearest(str(role), SPEAKERS)}.")
    if not isinstance(content, str) or not content.strip():
        raise MmsaeError(f"{where}: there is no text in 'content' (or 'value'); leave such dialogues out.")
    return {"role": SPEAKERS[role], "content": content}

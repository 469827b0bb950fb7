"""Conversations about pictures as a model reads them: their parts, and whose words every token holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmsae.errors import MmsaeError
from mmsae.sources.chat import ROLES, rendered
from mmsae.sources.items import picture

MARKS = ("\ue000", "\ue001")
"""Begin and end of a part, for private use in Unicode."""

Span = tuple[int, int, int]
"""Start, end and role (an index into `ROLES`) of a part in a text."""


def conversation_of(item: dict[str, Any], prompt: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages whose contents are parts, and the pictures in their order.

    Args:
        item: With `messages`; or with pictures and an optional `text`, the answer to the prompt; or with a `text`.
        prompt: What pictures without messages are sent with.

    Raises:
        MmsaeError: Pictures and parts of type image do not belong to one another, or a picture cannot be read.
    """
    which = item.get("sample_id")
    given = item.get("images") or ([item["image"]] if item.get("image") is not None else [])
    messages = item.get("messages")
    if messages is None:
        messages = _messages(item, given, prompt)
    left, images, found = list(given), [], []
    for message in messages:
        content = message["content"]
        parts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "image":
                own = part.get("image", part.get("path"))
                if own is None and not left:
                    raise MmsaeError(f"item {which} speaks of more pictures than it has.")
                images.append(picture({"sample_id": which, "image": left.pop(0) if own is None else own}))
                parts.append({"type": "image"})
            elif part.get("type") == "text":
                parts.append({"type": "text", "text": str(part["text"]).strip()})
            else:
                raise MmsaeError(f"item {which} has a part of type {part.get('type')!r}; there are image and text.")
        found.append({"role": message["role"], "content": parts})
    if left:
        raise MmsaeError(f"item {which} has a picture that its messages do not speak of.")
    return found, images


def _messages(item: dict[str, Any], given: Sequence[Any], prompt: str) -> list[dict[str, Any]]:
    text = str(item.get("text") or "").strip()
    if not given and not text:
        raise MmsaeError(f"item {item.get('sample_id')} has neither 'messages' nor an 'image' nor a 'text'.")
    parts = [*({"type": "image"} for _ in given), {"type": "text", "text": prompt if given else text}]
    asked: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if given and text:
        asked.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
    return asked


def spans_of(processor: Any, messages: list[dict[str, Any]], template: str | None) -> tuple[str, list[Span] | None]:
    """The text that the template makes, and where in it the parts of text are; None where it changes them.

    The template is rendered once more with marks around the parts, which are then taken out again.
    """
    text = rendered(processor, messages, template)  # type: ignore[arg-type]
    roles, marked = [], []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                roles.append(ROLES.index(message["role"]) if message["role"] in ROLES else 0)
                part = {**part, "text": MARKS[0] + part["text"] + MARKS[1]}
            parts.append(part)
        marked.append({**message, "content": parts})
    plain, places, start = "", [], 0
    for piece in rendered(processor, marked, template).split(MARKS[0]):  # type: ignore[arg-type]
        inside, mark, after = piece.partition(MARKS[1])
        if mark:
            places.append((start, start + len(inside)))
        plain += inside + after
        start = len(plain)
    if plain != text or len(places) != len(roles):  # it treats contents by what they are
        return text, None
    return text, [(start, end, role) for (start, end), role in zip(places, roles, strict=True)]


def roles_of(offsets: Tensor, mask: Tensor, spans: list[Span] | None, replaced: Sequence[dict[str, Any]]) -> Tensor:
    """Whose words every token holds, int64 `[T]`; -1 where that is unknown.

    Args:
        offsets: Of the tokens in the text whose image placeholders are expanded, `[T, 2]`.
        mask: Which tokens are not padding, `[T]`.
        spans: Of the parts in the text before that.
        replaced: What was expanded: spans before and after.
    """
    if spans is None:
        return torch.full(mask.shape, -1)
    first, last = offsets[:, 0], offsets[:, 1]
    roles = torch.zeros(mask.shape, dtype=torch.int64)
    for start, end, role in spans:
        before = [change for change in replaced if change["span"][1] <= start]
        longer = sum(c["new_span"][1] - c["new_span"][0] - c["span"][1] + c["span"][0] for c in before)
        roles[(first < end + longer) & (last > start + longer)] = role
    for change in replaced:  # pictures are part of a question
        start, end = change["new_span"]
        roles[(first >= start) & (last <= end) & (last > first)] = ROLES.index("user")
    return roles.masked_fill(mask == 0, -1)


def said(messages: list[dict[str, Any]]) -> str:
    """The words of a conversation on one line."""
    return " / ".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")

"""Dialogues as an instruct model reads them: rendered by its chat template, with the speaker of every token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsae.errors import MmsaeError
from mmsae.sources.tokens import Coded
from mmsae.sources.weights import first_line

ROLES = ("template", "system", "user", "assistant", "tool")
"""Whose words a token holds; the index is what the column `role` has. What no message says is the template's."""

Message = dict[str, str]
"""`role`, one of `ROLES` but the first, and `content`."""


def coded_dialogue(tokenizer: Any, messages: Sequence[Message], template: str | None = None) -> Coded:
    """Tokens of a dialogue.

    Args:
        tokenizer: Of transformers, a fast one: it has to say where its tokens stand in the text.
        messages: In their order.
        template: Jinja template, instead of the tokenizer's.

    Returns:
        Tokens with the column `role`, an index into `ROLES`.

    Raises:
        MmsaeError: There is no template, it refuses the dialogue, or the tokenizer is not a fast one.
    """
    text = rendered(tokenizer, messages, template)
    if not getattr(tokenizer, "is_fast", False):
        raise MmsaeError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the text; give a folder with a "
            "tokenizer.json."
        )
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)  # the template has put them
    speaker = bytearray(len(text))
    for role, start, end in words_of(tokenizer, messages, text, template):
        speaker[start:end] = bytes([ROLES.index(role)]) * (end - start)
    offsets = coded["offset_mapping"]
    roles = [max(speaker[start:end], default=0) for start, end in offsets]
    return Coded(coded["input_ids"], {"role": roles}, text, offsets)


def rendered(tokenizer: Any, messages: Sequence[Message], template: str | None = None, answer: bool = False) -> str:
    """The text that the model reads; with `answer` up to where its own answer begins."""
    if template is None and not tokenizer.chat_template:
        raise MmsaeError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; give the source chat_template=, a Jinja "
            "template or a file that holds one."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, chat_template=template, add_generation_prompt=answer
        )
    except Exception as error:  # of jinja2, or whatever a template raises
        raise MmsaeError(f"the chat template refuses a dialogue ({first_line(error)}).") from error


def words_of(
    tokenizer: Any, messages: Sequence[Message], text: str, template: str | None = None
) -> list[tuple[str, int, int]]:
    """Where the words of each message stand in the rendered text: role, start, end.

    The template is rendered again with a mark in place of every content. What it writes around the marks leads through
    the text; so it does not matter that a template strips contents, moves the system message or adds one of its own.
    """
    marked = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
    parts = re.split("\ue000(\\d+)\ue001", rendered(tokenizer, marked, template))
    found, cursor = [], 0
    for before, number, after in zip(parts[::2], parts[1::2], parts[2::2], strict=False):
        role, content = messages[int(number)]["role"], messages[int(number)]["content"]
        start = text.find(before, cursor)
        if start < 0:  # what stands around this message depends on its words, as with "<think>" in some templates
            start, end = text.find(content.strip(), cursor), -1
            if start < 0:
                continue
            end = start + len(content.strip())
        else:
            start += len(before)
            same = next((c for c in (content, content.strip()) if text.startswith(c + after, start)), None)
            end = start + len(same) if same is not None else text.find(after, start)
            if end < 0:  # the same, for the message after this one
                end = start + len(content.strip()) if text.startswith(content.strip(), start) else start
        found.append((role, start, end))
        cursor = end
    return found


def template_of(given: str | None) -> str | None:
    """The template in a file, or the given one; MmsaeError if it is neither."""
    if given is None or "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise MmsaeError(f"chat_template={given!r} is neither a Jinja template nor a file with one.")
    return path.read_text(encoding="utf-8")

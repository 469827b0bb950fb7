"""Tokens as a reader wants to see them."""

from __future__ import annotations

from typing import Any


def readable(tokenizer: Any, ids: list[int], text: str | None = None) -> list[str]:
    """One string per token; joined, those of a text give the text again.

    Args:
        tokenizer: Of transformers.
        ids: Of the tokens.
        text: Where the ids come from. Without it the tokens are decoded one by one.
    """
    if text is not None and getattr(tokenizer, "is_fast", False):
        coded = tokenizer(text, return_offsets_mapping=True)
        shift = len(ids) - len(coded["input_ids"]) if len(ids) > len(coded["input_ids"]) else 0
        shift = shift or int(ids[1:2] == coded["input_ids"][:1] and ids[:1] != coded["input_ids"][:1])  # a BOS of ours
        if ids[shift:] == coded["input_ids"][: len(ids) - shift]:
            cut = _slices(tokenizer, text, ids[shift:], coded["offset_mapping"])
            return [*(_single(tokenizer, i) for i in ids[:shift]), *cut]
    return [_single(tokenizer, i) for i in ids]


def _slices(tokenizer: Any, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> list[str]:
    """Pieces of the text itself: no byte marker, no replaced space, nothing that a decoder strips."""
    pieces, done = [], 0
    for index, (_, end) in zip(ids, offsets, strict=False):
        if index in tokenizer.all_special_ids:
            pieces.append(tokenizer.convert_ids_to_tokens(index))
        elif end > done:
            pieces.append(text[done:end])
        else:
            pieces.append("")  # a further byte of the character before it
        done = max(done, end)
    return pieces


def _single(tokenizer: Any, index: int) -> str:
    token = str(tokenizer.convert_ids_to_tokens(index))
    if index in tokenizer.all_special_ids:
        return token
    if "▁" in token:
        return token.replace("▁", " ")
    return tokenizer.decode([index])

"""The tokens of an item, and how a reader wants to see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Coded(NamedTuple):
    """What a model reads of an item.

    Attributes:
        ids: Of the tokens.
        columns: Name of a column to one whole number per token.
        text: Where the tokens come from, if that is known.
        offsets: Where each token stands in the text, if the tokenizer says so.
    """

    ids: Sequence[int]
    columns: Mapping[str, Sequence[int]] = {}
    text: str | None = None
    offsets: Sequence[tuple[int, int]] | None = None


def special_tokens(tokenizer: Any) -> set[int]:
    """Ids that are no words: start, end, and every token added as special (headers of a chat); not the unknown word."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def readable(tokenizer: Any, coded: Coded) -> list[str]:
    """One string per token; joined, those of a text give the text again.

    Args:
        tokenizer: Of transformers.
        coded: Tokens; without a text and offsets they are decoded one by one.
    """
    special = special_tokens(tokenizer)
    ids, text, offsets = coded.ids, coded.text, coded.offsets
    if text is None or offsets is None:
        return [_single(tokenizer, index, special) for index in ids]
    # pieces of the text itself: no byte marker, no replaced space, nothing that a decoder strips
    pieces, done = [], 0
    for index, (_, end) in zip(ids, offsets, strict=True):
        if index in special:
            pieces.append(str(tokenizer.convert_ids_to_tokens(index)))
        else:
            pieces.append(text[done:end])  # empty for a further byte of the character before it
        done = max(done, end)
    return pieces


def _single(tokenizer: Any, index: int, special: set[int]) -> str:
    token = str(tokenizer.convert_ids_to_tokens(index))
    if index in special:
        return token
    if "▁" in token:
        return token.replace("▁", " ")
    return tokenizer.decode([index])

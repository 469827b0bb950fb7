"""Texts that models of transformers write: prompts of equal length together, so that no padding is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmsae.errors import MmsaeError, checked


def asked(messages: Sequence[dict[str, Any]], which: Any) -> list[dict[str, Any]]:
    """A dialogue without the answers at its end: what the model shall answer."""
    kept = list(messages)
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    if not kept:
        raise MmsaeError(f"item {which} holds nothing but answers; there is nothing to answer.")
    return kept


def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    inputs: Callable[[list[int]], dict[str, Tensor]] | None = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Continue prompts.

    Args:
        model: With `generate`; a KV cache is used.
        prompts: Token ids of each.
        tokenizer: That of the model.
        inputs: Numbers of some prompts to what else the model needs for them (pictures).
        max_new_tokens: At most so many; a text may end before.
        temperature: 0 takes the likeliest token, 1 samples from the model's own distribution.
        seed: Of the sampling.

    Returns:
        For each prompt `text`, what was written, without special tokens; `input_ids`, prompt and continuation up to and
        with the end token; and `prompt_length`, how many of them are the prompt.
    """
    checked("max_new_tokens", max_new_tokens, 1)
    checked("temperature", temperature, 0)
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    fill = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    device = next(model.parameters()).device
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    found: list[dict[str, Any]] = [{} for _ in prompts]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for length, rows in sorted(by_length.items()):
            ids = torch.tensor([list(prompts[i]) for i in rows], device=device)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **(inputs(rows) if inputs else {})}
            out = model.generate(**given, max_new_tokens=max_new_tokens, pad_token_id=fill, **sampling)
            for i, row in zip(rows, out[:, length:].tolist(), strict=True):
                stop = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
                text = tokenizer.decode(row[:stop], skip_special_tokens=True)
                found[i] = {"text": text, "input_ids": [*prompts[i], *row[:stop]], "prompt_length": length}
    return found

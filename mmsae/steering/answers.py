"""What a multimodal model says to items."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tqdm.auto import tqdm

from mmsae.sources.image_chat import conversation_of
from mmsae.sources.lmm import VisionLanguage
from mmsae.steering.second_pass import SecondPass


@torch.no_grad()
def answers(
    source: VisionLanguage,
    items: Sequence[dict[str, Any]],
    max_new_tokens: int = 16,
    processor: SecondPass | None = None,
    batch_size: int = 32,
    **generation: Any,
) -> list[str]:
    """The model's own answer to each item; an answer that the item ends with is left out.

    Args:
        source: The model, its processor and its chat template.
        items: As `VisionLanguage` takes them.
        max_new_tokens: Longest answer.
        processor: Decides from two passes.
        batch_size: Items at a time.
        generation: More arguments for `generate`; greedy by default.
    """
    found: list[str] = []
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation}
    settings.setdefault("pad_token_id", source.tokenizer.pad_token_id)
    model: Any = source.model
    for start in tqdm(range(0, len(items), batch_size), desc="answering", leave=False, disable=None):
        inputs = prompts(source, [items[i] for i in range(start, min(start + batch_size, len(items)))])
        moved = {
            name: value.to(source.placed, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        with ExitStack() as stack:
            if processor is not None:
                stack.enter_context(processor.watching(moved))
                settings["logits_processor"] = [processor]
            said = model.generate(**moved, **settings)[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in source.tokenizer.batch_decode(said, skip_special_tokens=True)]
    return found


def prompts(source: VisionLanguage, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Inputs of the model for the conversations up to the answer, padded on the left."""
    texts, images = [], []
    for item in items:
        asked = {key: value for key, value in item.items() if key != "text" or "image" not in item}
        messages, pictures = conversation_of(asked, source.prompt)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        template = {"chat_template": source.template} if source.template else {}
        text = source.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
        texts.append(text)
        images.append(pictures)
    bos = source.tokenizer.bos_token
    given = images if all(images) else [image for one in images for image in one]
    return dict(
        source.processor(
            text=texts,
            images=given or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
        )
    )

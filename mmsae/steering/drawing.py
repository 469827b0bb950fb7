"""Pictures of a diffusion pipeline with and without interventions, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmsae.errors import MmsaeError, checked
from mmsae.sources.diffusion import Diffusion
from mmsae.steering.context import Context
from mmsae.steering.intervene import Intervention, intervene
from mmsae.steering.where import Where

Item = dict[str, Any]


def items_of(prompts: Sequence[str | int]) -> list[Item]:
    """Items of prompts, or of numbers of classes (DiT)."""
    return [
        {"sample_id": i, "class_label": p, "text": str(p)} if isinstance(p, int) else {"sample_id": i, "text": p}
        for i, p in enumerate(prompts)
    ]


def draw(
    source: Diffusion,
    items: Sequence[Item] | Sequence[str],
    seeds: Sequence[int],
    interventions: Sequence[Intervention] = (),
    batch_size: int = 16,
) -> Tensor:
    """Draw one picture for each item; the same seed is the same noise, whatever is steered.

    Args:
        source: With `mode="generate"`; its `steps`, `guidance_scale` and `size` hold.
        items: Prompts, or items as the source reads them.
        seeds: One for each item, of `torch.Generator`: the one that diffusers would be given.
        interventions: What is done meanwhile.
        batch_size: Pictures at a time. Bits are the same only at the same batch size.

    Returns:
        `[n, 3, H, W]` in 0..1, on the CPU.
    """
    chosen = items_of([str(i) for i in items]) if items and isinstance(items[0], str) else list(items)  # type: ignore[arg-type]
    if not chosen or len(chosen) != len(seeds):
        raise MmsaeError(f"{len(chosen)} prompts and {len(seeds)} seeds: give one seed for each picture.")
    checked("batch_size", batch_size, 1)
    drawn = []
    for first in range(0, len(chosen), batch_size):
        batch = source.collate(chosen[first : first + batch_size])  # type: ignore[arg-type]
        batch["noise_seed"] = torch.tensor(list(seeds[first : first + batch_size]))
        if interventions:
            with intervene(source, interventions):
                drawn.append(source.draw(batch))
        else:
            drawn.append(source.draw(batch))
    return torch.cat(drawn)


def over(items: Sequence[Item], seeds: Sequence[int]) -> tuple[list[Item], list[int]]:
    """Every item with every seed, items outermost."""
    pairs = [(item, seed) for item in items for seed in seeds]
    return [item for item, _ in pairs], [seed for _, seed in pairs]


class Content(Where):
    """Words of a prompt, without start, end and padding: where the text encoder of a diffusion model is steered.

    The position in front of all words has a norm that dwarfs the others; and an empty prompt, the other half of
    guidance, has no words, so it is left as it is.

    Args:
        special: Ids of the tokens that are no words.
    """

    def __init__(self, special: Sequence[int]) -> None:
        self.special = sorted({int(i) for i in special})

    @classmethod
    def of(cls, source: Diffusion) -> Content:
        """Those of the tokenizer that the source's text encoder has."""
        return cls(source.special_ids)

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        return ~torch.isin(context.token_ids, torch.tensor(self.special, device=context.device))

"""Pictures of a diffusion pipeline with and without interventions, from the same noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmsae.errors import MmsaeError, checked
from mmsae.hooks import edit
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
    inside: Tensor | None = None,
) -> Tensor:
    """Draw one picture for each item; the same seed is the same noise, whatever is steered.

    Args:
        source: With `mode="generate"`; its `steps`, `guidance_scale` and `size` hold.
        items: Prompts, or items as the source reads them.
        seeds: One for each item, of `torch.Generator`: the one that diffusers would be given.
        interventions: What is done meanwhile.
        batch_size: Pictures at a time. Bits are the same only at the same batch size.
        inside: `[H, W]` of any size in 0..1. An edit of some positions changes the rest of the picture, too, through
            normalisations, attention and the sampler; with this mask the prediction of every step is that of the
            steered model inside and that of the unsteered one, drawn first, outside.

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
        if not interventions:
            drawn.append(source.draw(batch))
            continue
        with ExitStack() as stack:
            if inside is not None:
                stack.enter_context(_kept_outside(source, batch, inside))
            stack.enter_context(intervene(source, interventions))
            drawn.append(source.draw(batch))
    return torch.cat(drawn)


@contextmanager
def _kept_outside(source: Diffusion, batch: dict[str, Any], inside: Tensor) -> Iterator[None]:
    """Draw once to learn the predictions of every step; then put them in place of new ones outside of the mask."""
    network = source.denoiser
    known: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        known.append(tensor.clone())
        return tensor

    with edit(network, {":output": remember}):
        source.draw(batch)
    steps = iter(known)

    def blend(tensor: Tensor) -> Tensor:
        return torch.lerp(next(steps), tensor, _on_grid(inside, tensor))

    with edit(network, {":output": blend}):
        yield


def _on_grid(mask: Tensor, tensor: Tensor) -> Tensor:
    """A mask as weights of a prediction `[B, C, H, W]`, or `[B, T, C]` of a square of patches."""
    if tensor.dim() == 4:
        side, shape = (tensor.shape[-2], tensor.shape[-1]), (1, 1, tensor.shape[-2], tensor.shape[-1])
    else:
        edge = math.isqrt(tensor.shape[1])
        if edge * edge != tensor.shape[1]:
            raise MmsaeError(f"{tensor.shape[1]} patches are no square: a mask needs a square picture.")
        side, shape = (edge, edge), (1, edge * edge, 1)  # type: ignore[assignment]
    return interpolate(mask.float()[None, None], size=side, mode="area").reshape(shape).to(tensor)


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
        tail: Also what stands behind the words of a prompt, its end and its padding: they have read all words, and
            the denoiser reads them.
    """

    def __init__(self, special: Sequence[int], tail: bool = False) -> None:
        self.special, self.tail = sorted({int(i) for i in special}), tail

    @classmethod
    def of(cls, source: Diffusion, tail: bool = False) -> Content:
        """Those of the tokenizer that the source's text encoder has."""
        return cls(source.special_ids, tail)

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        words = ~torch.isin(context.token_ids, torch.tensor(self.special, device=context.device))
        return words if not self.tail else words.long().cumsum(1) > 0

"""A second forward pass at every step of `generate`, and what is decided from both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.errors import MmsaeError, checked


class SecondPass(ABC):
    """A logits processor of transformers that runs the model once more on the very inputs of each step.

        with processor.watching(inputs):
            model.generate(**inputs, logits_processor=[processor], do_sample=False)

    With `use_cache=True` a step has one new token, and the second pass sees the keys and values that the first pass
    left for earlier ones; with `use_cache=False` the whole sequence runs again, and what the second pass changes, it
    changes everywhere. Beam search is refused: it reorders what is remembered between steps.

    Args:
        model: The model that generates.
        weight: Of the second pass: `(1 - weight) * first + weight * second`, in logits.
        plausible: Tokens whose logit in the first pass is below the largest one plus the logarithm of this are ruled
            out; 0 rules out none.
    """

    def __init__(self, model: nn.Module, weight: float, plausible: float) -> None:
        self.model = model
        self.weight, self.plausible = weight, checked("plausible", plausible, 0, 1)
        self.prompt: Mapping[str, Any] = {}
        """What `generate` was called with."""
        self.inputs: dict[str, Any] = {}
        """What the first pass of a step was called with."""
        self._before = 0  # tokens in the cache before the step
        self._second = False

    @contextmanager
    def watching(self, prompt: Mapping[str, Any]) -> Iterator[None]:
        """Remember what the model is called with; hooks are removed at the end.

        Args:
            prompt: The tensors that `generate` gets, by name.
        """
        self.prompt = prompt
        handle = self.model.register_forward_pre_hook(self._remember, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self.prompt, self.inputs = {}, {}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits of the next token `[B, vocabulary]` from both passes."""
        if not self.inputs:
            raise MmsaeError(f"{type(self).__name__} has not seen the first pass: generate inside its `watching()`.")
        if len(input_ids) != len(self.prompt["input_ids"]):
            raise MmsaeError("a second pass needs one sequence for each item: generate with num_beams=1.")
        second = self.logits(input_ids).to(scores)
        joined = (1 - self.weight) * scores + self.weight * second
        if self.plausible:
            lowest = scores.amax(-1, keepdim=True) + math.log(self.plausible)
            joined = joined.masked_fill(scores < lowest, -torch.inf)
        return joined

    @abstractmethod
    def logits(self, input_ids: Tensor) -> Tensor:
        """Of the next token, in the second pass `[B, vocabulary]`.

        Args:
            input_ids: The sequences so far `[B, T]`.
        """

    def attended(self, input_ids: Tensor) -> Tensor:
        """Which positions are not padding, bool `[B, T]`."""
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        if (given := self.prompt.get("attention_mask")) is not None:
            mask[:, : given.shape[1]] = given.bool()
        return mask

    @property
    def cache(self) -> Any:
        """Keys and values of earlier tokens; None without a cache. Versions of transformers name it differently."""
        return next((v for v in self.inputs.values() if hasattr(v, "get_seq_length")), None)

    def again(self, without: tuple[str, ...] = (), **changed: Any) -> Tensor:
        """Logits of the next token on the inputs of the first pass; the cache is left as it was.

        Args:
            without: Inputs to leave out.
            changed: Inputs to replace or to add.
        """
        given = {name: value for name, value in {**self.inputs, **changed}.items() if name not in without}
        cache = self.cache
        layers = getattr(cache, "layers", [])
        kept = [dict(vars(layer)) for layer in layers]
        self._second = True
        try:
            if cache is not None and self._before == 0:
                given = {name: type(cache)() if value is cache else value for name, value in given.items()}
            elif cache is not None:
                cache.crop(self._before - cache.get_seq_length())
            return self.model(**given).logits[:, -1]
        finally:
            self._second = False
            for layer, state in zip(layers, kept, strict=True):
                vars(layer).update(state)

    def _remember(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._second:
            return
        self.inputs = dict(kwargs)
        cache = self.cache
        if cache is not None and type(cache).__name__ != "DynamicCache":
            raise MmsaeError(
                f"a second pass cannot go back in a {type(cache).__name__}: generate with use_cache=False."
            )
        self._before = 0 if cache is None else cache.get_seq_length()


class NoisedContrast(SecondPass):
    """Visual contrastive decoding: `(1 + a) * first - a * second`, the picture noised in the second (arXiv 2311.16922).

    Generate with `use_cache=False`: the noised picture has keys and values of its own.

    Args:
        model: The model that generates; its pictures come as `pixel_values`.
        a: Weight of the contrast; 1 in the paper.
        plausible: Of the largest logit, see `SecondPass`; 0.1 in the paper.
        noise: Share of Gaussian noise in the variance of the noised picture; the paper's 500 of 1000 steps of diffusion
            are about 0.92.
        seed: Of the noise.
    """

    def __init__(
        self, model: nn.Module, a: float = 1.0, plausible: float = 0.1, noise: float = 0.92, seed: int = 0
    ) -> None:
        super().__init__(model, -a, plausible)
        self.noise, self.seed = checked("noise", noise, 0, 1), seed

    def logits(self, input_ids: Tensor) -> Tensor:
        """With the noised picture."""
        pixels = self.prompt.get("pixel_values")
        if pixels is None or self.cache is not None:
            raise MmsaeError("NoisedContrast needs the picture at every step: generate with use_cache=False.")
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(self.seed)).to(pixels)
        noised = (1 - self.noise) ** 0.5 * pixels + self.noise**0.5 * noise
        shapes = {
            n: v for n, v in self.prompt.items() if n not in self.inputs and n not in ("attention_mask", "pixel_values")
        }
        return self.again(("mm_encoder_outputs",), **shapes, pixel_values=noised)

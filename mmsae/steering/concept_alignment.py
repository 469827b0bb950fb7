"""Corrects what a multimodal model is about to say by the concepts of the picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError, checked
from mmsae.hooks import edit
from mmsae.sources.pooled import STREAMS, PooledModalities
from mmsae.steering.second_pass import SecondPass


class ConceptAlignment(SecondPass):
    """VL-SAE's correction while decoding: the concepts of the words are moved towards those of the picture.

        corrected = ConceptAlignment(source, core)
        with corrected.watching(inputs):
            source.model.generate(**inputs, logits_processor=[corrected], do_sample=False)

    At the hook point the mean of the image tokens f_v and the mean of the words so far f_t are encoded; with
    h' = (1 - beta) h_t + beta h_v and its decoding f', the second pass adds alpha (f' - f_t) to every position after
    the picture. Its logits get the weight c; tokens implausible in the first pass are ruled out (arXiv 2510.21323; POPE
    with the defaults, captions with alpha 0.7; published code generates without cache).

    Args:
        source: The model and the hook point, with the means that the dictionary was trained on.
        core: The dictionary, folded, with a code for each of the streams image and text: VLSAE (behind its alignment).
        alpha: How far the words' mean moves towards the decoding.
        beta: Share of the picture's concepts in it.
        c: Weight of the second pass.
        b: Plausibility.
        keep_error: Add what the dictionary fails to explain of f_t back to f', which the paper does not.
    """

    def __init__(
        self,
        source: PooledModalities,
        core: SAECore,
        alpha: float = 0.8,
        beta: float = 0.9,
        c: float = 0.6,
        b: float = 0.8,
        keep_error: bool = False,
    ) -> None:
        super().__init__(source.model, checked("c", c, 0, 1), b)
        if list(core.outputs) != list(STREAMS) or not hasattr(core, "encode_stream"):
            raise MmsaeError(
                f"{type(core).__name__} has no code for each of {' and '.join(STREAMS)}: train VLSAE on "
                "PooledModalities."
            )
        self.source, self.core = source, core.to(source.placed).eval()
        self.alpha, self.beta = checked("alpha", alpha, 0, 1), checked("beta", beta, 0, 1)
        self.keep_error = keep_error
        self._hidden: Tensor | None = None
        self._shift: Tensor | None = None  # what the second pass adds, [B, n, width]
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, prompt: Mapping[str, Any]) -> Iterator[None]:
        """Read the hook point in first passes and shift it in second ones."""
        with super().watching(prompt), edit(self.model, {self.source.point: self._layer}):
            try:
                yield
            finally:
                self._hidden, self._shift, self._sums, self._counts = None, None, {}, {}

    def logits(self, input_ids: Tensor) -> Tensor:
        """With the shifted words."""
        assert self._hidden is not None
        T, n = input_ids.shape[1], self._hidden.shape[1]
        attended = self.attended(input_ids)
        masks = self.source.masks(input_ids, attended)
        for name, mask in masks.items():
            own = mask[:, T - n :].to(self._hidden.device)
            total = self._hidden.float().masked_fill(~own[..., None], 0).sum(1)
            if n < T:  # the cache holds the rest
                total, count = self._sums[name] + total, self._counts[name] + own.sum(1)
            else:
                count = own.sum(1)
            self._sums[name], self._counts[name] = total, count
        if any(not count.all() for count in self._counts.values()):
            raise MmsaeError("a prompt has no picture, or no words behind it: ConceptAlignment needs both.")
        image, text = (self._sums[name] / self._counts[name][:, None] for name in STREAMS)
        place = torch.arange(T, device=input_ids.device)
        last = place.expand_as(input_ids).masked_fill(~masks["image"], -1).amax(1, keepdim=True)
        behind = ((place > last) & attended)[:, T - n :].to(self._hidden.device)
        by = self.alpha * (self.corrected(image, text) - text)
        self._shift = behind[..., None] * by[:, None]
        try:
            return self.again()
        finally:
            self._shift = None

    def corrected(self, image: Tensor, text: Tensor) -> Tensor:
        """The mean of the words as the picture's concepts would have it.

        Args:
            image: Mean of the image tokens `[B, width]`.
            text: Mean of the words `[B, width]`.
        """
        found = {name: self._code(name, x) for name, x in zip(STREAMS, (image, text), strict=True)}
        mixed = (1 - self.beta) * found["text"] + self.beta * found["image"]
        made = self._decoded(mixed)
        return made + text - self._decoded(found["text"]) if self.keep_error else made

    def _code(self, stream: str, x: Tensor) -> Tensor:
        return self.core.encode_stream(stream, x).dense()  # type: ignore[operator]

    def _decoded(self, code: Tensor) -> Tensor:
        return self.core.decode_stream("text", Codes(code, None, self.core.d_latent))  # type: ignore[operator]

    def _layer(self, x: Tensor) -> Tensor:
        if self._shift is not None:
            return x + self._shift.to(x)
        self._hidden = x.detach()
        return x

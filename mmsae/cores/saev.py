"""SAE-V: ReLU and L1 on mixed text and image tokens, at a given L0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.base import Losses
from mmsae.cores.relu import ReLU
from mmsae.errors import MmsaeError, checked
from mmsae.spec import ActivationSpec, Batch

TOKEN_TYPE = "token_type"
N_TYPES = 2  # text, image
FASTEST = 1.0  # a step moves the logarithm of the price by no more than `price_rate` times this


class SAEV(ReLU):
    """ReLU and L1 on the text and image tokens of a multimodal model, the price moved until L0 is right
    (arXiv 2502.17514).

    The paper trains one ordinary ReLU dictionary on all tokens of a residual stream. What is made of it afterwards
    (weights of the latents that fire on both kinds of tokens, scores of samples) presumes that few latents fire: so the
    price of L1 is not given but found, by a controller, and firing is counted by kind of token. Give it
    `data.columns=[token_type]` (0 text, 1 image). For activations scaled to a mean squared norm of `d_in`
    (`--model.normalise=center_scale`).

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        target_l0: Latents that fire per token, on average; None leaves the price at `l1_coefficient`.
        l1_coefficient: Price of a unit of code at the beginning.
        price_rate: How far a step moves the logarithm of the price when L0 is off by a factor of e or more.
        decoder_norm: "unit", or "free" with the norm in the price as in `ReLU`.
        decay: Decay per step of the running means: L0, and how often each latent fires on each kind of token.
    """

    needs: ClassVar[frozenset[str]] = frozenset({TOKEN_TYPE})
    reduce: ClassVar[Mapping[str, str]] = {"price": "mean", "l0": "mean", "density_by_type": "mean"}

    price: Tensor
    l0: Tensor
    density_by_type: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        target_l0: float | None = 64.0,
        l1_coefficient: float = 1.0,
        price_rate: float = 0.01,
        decoder_norm: Literal["unit", "free"] = "unit",
        decay: float = 0.99,
    ) -> None:
        super().__init__(spec, d_latent, l1_coefficient, decoder_norm)
        self.target_l0 = target_l0 if target_l0 is None else checked("target_l0", target_l0, 1e-3, d_latent)
        self.price_rate = checked("price_rate", price_rate, 0)
        self.decay = checked("decay", decay, 0, 1)
        self.register_buffer("price", torch.ones(()))  # a factor of l1_coefficient
        self.register_buffer("l0", torch.full((), -1.0))  # -1: never measured
        self.register_buffer("density_by_type", torch.zeros(N_TYPES, d_latent))

    def losses(self, batch: Batch) -> Losses:
        """Squared error and L1 at the price of the moment; counts what fired on which kind of token."""
        if TOKEN_TYPE not in batch:
            raise MmsaeError(
                "SAEV tells text from image tokens by a column 'token_type' that these batches lack: set "
                "data.columns=[token_type], with a source such as VisionLanguage; or use ReLU."
            )
        losses = super().losses(batch)
        losses.terms["sparsity"] = self.price * losses.terms["sparsity"]
        if self.training:
            self._count_types(losses.codes.detach(), batch[TOKEN_TYPE])
        return losses

    @torch.no_grad()
    def _count_types(self, codes: Codes, token_type: Tensor) -> None:
        for kind in range(N_TYPES):
            own = token_type == kind
            n = int(own.sum())
            if n:
                self.density_by_type[kind].mul_(self.decay).add_((1 - self.decay) * codes[own].firings() / n)

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Unit rows; a price that rises while more than `target_l0` latents fire and falls while fewer do."""
        super().after_step(step, codes)
        now = codes.l0().float().mean()
        self.l0.copy_(torch.where(self.l0 < 0, now, self.l0.lerp(now, 1 - self.decay)))
        if self.target_l0 is not None:
            # the batch itself, not the running mean, which comes late and makes the price swing
            off = (now.clamp_min(1e-3) / self.target_l0).log().clamp(-FASTEST, FASTEST)
            self.price.mul_((self.price_rate * off).exp())

    @property
    def image_share(self) -> Tensor:
        """How much of a latent's firing is on image tokens, were both kinds as frequent: 0 to 1, `[d_latent]`.

        0.5 is a latent that fires on both alike; NaN one that has not fired.
        """
        text, image = self.density_by_type
        return image / (text + image)

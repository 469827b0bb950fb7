"""vSAE: codes are sampled while training and pulled towards a Gaussian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import Affine, Losses
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import dense_linear, linear_topk
from mmsae.spec import ActivationSpec, Batch


class Variational(TopK):
    """TopK over sampled codes with a KL term to a standard Gaussian (vSAE, arXiv 2509.22994).

    A documented negative result: the KL term kills latents and costs fidelity, while noise by itself keeps more of
    them alive. Kept as a baseline and as the model of a stochastic encoder. In `eval` codes are the means.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Latents kept per activation, by the magnitude of their samples.
        kl_coefficient: Price of a unit of KL (summed over all latents) beside the squared error, so it is tied to the
            scale of the activations. The authors' code has 500 at a scale of its own; 0 is no KL.
        spread: "fixed" samples with `sigma`, "learned" with a deviation predicted from the activation.
        sigma: Deviation of the samples, for "fixed"; 0 does not sample.
        positive: Whether means are cut at 0, as in the code, not in the paper's text.
        aux_coefficient: Weight of AuxK on the means; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
    """

    centres_input: ClassVar[bool] = False
    signed: ClassVar[bool] = True

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        kl_coefficient: float = 0.0,
        spread: Literal["fixed", "learned"] = "fixed",
        sigma: float = 1.0,
        positive: bool = True,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        if spread not in ("fixed", "learned"):
            raise MmsaeError(f"spread={spread!r} is unknown: choose fixed or learned.")
        self.decoder_norm = "free"
        self.kl_coefficient = checked("kl_coefficient", kl_coefficient, 0)
        self.spread = spread
        self.sigma = checked("sigma", sigma, 0)
        self.positive = positive
        self.W_dec.data.mul_(0.1)
        self.W_enc.data.mul_(0.1)
        if spread == "learned":
            self.W_var = nn.Parameter(torch.zeros(d_latent, self.spec.d_in))
            self.b_var = nn.Parameter(torch.full((d_latent,), -2.0))

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """The k samples of largest magnitude while training, else the k largest means."""
        if self.training:
            return self._sample(x)[0]
        x, table, bias, centre = self.encoder(x)
        values, indices = linear_topk(x, table, bias, self.k, centre, signed=not self.positive)
        return Codes(values.relu() if self.positive else values, indices, self.d_latent)

    def _sample(self, x: Tensor | dict[str, Tensor]) -> tuple[Codes, Tensor]:
        """Codes, and the KL of each row: dense by nature, since every latent is sampled and priced."""
        mean = self.pre_activations(x)
        mean = mean.relu() if self.positive else mean
        kl = mean.clamp(-10, 10).pow(2)
        if self.spread == "fixed":
            sampled = mean + self.sigma * torch.randn_like(mean) if self.sigma else mean
        else:
            log_variance = dense_linear(self.encoder(x)[0], self.W_var, self.b_var).to(mean.dtype).clamp(-6, 2)
            sampled = mean + (log_variance / 2).exp() * torch.randn_like(mean)
            kl = kl + log_variance.exp() - 1 - log_variance
        indices = sampled.detach().abs().topk(self.k, dim=-1, sorted=False).indices
        return Codes(sampled.gather(-1, indices), indices, self.d_latent), kl.sum(-1) / 2

    def losses(self, batch: Batch) -> Losses:
        """Squared error and KL, both over the variance of the data, and AuxK once latents have died."""
        x, target = self.inputs(batch), self.target(batch)
        if not self.training:
            return super().losses(batch)
        codes, kl = self._sample(x)
        terms, reconstruction = self.reconstruct(target, codes)
        if self.kl_coefficient:
            terms["sparsity"] = self.kl_coefficient * kl.mean() / self.variance  # so named to be warmed up
        terms |= self.auxiliary(x, target, reconstruction)
        return Losses(terms, codes, reconstruction)

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation; rows of the decoder are free, so codes and their variances keep their unit."""
        super().fold(affine)
        if self.spread == "learned":
            source = affine[self.spec.input]
            table = source.reading(self.W_var)
            self.b_var.sub_(table @ source.mean.double())
            self.W_var.copy_(table)

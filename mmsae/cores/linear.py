"""Cores with a linear encoder before their selection and a linear decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import Affine, SAECore
from mmsae.kernels import LOW, dense_linear, sparse_decode
from mmsae.spec import TARGET, ActivationSpec

ROWS = 1024  # decoder rows constrained at a time: few enough to stay in the cache between the passes


class LinearCore(SAECore):
    """`codes = choose((x - s b_dec) @ W_enc.T + b_enc)`, `reconstruction = codes @ W_dec + b_dec`.

    A subclass writes `encode`: by one of the fused selections of `mmsae.kernels`, or from `pre_activations` when it
    needs them all. `W_enc` and `W_dec` hold one row per latent, each a contiguous read.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        decoder_norm: "unit" keeps every decoder row at norm 1 (gradient projected, rows renormalised after each step);
            "free" leaves it to the loss.
        init_norm: Norm of the decoder rows at the start; the encoder starts as their transpose.
    """

    centres_input: ClassVar[bool] = True
    """Whether `b_dec` is subtracted from the input (s = 1); never for transcoders."""
    selects_per_latent: ClassVar[bool] = False
    """Whether a latent fires by its own pre-activation alone, so that its codes may be rescaled by themselves."""

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        decoder_norm: Literal["unit", "free"] = "unit",
        init_norm: float = 1.0,
    ) -> None:
        super().__init__(spec, d_latent)
        self.decoder_norm = decoder_norm
        self.spec = ActivationSpec(
            {name: self.spec.streams[name] for name in (self.spec.input, TARGET) if name in self.spec.streams}
        )
        d_in, d_out = self.spec.d_in, self.spec.d_out
        rows = torch.randn(d_latent, d_out)
        self.W_dec = nn.Parameter(init_norm * rows / rows.norm(dim=-1, keepdim=True))
        encoder = self.W_dec.detach().clone() if d_in == d_out else torch.randn(d_latent, d_in) / d_in**0.5
        self.W_enc = nn.Parameter(encoder)
        self.b_enc = nn.Parameter(torch.zeros(d_latent))
        self.b_dec = nn.Parameter(torch.zeros(d_out))

    @property
    def subtracts_b_dec(self) -> bool:
        """Whether the encoder sees `x - b_dec`."""
        return self.centres_input and TARGET not in self.spec.streams

    @property
    def decoder_rows(self) -> Tensor:
        """What `decode` and auxiliary losses write with, `[d_latent, d_out]`."""
        return self.W_dec

    @property
    def dictionary(self) -> Tensor:
        """Decoder rows `[d_latent, d_out]`."""
        return self.decoder_rows

    def decoder_norms(self) -> Tensor:
        """What a unit of each latent's code counts for `[d_latent]`."""
        return self.decoder_rows.norm(dim=-1)

    def encoder(self, x: Tensor | dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What fused selections take: `x` `[..., d_in]`, encoder rows, their biases, what is subtracted from `x`."""
        if isinstance(x, dict):
            x = x[self.spec.input]
        x = x.to(self.W_enc.dtype)  # activations in half precision meet float32 weights
        return x, self.W_enc, self.b_enc, self.b_dec if self.subtracts_b_dec else None

    def pre_activations(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        """`[..., d_latent]`, at least float32 also under autocast, because selections are made on it."""
        x, table, bias, centre = self.encoder(x)
        pre = dense_linear(x if centre is None else x - centre, table, bias)
        return pre.float() if pre.dtype in LOW else pre

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction `[..., d_out]`."""
        if codes.indices is None:
            return dense_linear(codes.values, self.decoder_rows.t()) + self.b_dec
        return sparse_decode(codes.values, codes.indices, self.decoder_rows) + self.b_dec

    @torch.no_grad()
    def before_step(self) -> None:
        """Remove the part of the decoder gradient that would only change the norm of unit rows."""
        if self.decoder_norm == "unit":
            keep_norms(self.W_dec)

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Back to unit rows; after the optimizer, so that saved weights are unit too."""
        if self.decoder_norm == "unit":
            to_unit(self.W_dec)

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation; then give decoder rows norm 1 where that does not change which latents fire."""
        source = affine[self.spec.input]
        sink = affine.get(TARGET, source)
        w_enc = source.reading(self.W_enc)
        if not self.subtracts_b_dec:
            self.b_enc.sub_(w_enc @ source.mean.double())
        self.W_enc.copy_(w_enc)
        for rows in (*self.written(), self.b_dec):
            rows.copy_(sink.writing(rows))
        self.b_dec.add_(sink.mean)
        if self.selects_per_latent:
            self.rescale(self.decoder_norms().clamp_min(1e-8))
        elif sink.scale.ndim == 0 and self.decoder_norm == "unit":
            self.rescale(self.decoder_norms().mean().expand(self.d_latent))

    def written(self) -> tuple[Tensor, ...]:
        """What the decoder rows are made of, each `[..., d_out]` and linear in them."""
        return (self.W_dec,)

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Multiply the codes of each latent by `factor` `[d_latent]` and divide its decoder row by it."""
        self.W_enc.mul_(factor[:, None])
        self.b_enc.mul_(factor)
        self.W_dec.div_(factor[:, None])


def keep_norms(rows: Tensor) -> None:
    """Remove from the gradient of rows `[n, d]` the part that would only change their norms."""
    if rows.grad is not None:
        for part, grad in zip(rows.split(ROWS), rows.grad.split(ROWS), strict=True):
            grad.addcmul_(part, (grad * part).sum(-1, keepdim=True) / part.pow(2).sum(-1, keepdim=True), value=-1)


def to_unit(rows: Tensor) -> None:
    """Bring rows `[n, d]` to norm 1, in place."""
    for part in rows.split(ROWS):
        part.div_(part.norm(dim=-1, keepdim=True).clamp_min_(1e-8))

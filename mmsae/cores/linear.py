"""Cores with a linear encoder before their selection and a linear decoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import Affine, SAECore
from mmsae.kernels import sparse_decode
from mmsae.spec import TARGET, ActivationSpec, Batch


class LinearCore(SAECore):
    """`codes = select((x - s b_dec) @ W_enc + b_enc)`, `reconstruction = codes @ W_dec + b_dec`.

    A subclass writes `select`. `W_enc` is laid out latent by latent in memory, so that the encoder row of a latent is
    one contiguous read.

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
        self.W_enc = nn.Parameter(encoder.t())  # [d_in, d_latent], contiguous per latent
        self.b_enc = nn.Parameter(torch.zeros(d_latent))
        self.b_dec = nn.Parameter(torch.zeros(d_out))

    @property
    def subtracts_b_dec(self) -> bool:
        """Whether the encoder sees `x - b_dec`."""
        return self.centres_input and TARGET not in self.spec.streams

    @property
    def dictionary(self) -> Tensor:
        """Decoder rows `[d_latent, d_out]`."""
        return self.W_dec

    @abstractmethod
    def select(self, pre: Tensor) -> Codes:
        """Codes from pre-activations `[..., d_latent]` (float32 or wider)."""

    def pre_activations(self, x: Tensor) -> Tensor:
        """`[..., d_latent]`, at least float32 also under autocast, because selections are made on it."""
        x = x.to(self.W_enc.dtype)  # activations in half precision meet float32 weights
        if self.subtracts_b_dec:
            x = x - self.b_dec
        pre = x @ self.W_enc + self.b_enc
        return pre.float() if pre.dtype in (torch.bfloat16, torch.float16) else pre

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """Codes of `x` `[..., d_in]`."""
        if isinstance(x, dict):
            x = x[self.spec.input]
        return self.select(self.pre_activations(x))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction `[..., d_out]`."""
        if codes.indices is None:
            return codes.values @ self.W_dec + self.b_dec
        return sparse_decode(codes.values, codes.indices, self.W_dec) + self.b_dec

    @torch.no_grad()
    def before_step(self) -> None:
        """Remove the part of the decoder gradient that would only change the norm of unit rows."""
        if self.decoder_norm == "unit" and self.W_dec.grad is not None:
            unit = self.W_dec / self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8)
            self.W_dec.grad -= (self.W_dec.grad * unit).sum(-1, keepdim=True) * unit

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Back to unit rows; after the optimizer, so that saved weights are unit too."""
        if self.decoder_norm == "unit":
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation; then give decoder rows norm 1 where that does not change which latents fire."""
        source = affine[self.spec.input]
        sink = affine.get(TARGET, source)
        s_in, s_out = source.scale.double(), sink.inverse_scale().double()
        w_enc, w_dec = self.W_enc.double(), self.W_dec.double()
        w_enc = s_in * w_enc if s_in.ndim == 0 else s_in @ w_enc
        rows = torch.cat([w_dec, self.b_dec.double()[None]])
        rows = rows * s_out if s_out.ndim == 0 else rows @ s_out
        w_dec, b_dec = rows[:-1], rows[-1] + sink.mean.double()
        if not self.subtracts_b_dec:
            self.b_enc.sub_(source.mean.double() @ w_enc)
        self.W_enc.copy_(w_enc)
        self.W_dec.copy_(w_dec)
        self.b_dec.copy_(b_dec)
        norms = w_dec.norm(dim=-1).clamp_min(1e-8)
        if self.selects_per_latent:
            self.rescale(norms)
        elif s_out.ndim == 0 and self.decoder_norm == "unit":
            self.rescale(norms.mean().expand(self.d_latent))

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Multiply the codes of each latent by `factor` `[d_latent]` and divide its decoder row by it."""
        self.W_enc.mul_(factor)
        self.b_enc.mul_(factor)
        self.W_dec.div_(factor[:, None])

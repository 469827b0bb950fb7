"""Transcoders with an affine path beside their latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import Affine
from mmsae.cores.jump_relu import JumpReLU
from mmsae.cores.linear import LinearCore
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError
from mmsae.kernels import dense_linear
from mmsae.spec import TARGET, ActivationSpec, Batch


class _Skip(LinearCore):
    """Adds the affine path to a core: it stands before that core among the bases, and `begin` ends the constructor."""

    W_skip: nn.Parameter

    def begin(self) -> None:
        """The path, and a decoder of free norms, from 0."""
        if TARGET not in self.spec.streams:
            raise MmsaeError(
                f"{type(self).__name__} needs a stream {TARGET!r} beside {self.spec.input!r}: without one the affine "
                "path would copy the input; use TopK."
            )
        self.decoder_norm = "free"
        self.W_skip = nn.Parameter(torch.zeros(self.spec.d_out, self.spec.d_in))
        with torch.no_grad():
            self.W_dec.zero_()

    def skip(self, x: Tensor) -> Tensor:
        """The affine part of the reconstruction without its bias, `[..., d_out]`."""
        return dense_linear(x.to(self.W_skip.dtype), self.W_skip)

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """The codes of the core, and in `extra["skip"]` what the affine path adds."""
        codes = super().encode(x, batch)  # type: ignore[safe-super]
        codes.extra["skip"] = self.skip(x[self.spec.input] if isinstance(x, dict) else x)
        return codes

    def decode(self, codes: Codes) -> Tensor:
        """Prediction of the target `[..., d_out]`."""
        if "skip" not in codes.extra:
            raise MmsaeError(
                f"these codes do not carry the affine part of a {type(self).__name__}, which no store of codes keeps: "
                'decode them with codes.extra["skip"] = core.skip(x) of their activations.'
            )
        return super().decode(codes) + codes.extra["skip"]

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation of both streams; the affine path moves the mean of the input into `b_dec`."""
        source, sink = affine[self.spec.input], affine[TARGET]
        path = sink.writing(source.reading(self.W_skip).t())  # [d_in, d_out]
        super().fold(affine)
        self.W_skip.copy_(path.t())
        self.b_dec.sub_(source.mean.double() @ path)


class SkipTranscoder(_Skip, TopK):
    """TopK from the input of a module to its output, which an affine map of the input helps (arXiv 2501.18823).

    `target = codes @ W_dec + b_dec + x @ W_skip.T`: latents need not spend themselves on what is linear. The affine
    part is dense and belongs to no latent; report it apart (`skip`). It travels with the codes as `extra["skip"]`.
    As in the paper, the decoder and `W_skip` start at 0, `b_dec` at the mean of the target, and decoder rows keep the
    norm that the loss gives them.

    Args:
        spec: Widths of the streams; the target is called `target`.
        d_latent: Number of latents.
        k: Latents kept per activation.
        aux_coefficient: Weight of AuxK, the share of the residual that dead latents fail to explain; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        self.begin()


class JumpReLUSkipTranscoder(_Skip, JumpReLU):
    """JumpReLU from the input of a module to its output, beside the affine path of `SkipTranscoder` (Gemma Scope 2).

    Presumes activations scaled to a mean squared norm of their width (`--model.normalise=center_scale`).

    Args:
        spec: Widths of the streams; the target is called `target`.
        d_latent: Number of latents.
        sparsity_coefficient: Price: per active latent ("step"), per unit of saturated code ("tanh"), or of the
            relative distance from `target_l0`, squared ("target_l0").
        sparsity_loss: What is paid for, as in JumpReLU.
        target_l0: Wanted L0, for "target_l0".
        threshold: Initial threshold, in units of the root mean square of the pre-activations.
        bandwidth: Width of the straight-through window, in the same unit.
        dead_after: Rows without firing after which a latent counts as dead.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        sparsity_coefficient: float = 1.0,
        sparsity_loss: Literal["step", "tanh", "target_l0"] = "step",
        target_l0: float = 32.0,
        threshold: float = 0.01,
        bandwidth: float = 0.05,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(
            spec, d_latent, sparsity_coefficient, sparsity_loss, target_l0, threshold, bandwidth, dead_after
        )
        self.begin()

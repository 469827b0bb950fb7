"""A transcoder with an affine path beside its latents."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import Affine
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError
from mmsae.kernels import dense_linear
from mmsae.spec import TARGET, ActivationSpec, Batch


class SkipTranscoder(TopK):
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
        if TARGET not in self.spec.streams:
            raise MmsaeError(
                f"SkipTranscoder needs a stream {TARGET!r} beside {self.spec.input!r}: without one the affine path "
                "would copy the input; use TopK."
            )
        self.decoder_norm = "free"
        self.W_skip = nn.Parameter(torch.zeros(self.spec.d_out, self.spec.d_in))
        with torch.no_grad():
            self.W_dec.zero_()

    def skip(self, x: Tensor) -> Tensor:
        """The affine part of the reconstruction without its bias, `[..., d_out]`."""
        return dense_linear(x.to(self.W_skip.dtype), self.W_skip)

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """The k largest of each row, their positive part, and what the affine path adds."""
        codes = super().encode(x, batch)
        codes.extra["skip"] = self.skip(x[self.spec.input] if isinstance(x, dict) else x)
        return codes

    def decode(self, codes: Codes) -> Tensor:
        """Prediction of the target `[..., d_out]`."""
        if "skip" not in codes.extra:
            raise MmsaeError(
                "these codes do not carry the affine part of a SkipTranscoder, so they cannot be decoded: "
                "encode the activations again."
            )
        return super().decode(codes) + codes.extra["skip"]

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation of both streams; the affine path moves the mean of the input into `b_dec`."""
        source, sink = affine[self.spec.input], affine[TARGET]
        s_in, s_out = source.scale.double(), sink.inverse_scale().double()
        path = self.W_skip.double().t()  # [d_in, d_out]
        path = s_in * path if s_in.ndim == 0 else s_in @ path
        path = path * s_out if s_out.ndim == 0 else path @ s_out
        super().fold(affine)
        self.W_skip.copy_(path.t())
        self.b_dec.sub_(source.mean.double() @ path)

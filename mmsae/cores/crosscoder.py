"""One code for several streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import Affine, Losses, SAECore, squared_error
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import dense_linear, linear_above, sparse_decode
from mmsae.spec import ACTS, TARGET, ActivationSpec, Batch


class Crosscoder(SAECore):
    """One ReLU code read from all streams, layers or models, and written to each (Transformer Circuits, October 2024).

    The price of a latent is `l1_coefficient * z_i * sum_s ||w_s,i||`: a sum of norms over the streams, not the norm
    of all of them together, which makes it cheap to write to one stream alone. `shares` then tells latents that the
    streams have in common (about equal shares) from those of one stream (share 0 or 1).
    It presumes that each stream is scaled to a mean squared norm of its width (`--model.normalise=center_scale`).

    Args:
        spec: Widths of the streams, all of which are read and reconstructed.
        d_latent: Number of latents.
        l1_coefficient: Price of a unit of code.
        init_norm: Norm of each stream's decoder rows at the start; the encoder starts as their transpose.
    """

    shares: Tensor

    def __init__(
        self, spec: ActivationSpec | int, d_latent: int, l1_coefficient: float = 2.0, init_norm: float = 0.08
    ) -> None:
        super().__init__(spec, d_latent)
        if TARGET in self.spec.streams:
            raise MmsaeError(f"Crosscoder reconstructs every stream it reads: give {TARGET!r} another name.")
        self.l1_coefficient = checked("l1_coefficient", l1_coefficient, 0)
        self.init_norm = checked("init_norm", init_norm, 0)
        # the streams stand side by side, so that all of them cost one product
        rows = [torch.randn(d_latent, width) for width in self.widths]
        table = torch.cat([init_norm * r / r.norm(dim=-1, keepdim=True) for r in rows], -1)
        self.W_dec = nn.Parameter(table)
        self.W_enc = nn.Parameter(table.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_latent))
        self.b_dec = nn.Parameter(torch.zeros(sum(self.widths)))
        self.register_buffer("shares", self._shares())

    @property
    def widths(self) -> list[int]:
        """Of the streams, in the order in which they stand side by side."""
        return list(self.spec.streams.values())

    @property
    def outputs(self) -> list[str]:
        """All streams."""
        return list(self.spec.streams)

    @property
    def dictionary(self) -> Tensor:
        """Decoder rows of the first stream; `dictionaries` has all of them."""
        return self.dictionaries[self.spec.input]

    @property
    def dictionaries(self) -> dict[str, Tensor]:
        """Decoder rows of each stream, `[d_latent, width]`."""
        return self._by_stream(self.W_dec)

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """Positive part of the sum over the streams; a tensor holds the streams side by side."""
        joined = self._joined(x).to(self.W_enc.dtype)
        found = linear_above(joined, self.W_enc, self.b_enc, torch.zeros_like(self.b_enc))
        values, indices = found or (dense_linear(joined, self.W_enc, self.b_enc).to(self.W_enc.dtype), None)
        return Codes(values.relu(), indices, self.d_latent)

    def decode(self, codes: Codes) -> dict[str, Tensor]:
        """Reconstruction of each stream, `[..., width]`."""
        if codes.indices is None:
            joined = dense_linear(codes.values, self.W_dec.t())
        else:
            joined = sparse_decode(codes.values, codes.indices, self.W_dec)
        return self._by_stream(joined + self.b_dec)

    def losses(self, batch: Batch) -> Losses:
        """Squared error summed over the streams, and the price."""
        codes = self.encode(self.inputs(batch))
        reconstruction = self.decode(codes)
        error = torch.stack([squared_error(batch[ACTS][s], out) for s, out in reconstruction.items()]).sum()
        norms = self._norms().sum(-1)
        if codes.indices is None:
            price = codes.values @ norms
        else:
            price = (codes.values * norms.index_select(0, codes.indices.flatten()).view_as(codes.values)).sum(-1)
        terms = {"reconstruction": error, "sparsity": self.l1_coefficient * price.mean()}
        return Losses(terms, codes, reconstruction)

    def inputs(self, batch: Batch) -> Any:
        """All streams."""
        return {stream: batch[ACTS][stream] for stream in self.spec.streams}

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """`shares` follow the decoder, so that every checkpoint has them."""
        self.shares.copy_(self._shares())

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation of each stream; codes then count in units of the summed decoder norm.

        `shares` stay those of the normalised streams: raw units would say which stream is louder.
        """
        norms = self._norms().sum(-1, dtype=torch.float64).clamp_min(1e-8)
        encoder, decoder, bias = [], [], self.b_enc.double()
        for stream, w_enc, w_dec, b_dec in zip(
            self.spec.streams, *(t.double().split(self.widths, -1) for t in (self.W_enc, self.W_dec, self.b_dec)),
            strict=True,
        ):  # fmt: skip
            s_in, s_out = affine[stream].scale.double(), affine[stream].inverse_scale().double()
            mean = affine[stream].mean.double()
            encoder.append(w_enc * s_in if s_in.ndim == 0 else w_enc @ s_in.t())
            bias = bias - encoder[-1] @ mean
            rows = torch.cat([w_dec / norms[:, None], b_dec[None]])
            rows = rows * s_out if s_out.ndim == 0 else rows @ s_out
            rows[-1] += mean
            decoder.append(rows)
        self.W_enc.copy_(torch.cat(encoder, -1) * norms[:, None])
        self.b_enc.copy_(bias * norms)
        rows = torch.cat(decoder, -1)
        self.W_dec.copy_(rows[:-1])
        self.b_dec.copy_(rows[-1])

    def _joined(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        return x if isinstance(x, Tensor) else torch.cat([x[stream] for stream in self.spec.streams], -1)

    def _by_stream(self, joined: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.spec.streams, joined.split(self.widths, -1), strict=True))

    def _norms(self) -> Tensor:
        """Norm of each latent's decoder row in each stream `[d_latent, n_streams]`."""
        return torch.stack([rows.norm(dim=-1) for rows in self.dictionaries.values()], -1)

    def _shares(self) -> Tensor:
        """Share of each stream in the summed norms of a latent `[d_latent, n_streams]`."""
        norms = self._norms().detach()
        return norms / norms.sum(-1, keepdim=True).clamp_min(1e-8)

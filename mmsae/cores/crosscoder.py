"""One code for several streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.base import Affine
from mmsae.cores.batch_topk import BatchTopK
from mmsae.cores.linear import LinearCore
from mmsae.cores.relu import ReLU
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError, checked
from mmsae.spec import ACTS, TARGET, ActivationSpec, Batch


class SeveralStreams(LinearCore):
    """What crosscoders share: all streams, side by side, are read into one code and written from it.

    A unit of a latent's code counts for the sum of its decoder norms over the streams, not for the norm of all of them
    together, which makes it cheap to write to one stream alone. `shares` tells latents that the streams have in common
    (about equal shares) from those of one stream (share 0 or 1).

    It stands after the core that selects among the bases of a class, whose constructor calls `begin` at its end.
    """

    centres_input: ClassVar[bool] = False

    exclusive: float
    shares: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        decoder_norm: Literal["unit", "free"] = "free",  # this and the next are for one stream; see `begin`
        init_norm: float = 1.0,
    ) -> None:
        spec = ActivationSpec.of(spec)
        if TARGET in spec.streams:
            raise MmsaeError(f"{type(self).__name__} reconstructs every stream it reads: give {TARGET!r} another name.")
        super().__init__(ActivationSpec({spec.input: sum(spec.streams.values())}), d_latent, "free")
        self.spec = spec

    @torch.no_grad()
    def begin(self, exclusive: float, norm: float = 1.0) -> None:
        """Decoder rows of this norm in every stream, exclusive latents confined, the encoder as their transpose."""
        self.exclusive = checked("exclusive", exclusive, 0, 1 / len(self.widths))
        for rows in self.W_dec.split(self.widths, -1):
            rows.mul_(norm / rows.norm(dim=-1, keepdim=True))
        self._confine(self.W_dec)
        self.W_enc.copy_(self.W_dec)
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
        return self.by_stream(self.W_dec)

    def decoder_norms(self) -> Tensor:
        """Sums over the streams of the norms of decoder rows `[d_latent]`."""
        return self._norms().sum(-1)

    def exclusive_to(self, stream: str) -> range:
        """Latents that can read and write this stream alone, by design."""
        n, number = round(self.exclusive * self.d_latent), self.outputs.index(stream)
        return range(number * n, (number + 1) * n)

    def inputs(self, batch: Batch) -> Any:
        """All streams."""
        return {stream: batch[ACTS][stream] for stream in self.spec.streams}

    def encoder(self, x: Tensor | dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As for any linear encoder; a tensor holds the streams side by side."""
        return super().encoder(self.joined(x))

    def decode(self, codes: Codes) -> dict[str, Tensor]:  # type: ignore[override]
        """Reconstruction of each stream, `[..., width]`."""
        return self.by_stream(super().decode(codes))

    @torch.no_grad()
    def before_step(self) -> None:
        """Exclusive latents learn from their own stream alone."""
        for table in (self.W_enc, self.W_dec):
            if table.grad is not None:
                self._confine(table.grad)

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """`shares` follow the decoder, so that every checkpoint has them."""
        for table in (self.W_enc, self.W_dec):
            self._confine(table)  # whatever the optimizer makes of a gradient of 0
        self.shares.copy_(self._shares())

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation of each stream; codes then count in units of the summed decoder norm.

        `shares` stay those of the normalised streams: raw units would say which stream is louder.
        """
        norms = self.decoder_norms()
        tables = (self.W_enc, self.W_dec, self.b_dec)
        for stream, *parts in zip(self.outputs, *(t.split(self.widths, -1) for t in tables), strict=True):
            (w_enc, w_dec, b_dec), mean = parts, affine[stream].mean
            w_enc.copy_(affine[stream].reading(w_enc))
            self.b_enc.sub_(w_enc.double() @ mean.double())
            w_dec.copy_(affine[stream].writing(w_dec))
            b_dec.copy_(affine[stream].writing(b_dec) + mean)
        LinearCore.rescale(self, torch.where(norms > 1e-8, norms, 1.0))

    def _confine(self, table: Tensor) -> None:
        """Zeros where exclusive latents would meet another stream."""
        n = len(self.exclusive_to(self.spec.input)) * len(self.widths)
        for stream, columns in self.by_stream(table).items():
            own = self.exclusive_to(stream)
            columns[: own.start] = 0
            columns[own.stop : n] = 0

    def _norms(self) -> Tensor:
        """Norm of each latent's decoder row in each stream `[d_latent, n_streams]`."""
        return torch.stack([rows.norm(dim=-1) for rows in self.dictionaries.values()], -1)

    def _shares(self) -> Tensor:
        """Share of each stream in the summed norms of a latent `[d_latent, n_streams]`."""
        norms = self._norms().detach()
        return norms / norms.sum(-1, keepdim=True).clamp_min(1e-8)


class Crosscoder(ReLU, SeveralStreams):
    """One ReLU code read from all streams, layers or models, and written to each (Transformer Circuits, October 2024).

    The price of a latent is `l1_coefficient * z_i * sum_s ||w_s,i||`. `shares` tells what the streams have in common
    from what one has alone; `exclusive` sets latents aside for the latter (dedicated features, arXiv 2602.11729).
    It presumes that each stream is scaled to a mean squared norm of its width (`--model.normalise=center_scale`).

    Args:
        spec: Widths of the streams, all of which are read and reconstructed.
        d_latent: Number of latents.
        l1_coefficient: Price of a unit of code.
        init_norm: Norm of each stream's decoder rows at the start; the encoder starts as their transpose.
        exclusive: Share of the latents that is set aside for each stream, to read and write it alone.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        l1_coefficient: float = 2.0,
        init_norm: float = 0.08,
        exclusive: float = 0.0,
    ) -> None:
        super().__init__(spec, d_latent, l1_coefficient)
        self.init_norm = checked("init_norm", init_norm, 0)
        self.begin(exclusive, init_norm)


class _Scored(SeveralStreams):
    """Selects by `z_i * sum_s ||w_s,i||`: that sum is kept at 1, so that a pre-activation is its own score."""

    @torch.no_grad()
    def begin(self, exclusive: float, norm: float = 1.0) -> None:
        """As said; and every latent codes its own row by 1."""
        super().begin(exclusive, norm)
        self.W_dec.div_(self.decoder_norms()[:, None])
        self.W_enc.copy_(self.W_dec / self.W_dec.pow(2).sum(-1, keepdim=True))

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """The norms of each latent back to a sum of 1, by a change of unit that leaves reconstructions as they are."""
        norms = self.decoder_norms()
        LinearCore.rescale(self, torch.where(norms > 1e-8, norms, 1.0))
        super().after_step(step, codes)


class TopKCrosscoder(TopK, _Scored):
    """Crosscoder that keeps the k latents of largest `z_i * sum_s ||w_s,i||` (arXiv 2504.02922).

    No price shrinks what two streams share into one of them, as L1 does. `shares` tells what the streams have in common
    from what one has alone; `exclusive` sets latents aside for the latter (dedicated features, arXiv 2602.11729).
    It presumes that each stream is scaled to a mean squared norm of its width (`--model.normalise=center_scale`).

    Args:
        spec: Widths of the streams, all of which are read and reconstructed.
        d_latent: Number of latents.
        k: Latents kept per activation.
        exclusive: Share of the latents that is set aside for each stream, to read and write it alone; 0.05 in the
            paper.
        aux_coefficient: Weight of AuxK, the share of the residual that dead latents fail to explain; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the joint width.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        exclusive: float = 0.0,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        self.begin(exclusive)


class BatchTopKCrosscoder(BatchTopK, _Scored):
    """Crosscoder that keeps the k * batch largest `z_i * sum_s ||w_s,i||` of the whole batch (arXiv 2504.02922).

    As `TopKCrosscoder`; in `eval` a latent fires above a threshold, as in `BatchTopK`.

    Args:
        spec: Widths of the streams, all of which are read and reconstructed.
        d_latent: Number of latents.
        k: Latents kept per activation, on average over a batch.
        exclusive: Share of the latents that is set aside for each stream, to read and write it alone; 0.05 in the
            paper.
        aux_coefficient: Weight of AuxK; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the joint width.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
        threshold_decay: Decay of the running mean per step.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        exclusive: float = 0.0,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
        threshold_decay: float = 0.99,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after, threshold_decay)
        self.begin(exclusive)

"""TopK for activations whose statistics drift with the step of denoising."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from mmsae.codes import Codes
from mmsae.cores.base import Affine, Losses
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError, checked
from mmsae.spec import TARGET, ActivationSpec, Batch

TIMESTEP = "timestep"
FREQUENCIES = 32
Modulation = Literal["learned", "statistics", "none"]


class Temporal(TopK):
    """TIDE: TopK between a shift and a scale that depend on the timestep (arXiv 2503.07050).

    `codes = TopK((x - shift_t) / scale_t)` and `reconstruction = decode(codes) * scale_t + shift_t`. "learned" makes
    both by a small network of the timestep that begins at 0 and 1 (its form is ours; the paper leaves it open);
    "statistics" takes running means and deviations of `n_buckets` bands of timesteps, the
    cheap control; "none" is TopK, and needs no timesteps. The error is measured in the space of the activations.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Latents kept per activation.
        modulation: See above.
        n_timesteps: Timesteps are from 0 up to here.
        n_buckets: Bands of "statistics".
        hidden: Width of the network of "learned".
        default_timestep: Of rows that have none (words, or calls without a batch); None refuses them.
        aux_coefficient: Weight of AuxK; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
    """

    needs: ClassVar[frozenset[str]] = frozenset({TIMESTEP})
    linear_decode: ClassVar[bool] = False  # what a latent writes depends on the timestep, too
    reduce: ClassVar[Mapping[str, str]] = {"bucket_mean": "mean", "bucket_square": "mean"}

    bucket_mean: Tensor
    bucket_square: Tensor
    outer_mean: Tensor
    outer_scale: Tensor
    outer_inverse: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        modulation: Modulation = "learned",
        n_timesteps: int = 1000,
        n_buckets: int = 20,
        hidden: int = 128,
        default_timestep: float | None = None,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        if TARGET in self.spec.streams:
            raise MmsaeError(f"Temporal reconstructs what it reads: it takes no stream {TARGET!r}.")
        if modulation not in get_args(Modulation):
            raise MmsaeError(f"modulation={modulation!r} is unknown; choose {', '.join(get_args(Modulation))}.")
        self.modulation = modulation
        self.n_timesteps = checked("n_timesteps", n_timesteps, 1)
        self.n_buckets = checked("n_buckets", n_buckets, 1)
        self.hidden = checked("hidden", hidden, 1)
        self.default_timestep = default_timestep
        width = self.spec.d_in
        self._seen: tuple[Tensor, Tensor] | None = None  # rows of a step, until the statistics follow them
        self.network: nn.Sequential | None = None
        if modulation == "learned":
            last = nn.Linear(hidden, 2 * width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.network = nn.Sequential(nn.Linear(2 * FREQUENCIES, hidden), nn.SiLU(), last)
        buckets = n_buckets if modulation == "statistics" else 1
        self.register_buffer("bucket_mean", torch.zeros(buckets, width))
        self.register_buffer("bucket_square", torch.ones(buckets, width))
        # the normalisation of the data, once it is folded in; a whitening is a matrix
        self.register_buffer("outer_mean", torch.zeros(width))
        self.register_buffer("outer_scale", torch.ones(()))
        self.register_buffer("outer_inverse", torch.ones(()))

    # ---- the modulation

    def scale_and_shift(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """What the timestep does to normalised activations: factors and summands `[..., d_in]`, of its dtype or wider.

        Args:
            timestep: `[...]`.
        """
        dtype = self.W_dec.dtype
        if self.network is not None:
            distinct, place = timestep.unique(return_inverse=True)
            share = distinct.to(dtype) / self.n_timesteps
            octaves = torch.arange(FREQUENCIES, dtype=dtype, device=share.device) / (FREQUENCIES - 1)
            angles = share[:, None] * math.pi * 200.0**octaves
            with torch.autocast(share.device.type, enabled=False):
                first, _, last = self.network
                hidden = silu(first(torch.cat([angles.sin(), angles.cos()], -1)))
                log_scale, shift = last(hidden).chunk(2, dim=-1)
            return log_scale.exp()[place], shift[place]
        if self.modulation == "statistics":
            place = self._bucket(timestep)
            mean = self.bucket_mean.to(dtype)
            spread = (self.bucket_square.to(dtype) - mean.pow(2)).clamp_min(0).sqrt()
            # directions that hardly vary at a step are left small, not blown up
            floor = 1e-2 * spread.pow(2).mean(-1, keepdim=True).sqrt() + 1e-8
            return spread.clamp_min(floor)[place], mean[place]
        ones = torch.ones((), dtype=dtype, device=self.W_dec.device)
        return ones, torch.zeros_like(ones)

    def _bucket(self, timestep: Tensor) -> Tensor:
        return (timestep * self.n_buckets / self.n_timesteps).long().clamp(0, self.n_buckets - 1)

    def _timesteps(self, x: Tensor, batch: Batch | None) -> Tensor:
        """One for each row of `x` `[..., d]`."""
        if self.modulation == "none":
            return x.new_zeros(x.shape[:-1])
        found = None if batch is None else batch.get(TIMESTEP)
        if found is None:
            if self.default_timestep is None:
                raise MmsaeError(
                    "Temporal needs the timestep of every row, which sources of diffusion models give; for other "
                    "rows set default_timestep, or modulation=none."
                )
            return x.new_full(x.shape[:-1], self.default_timestep, dtype=torch.float32)
        found = torch.as_tensor(found, device=x.device).float()
        found = found.reshape(found.shape + (1,) * (x.dim() - 1 - found.dim())).expand(x.shape[:-1])
        if self.default_timestep is not None:
            return torch.where(found < 0, self.default_timestep, found)
        if bool((found < 0).any()):
            raise MmsaeError("Temporal met rows without a timestep (words have none); set default_timestep.")
        return found

    # ---- as a core

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """The k largest of each row, after its modulation was taken off; `batch` has the timesteps."""
        x = self._normalised(x)
        timestep = self._timesteps(x, batch)
        codes = super().encode(self._plain(x, timestep))
        return replace(codes, extra={TIMESTEP: timestep})

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction `[..., d_in]`; `codes.extra` has the timesteps."""
        scale, shift = self.scale_and_shift(self._known(codes))
        return self._raw(super().decode(codes) * scale + shift)

    def losses(self, batch: Batch) -> Losses:
        """As TopK; AuxK explains what is left before the modulation is put back."""
        x = self._normalised(self.inputs(batch))
        timestep = self._timesteps(x, batch)
        if self.training and self.modulation == "statistics":
            self._seen = x.detach(), timestep
        plain = self._plain(x, timestep)
        codes = replace(super().encode(plain), extra={TIMESTEP: timestep})
        terms, reconstruction = self.reconstruct(self.target(batch), codes)
        terms |= self.auxiliary(plain, plain, super().decode(codes))
        return Losses(terms, codes, reconstruction)

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """Statistics of a sample; `b_dec` at its geometric median; the variance that the main term is divided by."""
        x = self._normalised(self.inputs(batch))
        if self.modulation == "statistics":
            self.bucket_mean.copy_(x.mean(0).expand_as(self.bucket_mean))
            self.bucket_square.copy_(x.pow(2).mean(0).expand_as(self.bucket_square))
            self._follow(x, self._timesteps(x, batch), decay=0.0)
        plain = self._plain(x, self._timesteps(x, batch))
        super().start({**batch, "acts": {self.spec.input: plain}})
        target = self.target(batch).float()[:32768]
        self.variance.copy_((target - target.mean(0)).pow(2).sum(-1).mean().clamp_min(1e-12))

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """As TopK; then the statistics follow the rows of the step."""
        super().after_step(step, codes)
        if self._seen is not None:
            self._follow(*self._seen)
            self._seen = None

    @torch.no_grad()
    def _follow(self, x: Tensor, timestep: Tensor, decay: float = 0.99) -> None:
        """Let the statistics of the bands that occur follow the rows."""
        rows, place = x.reshape(-1, x.shape[-1]).float(), self._bucket(timestep).reshape(-1)
        counts = torch.bincount(place, minlength=self.n_buckets).to(rows)[:, None]
        for buffer, values in ((self.bucket_mean, rows), (self.bucket_square, rows.pow(2))):
            sums = torch.zeros_like(buffer, dtype=rows.dtype).index_add_(0, place, values)
            new = decay * buffer + (1 - decay) * sums / counts.clamp_min(1)
            buffer.copy_(torch.where(counts > 0, new, buffer))

    @property
    def dictionary(self) -> Tensor:
        """What a code of 1 writes on average over the timesteps `[d_latent, d_in]`; `rows_at` knows it for each."""
        times = torch.linspace(0, self.n_timesteps - 1, 50, device=self.W_dec.device)
        scale, _ = self.scale_and_shift(times)
        return self._written(scale.reshape(-1, scale.shape[-1]).mean(0) if scale.dim() else scale)

    def rows_at(self, timestep: float) -> Tensor:
        """What a code of 1 writes at a timestep `[d_latent, d_in]`."""
        return self._written(self.scale_and_shift(torch.tensor(float(timestep), device=self.W_dec.device))[0])

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Keep the normalisation, which the modulation comes after."""
        own = affine[self.spec.input]
        self.outer_mean.copy_(own.mean)
        self.outer_scale, self.outer_inverse = own.scale.to(self.W_dec), own.inverse_scale().to(self.W_dec)

    # ---- spaces: raw, normalised, plain

    def _normalised(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        x = x[self.spec.input] if isinstance(x, dict) else x
        return Affine(self.outer_mean, self.outer_scale).apply(x.to(self.W_dec.dtype))

    def _raw(self, x: Tensor) -> Tensor:
        return self._out(x) + self.outer_mean

    def _out(self, rows: Tensor) -> Tensor:
        return rows * self.outer_inverse if self.outer_inverse.ndim == 0 else rows @ self.outer_inverse

    def _plain(self, x: Tensor, timestep: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift(timestep)
        return (x - shift) / scale

    def _written(self, scale: Tensor) -> Tensor:
        return self._out(self.decoder_rows * scale)

    def _known(self, codes: Codes) -> Tensor:
        if self.modulation == "none":
            return codes.values.new_zeros(codes.values.shape[:-1])
        if TIMESTEP not in codes.extra:
            raise MmsaeError("these codes have lost their timesteps (`codes.extra`), which Temporal decodes by.")
        return codes.extra[TIMESTEP]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in ("outer_scale", "outer_inverse"):  # a matrix after whitening
            found = state_dict.get(prefix + name)
            if found is not None and found.shape != getattr(self, name).shape:
                setattr(self, name, torch.empty_like(found, device=self.W_dec.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

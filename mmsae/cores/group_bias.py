"""Group bias adaptation (GBA): biases that hold each latent to a firing frequency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import Losses, squared_error
from mmsae.cores.linear import LinearCore, keep_norms, to_unit
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import dense_linear, linear_above, sparse_decode
from mmsae.spec import TARGET, ActivationSpec, Batch


class GroupBias(LinearCore):
    """Controls how often each latent fires instead of pricing codes: group bias adaptation (arXiv 2506.14002).

    Latents form groups whose target frequencies fall geometrically, for frequent and for rare features. Every few
    steps the bias of a latent that fires more often than its target is lowered, that of a silent one raised; biases
    and the centre receive no gradient (a learnt centre would undo the feedback). Encoder and decoder share one unit
    direction per latent, the decoder scales it. The rule is one-sided, so frequencies settle below their targets.

    Presumes rows of similar norm: biases move in units of the root mean square norm of the centred rows, the paper's
    being those of unit rows.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        n_groups: Groups of latents, of equal size.
        highest_frequency: Target of the first group.
        lowest_frequency: Target of the last group.
        every: Steps between two adaptations.
        rate: Step of an adaptation, as a share of the largest pre-activation seen; calls times rate should exceed 2.
        activation: "relu" codes the pre-activation above the bias, "jump_relu" all of it where it exceeds the bias.
    """

    selects_per_latent: ClassVar[bool] = True
    reduce: ClassVar[Mapping[str, str]] = {"latest": "sum", "latest_rows": "sum", "largest": "max"}

    unit: Tensor
    latest: Tensor
    latest_rows: Tensor
    fired: Tensor
    rows: Tensor
    largest: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        n_groups: int = 10,
        highest_frequency: float = 0.5,
        lowest_frequency: float = 1e-3,
        every: int = 50,
        rate: float = 0.01,
        activation: Literal["relu", "jump_relu"] = "relu",
    ) -> None:
        super().__init__(spec, d_latent)
        if TARGET in self.spec.streams:
            raise MmsaeError("GroupBias shares encoder and decoder and cannot be a transcoder: choose TopK.")
        if activation not in ("relu", "jump_relu"):
            raise MmsaeError(f"activation={activation!r} is unknown: choose relu or jump_relu.")
        self.n_groups = checked("n_groups", n_groups, 1, d_latent)
        self.highest_frequency = checked("highest_frequency", highest_frequency, 0, 1)
        self.lowest_frequency = checked("lowest_frequency", lowest_frequency, 1e-9, highest_frequency)
        self.every = checked("every", every, 1)
        self.rate = checked("rate", rate, 0, 1)
        self.activation = activation
        self.gain = nn.Parameter(torch.ones(d_latent))
        for fixed in (self.W_dec, self.b_enc, self.b_dec):
            fixed.requires_grad_(False)
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("latest", torch.zeros(d_latent, dtype=torch.int64))  # firings of the last step
        self.register_buffer("latest_rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fired", torch.zeros(d_latent, dtype=torch.int64))  # since the last adaptation
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(d_latent))

    @property
    def groups(self) -> Tensor:
        """Group of each latent, int64 `[d_latent]`."""
        return torch.arange(self.d_latent, device=self.b_enc.device) * self.n_groups // self.d_latent

    @property
    def target_frequencies(self) -> Tensor:
        """Target of each group `[n_groups]`, falling geometrically."""
        share = torch.arange(self.n_groups, device=self.b_enc.device) / max(self.n_groups - 1, 1)
        return self.highest_frequency * (self.lowest_frequency / self.highest_frequency) ** share

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """What exceeds its bias: a pair list when few do, else dense, since nobody bounds how many."""
        x, table, bias, centre = self.encoder(x)
        found = linear_above(x, table, bias, torch.zeros_like(bias), centre)
        values, indices = found or (self.pre_activations(x), None)
        if self.activation == "relu":
            return Codes(values.relu(), indices, self.d_latent)
        return Codes((values - self._per_entry(bias, indices)) * (values > 0), indices, self.d_latent)

    def _per_entry(self, per_latent: Tensor, indices: Tensor | None) -> Tensor:
        if indices is None:
            return per_latent
        return per_latent.index_select(0, indices.flatten()).view(indices.shape)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction `[..., d_out]`; while training by the encoder's directions, which are the decoder's too."""
        if not self.training:
            return super().decode(codes)
        values = codes.values * self._per_entry(self.gain, codes.indices)
        if codes.indices is None:
            return dense_linear(values, self.W_enc.t()) + self.b_dec
        return sparse_decode(values, codes.indices, self.W_enc) + self.b_dec

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """The centre at the mean, for good; the unit of the biases."""
        x = self.inputs(batch).float()
        self.b_dec.copy_(x.mean(0))
        self.unit.copy_((x - self.b_dec).pow(2).sum(-1).mean().sqrt().clamp_min(1e-12))

    def losses(self, batch: Batch) -> Losses:
        """Half the squared error, and nothing else."""
        codes = self.encode(self.inputs(batch))
        reconstruction = self.decode(codes)
        return Losses({"reconstruction": squared_error(self.inputs(batch), reconstruction) / 2}, codes, reconstruction)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Directions and gains: biases and centre are not the optimizer's."""
        return [{"params": [self.W_enc, self.gain]}]

    @torch.no_grad()
    def before_step(self) -> None:
        """Remove the part of the gradient that would only change the norm of the directions."""
        keep_norms(self.W_enc)

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Unit directions; the books of firing, and with them the biases every few steps.

        What the ranks have joined is that of the steps before, so an adaptation comes one step after its last row.
        """
        to_unit(self.W_enc)
        self.W_dec.copy_(self.gain[:, None] * self.W_enc)
        self.fired += self.latest
        self.rows += self.latest_rows
        if step > 1 and (step - 1) % self.every == 0:
            self._adapt()
        self.latest.copy_(codes.firings())
        self.latest_rows.fill_(codes.values.shape[:-1].numel())
        pre = codes.values
        if self.activation == "jump_relu":
            pre = (pre + self._per_entry(self.b_enc, codes.indices)) * (pre != 0)
        if codes.indices is None:
            self.largest.copy_(torch.maximum(self.largest, pre.reshape(-1, self.d_latent).amax(0)))
        else:
            self.largest.scatter_reduce_(0, codes.indices.flatten(), pre.flatten(), "amax")

    def _adapt(self) -> None:
        """Lower the biases of what fires too often, raise those of what is silent."""
        frequency = self.fired / self.rows.clamp_min(1)
        groups, positive = self.groups, (self.largest > 0).to(self.largest.dtype)
        totals, numbers = (self.largest.new_zeros(self.n_groups).index_add_(0, groups, t)
                           for t in (self.largest, positive))  # fmt: skip
        # where a whole group is silent there is no mean to take, and it must come back all the same
        mean = torch.where(numbers > 0, totals / numbers.clamp_min(1), self.unit)[groups]
        often, silent = frequency > self.target_frequencies[groups], self.fired == 0
        lowered = torch.maximum(self.b_enc - self.rate * self.largest, -self.unit)
        raised = (self.b_enc + self.rate * mean).clamp_max(0)
        self.b_enc.copy_(torch.where(often, lowered, torch.where(silent, raised, self.b_enc)))
        for books in (self.fired, self.rows, self.largest):
            books.zero_()

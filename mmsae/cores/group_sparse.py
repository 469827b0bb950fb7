"""Group-sparse autoencoders of paired streams: GSAE, and MGSAE with random masks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import geometric_median, squared_error
from mmsae.cores.linear import keep_norms, to_unit
from mmsae.cores.shared_dictionary import SharedDictionary, paired_rows
from mmsae.cores.topk import explain
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import dense_linear, linear_topk, sparse_decode
from mmsae.spec import ACTS, ActivationSpec, Batch

NEVER = -1e30
"""Bias of a masked latent: whatever it reads, it is not among the largest, or is cut off at 0."""


class GroupSparse(SharedDictionary):
    """One TopK dictionary for paired streams whose codes shall share their support: GSAE, MGSAE (arXiv 2601.20028).

    The loss of a pair is the sum over streams of the squared errors, plus
    `group_coefficient * sum_i sqrt(sum_s z_s,i^2)` over latents i and streams s. Two codes of one support cost less
    than two of disjoint ones, at most by the root of the number of streams. All streams share W_enc, b_enc and W_dec;
    each has a bias of its own, subtracted before and added after.

    The coefficient presumes rows of norm 1 (`--data.source.unit=true`, `--model.normalise=none`) or some other scale
    that stays. Rows whose `pair_id` is below 0 do not pay the penalty (`--data.columns=[pair_id]` brings it along).

    Args:
        spec: Widths of the streams, all of them equal.
        d_latent: Number of latents.
        k: Latents kept per stream and row.
        group_coefficient: Price of a unit of group norm; 0 is a plain TopK on the union of the streams.
        mask_probability: Share of latents that a training step does without, in all streams alike; 0.2 is MGSAE.
        mask_scope: A mask for the whole batch of a "step", or for each pair, "sample", which computes all
            pre-activations.
        aux_coefficient: Weight of AuxK; 0, the default, leaves dead latents alone, as their number is a result here.
        k_aux: Dead latents used per row by AuxK; None is half of the width.
        dead_after: Pairs (over all ranks) without firing in any stream after which a latent counts as dead.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        group_coefficient: float = 0.05,
        mask_probability: float = 0.0,
        mask_scope: Literal["step", "sample"] = "step",
        aux_coefficient: float = 0.0,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(spec, d_latent)
        widths = self.spec.streams
        if len(set(widths.values())) > 1:
            has = ", ".join(f"{name} ({width})" for name, width in widths.items())
            raise MmsaeError(
                f"GroupSparse has one dictionary for all streams, which must be of one width, but the data have {has}: "
                "take embeddings of a common space, or train VLSAE on the AlignmentAutoencoder's."
            )
        if k > d_latent:
            raise MmsaeError(f"k={k} is larger than d_latent={d_latent}: choose k of at most {d_latent}.")
        self.k = checked("k", k, 1)
        self.group_coefficient = checked("group_coefficient", group_coefficient, 0)
        self.mask_probability = checked("mask_probability", mask_probability, 0, 1)
        self.mask_scope = mask_scope
        self.aux_coefficient = checked("aux_coefficient", aux_coefficient, 0)
        self.k_aux = k_aux if k_aux is None else checked("k_aux", k_aux, 1)
        self.dead_after = checked("dead_after", dead_after, 1)
        rows = torch.randn(d_latent, self.spec.d_in)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=-1, keepdim=True))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(d_latent))
        self.b_dec = nn.Parameter(torch.zeros(len(widths), self.spec.d_in))

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """The bias of each stream at the geometric median of at most 32,768 rows."""
        for number, stream in enumerate(self.outputs):
            self.b_dec[number] = geometric_median(batch[ACTS][stream].float()[:32768])

    def code(self, number: int, x: Tensor) -> Codes:
        """The positive part of the k largest."""
        return self._topk(number, x, self.b_enc)

    def _topk(self, number: int, x: Tensor, bias: Tensor) -> Codes:
        values, indices = linear_topk(x, self.W_enc, bias, self.k, self.b_dec[number])
        return Codes(values.relu(), indices, self.d_latent)

    def codes_of(self, x: list[Tensor]) -> list[Codes]:
        """Masks, the same for all streams, while training."""
        if not (self.training and self.mask_probability):
            return super().codes_of(x)
        if self.mask_scope == "step":
            dropped = torch.rand(self.d_latent, device=x[0].device) < self.mask_probability
            bias = self.b_enc.masked_fill(dropped, NEVER)
            return [self._topk(number, part, bias) for number, part in enumerate(x)]
        kept = torch.rand(*x[0].shape[:-1], self.d_latent, device=x[0].device) >= self.mask_probability
        found = []
        for number, part in enumerate(x):
            masked = dense_linear(part - self.b_dec[number], self.W_enc, self.b_enc).relu() * kept
            found.append(Codes(*masked.topk(self.k, dim=-1, sorted=False), self.d_latent))
        return found

    def write(self, number: int, codes: Codes) -> Tensor:
        """From the shared rows and the bias of the stream."""
        bias = self.b_dec[number]
        if codes.indices is None:
            return dense_linear(codes.values, self.W_dec.t()) + bias
        return sparse_decode(codes.values, codes.indices, self.W_dec) + bias

    def rows(self, number: int) -> Tensor:
        """The same for all streams."""
        return self.W_dec

    def terms(self, x: list[Tensor], out: list[Tensor], codes: list[Codes], batch: Batch) -> dict[str, Tensor]:
        """Squared errors, the group penalty of paired rows, AuxK if wanted; each a mean over all rows."""
        errors = [squared_error(target, part) for target, part in zip(x, out, strict=True)]
        terms = {"reconstruction": torch.stack(errors).sum()}
        if self.group_coefficient:
            norms = group_norm(codes) * paired_rows(batch, x[0])
            terms["group"] = self.group_coefficient * norms.mean()
        if self.aux_coefficient and self.training:
            centred = torch.cat([part - bias for part, bias in zip(x, self.b_dec, strict=True)])
            residual = torch.cat([target - part for target, part in zip(x, out, strict=True)]).detach()
            k_aux = self.k_aux or max(self.spec.d_in // 2, 1)
            dead, tables = self.dead_latents(self.dead_after), (self.W_enc, self.b_enc, self.W_dec)
            terms["aux"] = self.aux_coefficient * explain(residual, centred, *tables, dead, k_aux)
        return terms

    @torch.no_grad()
    def before_step(self) -> None:
        """Remove the part of the decoder gradient that would only change the norm of unit rows."""
        keep_norms(self.W_dec)

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Back to unit rows."""
        to_unit(self.W_dec)


def group_norm(codes: list[Codes], epsilon: float = 1e-12) -> Tensor:
    """`sum_i sqrt(sum_s z_s,i^2)` over latents i and streams s, from pair lists alone.

    The pairs of a row are sorted by latent, so that those of one latent meet. `epsilon` gives a latent that is silent
    in all streams a slope of 0.

    Args:
        codes: Of each stream, `[..., k]`.
        epsilon: Added below the root; its own root is subtracted again.

    Returns:
        `[...]`.
    """
    parts = [own.sparse() for own in codes]
    latents, order = torch.cat([own.indices for own in parts], -1).sort(dim=-1)  # type: ignore[misc]
    squares = torch.cat([own.values for own in parts], -1).gather(-1, order).pow(2)
    new = torch.ones_like(latents)
    new[..., 1:] = latents[..., 1:] != latents[..., :-1]
    sums = torch.zeros_like(squares).scatter_add(-1, new.cumsum(-1) - 1, squares)
    return ((sums + epsilon).sqrt() - epsilon**0.5).sum(-1)

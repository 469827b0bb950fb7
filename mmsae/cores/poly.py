"""PolySAE: a linear encoder and a polynomial decoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import dense_linear, sparse_decode
from mmsae.spec import ActivationSpec


class PolySAE(TopK):
    """TopK with a decoder of second and third order, for features that bind (arXiv 2602.01322).

    `a = codes @ U` with orthonormal columns, `reconstruction = a @ C1.T + l2 a[:rank2]^2 @ C2.T + l3 a[:rank3]^3 @
    C3.T + b_dec`: a pair of latents adds its own direction when both fire, without a latent for the compound. That
    shows where latents are scarce; with plenty, compounds get latents of their own and the higher orders die. What
    presumes a linear decoder (steering by a row, absorption) sees the first order only.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents, at least `rank`.
        k: Latents kept per activation.
        rank: Columns of U; None is the width that is reconstructed.
        rank2: How many of them enter squared; a bound pair takes two. 0 leaves the second order out.
        rank3: How many of them enter cubed; 0 leaves the third order out.
        aux_coefficient: Weight of AuxK, which sees the first order alone; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
        retract_every: Steps between two returns of U to orthonormal columns, which cost `2 d_latent rank^2` each.
    """

    linear_decode: ClassVar[bool] = False

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 64,
        rank: int | None = None,
        rank2: int = 64,
        rank3: int = 64,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
        retract_every: int = 1,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        self.decoder_norm = "free"
        d_out = self.spec.d_out
        self.rank = checked("rank", d_out if rank is None else rank, 1)
        if self.rank > d_latent:
            raise MmsaeError(f"d_latent={d_latent} is less than rank={self.rank}: choose a smaller rank.")
        self.rank2 = checked("rank2", rank2, 0, self.rank)
        self.rank3 = checked("rank3", rank3, 0, self.rank)
        self.retract_every = checked("retract_every", retract_every, 1)
        del self.W_dec  # what follows takes its place: `decoder_rows`
        self.U = nn.Parameter(torch.linalg.qr(torch.randn(d_latent, self.rank))[0])
        orders = ((2 * torch.rand(d_out, n) - 1) * (6 / max(n, 1)) ** 0.5 for n in (self.rank, rank2, rank3))
        self.C1, self.C2, self.C3 = (nn.Parameter(weights) for weights in orders)
        self.l2 = nn.Parameter(torch.tensor(-0.5))
        self.l3 = nn.Parameter(torch.tensor(0.5))
        if self.spec.d_in == d_out:
            rows = self.dictionary.detach()
            self.W_enc.data = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-8)

    @property
    def decoder_rows(self) -> Tensor:
        """First-order directions `U @ C1.T` `[d_latent, d_out]`; their norms are free."""
        return dense_linear(self.U, self.C1)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction `[..., d_out]`."""
        if codes.indices is None:
            a = dense_linear(codes.values, self.U.t())
        else:
            a = sparse_decode(codes.values, codes.indices, self.U)  # [..., rank]
        out = dense_linear(a, self.C1, self.b_dec)
        if self.rank2:
            out = out + self.l2 * dense_linear(a[..., : self.rank2].pow(2), self.C2)
        if self.rank3:
            out = out + self.l3 * dense_linear(a[..., : self.rank3].pow(3), self.C3)
        return out

    def interactions(self, one: Tensor, other: Tensor) -> Tensor:
        """What pairs of latents add beyond their sum, per product of their codes.

        Args:
            one: Latents, int64 `[n]`.
            other: Their partners, int64 `[n]`.

        Returns:
            Second-order directions `[n, d_out]`.
        """
        columns = self.U[:, : self.rank2]
        return 2 * self.l2 * (columns[one] * columns[other]) @ self.C2.t()

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Orthonormal columns again, by QR with the signs that keep them where they were."""
        if step % self.retract_every == 0:
            q, r = torch.linalg.qr(self.U)
            self.U.copy_(q * torch.where(r.diagonal() < 0, -1.0, 1.0))

    @torch.no_grad()
    def finish(self) -> None:
        """Orthonormal columns, whatever `retract_every` is."""
        self.after_step(0, Codes(self.b_enc.new_zeros(0, 1), None, self.d_latent))

    def written(self) -> tuple[Tensor, ...]:
        """The three maps of the decoder; codes keep their unit."""
        return self.C1.t(), self.C2.t(), self.C3.t()

"""Dictionaries without sparse training, behind the same interface, so that every table can hold them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.linear import LinearCore
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import linear_topk
from mmsae.spec import ActivationSpec, Batch


class _Baseline(LinearCore):
    """A fixed linear map whose signed codes may be cut to the k of largest magnitude.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Codes kept per row, by magnitude; None keeps all.
    """

    gradient_free: ClassVar[bool] = True
    signed: ClassVar[bool] = True
    selects_per_latent: ClassVar[bool] = False

    def __init__(self, spec: ActivationSpec | int, d_latent: int, k: int | None = None) -> None:
        super().__init__(spec, d_latent)
        self.k = k if k is None else checked("k", k, 1, d_latent)
        self.requires_grad_(False)

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """All codes, or the k of largest magnitude with their sign."""
        if self.k is None:
            return Codes(self.pre_activations(x), None, self.d_latent)
        x, table, bias, centre = self.encoder(x)
        return Codes(*linear_topk(x, table, bias, self.k, centre, signed=True), self.d_latent)

    def partial_fit(self, batch: Batch) -> None:
        """Nothing to learn."""


class Neurons(_Baseline):
    """The activations themselves: latent i is dimension i.

    Args:
        spec: Widths of the streams.
        d_latent: Must be the width; None takes it.
        k: Codes kept per row, by magnitude; None keeps all.
    """

    def __init__(self, spec: ActivationSpec | int, d_latent: int | None = None, k: int | None = None) -> None:
        width = ActivationSpec.of(spec).d_in
        if d_latent not in (None, width):
            raise MmsaeError(f"d_latent={d_latent} does not fit Neurons of width {width}: leave it out.")
        super().__init__(spec, width, k)
        self.W_dec.data = torch.eye(width)
        self.W_enc.data = torch.eye(width)


class RandomDictionary(_Baseline):
    """Random unit directions, encoder and decoder alike: the floor for any claim about learnt latents.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Codes kept per row, by magnitude; None keeps all.
        seed: Of the directions.
    """

    def __init__(self, spec: ActivationSpec | int, d_latent: int, k: int | None = None, seed: int = 0) -> None:
        super().__init__(spec, d_latent, k)
        self.seed = seed
        rows = torch.randn(d_latent, self.spec.d_out, generator=torch.Generator().manual_seed(seed))
        rows /= rows.norm(dim=-1, keepdim=True)
        self.W_dec.data = rows
        self.W_enc.data = rows.clone()


class PCA(_Baseline):
    """Principal components, of largest variance first, from one pass in float64.

    Args:
        spec: Widths of the streams.
        d_latent: Number of components, at most the width; None takes all.
        k: Codes kept per row, by magnitude; None keeps all.
    """

    total: Tensor
    products: Tensor

    def __init__(self, spec: ActivationSpec | int, d_latent: int | None = None, k: int | None = None) -> None:
        width = ActivationSpec.of(spec).d_in
        super().__init__(spec, checked("d_latent", d_latent or width, 1, width), k)
        self.register_buffer("total", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(width, width, dtype=torch.float64))

    @torch.no_grad()
    def partial_fit(self, batch: Batch) -> None:
        """Add the rows to the moments."""
        x = self.inputs(batch).double()
        self.total += x.sum(0)
        self.products += x.T @ x

    @torch.no_grad()
    def finish(self) -> None:
        """Diagonalise the covariance."""
        if self.rows_seen == 0:
            raise MmsaeError("PCA has seen no rows: call partial_fit and count first.")
        mean = self.total / self.rows_seen
        covariance = self.products / self.rows_seen - mean.outer(mean)
        components = torch.linalg.eigh(covariance).eigenvectors.flip(-1).T[: self.d_latent]
        self.W_dec.copy_(components)
        self.W_enc.copy_(components)
        self.b_dec.copy_(mean)

"""Factorisations of scikit-learn behind the interface of a sparse dictionary, so that every table can hold them."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.semi_nmf import nonnegative
from mmsae.cores.whole_matrix import WholeMatrix
from mmsae.errors import checked
from mmsae.kernels import linear_topk
from mmsae.spec import ActivationSpec, Batch


class KMeans(WholeMatrix):
    """Centres of clusters; one latent fires per row, with 1.

    Args:
        spec: Widths of the streams.
        d_latent: Number of centres.
        n_starts: Starts of scikit-learn's algorithm, of which the best is kept.
        max_rows: Rows that are clustered; later ones are ignored.
        seed: Of the starts.
    """

    centres_input: ClassVar[bool] = False

    def __init__(
        self, spec: ActivationSpec | int, d_latent: int, n_starts: int = 1, max_rows: int = 65536, seed: int = 0
    ) -> None:
        super().__init__(spec, d_latent, max_rows)
        self.n_starts = checked("n_starts", n_starts, 1)
        self.seed = seed
        self.decoder_norm = "free"  # a centre has the norm of its cluster

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """The nearest centre: the one with the largest `<x, c> - ||c||^2 / 2`."""
        x, table, bias, centre = self.encoder(x)
        values, indices = linear_topk(x, table, bias, 1, centre, signed=False)
        return Codes(torch.ones_like(values), indices, self.d_latent)

    @torch.no_grad()
    def fit_rows(self, x: Tensor) -> None:
        """By scikit-learn."""
        from sklearn.cluster import KMeans as Reference

        fitted = Reference(self.d_latent, n_init=self.n_starts, random_state=self.seed).fit(x.cpu().numpy())
        centres = torch.from_numpy(fitted.cluster_centers_).to(x)
        self.W_dec.copy_(centres)
        self.W_enc.copy_(centres)
        self.b_enc.copy_(-centres.pow(2).sum(-1) / 2)


class NMF(WholeMatrix):
    """Non-negative matrix factorisation: parts that only add up.

    Fitted to the positive part of the rows, since it presumes that nothing is negative: activations behind a ReLU,
    with `--model.normalise=none` or `scale`. Codes are those of least error that are not negative.

    Args:
        spec: Widths of the streams.
        d_latent: Number of parts.
        k: Codes kept per row; None keeps all.
        max_iterations: Of scikit-learn's algorithm.
        encode_iterations: Multiplicative updates that rows get when they are encoded.
        max_rows: Rows that are factored; later ones are ignored.
        seed: Of the start.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int | None = None,
        max_iterations: int = 200,
        encode_iterations: int = 100,
        max_rows: int = 65536,
        seed: int = 0,
    ) -> None:
        super().__init__(spec, d_latent, max_rows)
        self.k = k if k is None else checked("k", k, 1, d_latent)
        self.max_iterations = checked("max_iterations", max_iterations, 1)
        self.encode_iterations = checked("encode_iterations", encode_iterations, 0)
        self.seed = seed

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """Non-negative codes, all or the k largest."""
        values = nonnegative(self.pre_activations(x), self.W_enc, self.W_dec, self.encode_iterations)
        return _cut(values, self.k)

    @torch.no_grad()
    def fit_rows(self, x: Tensor) -> None:
        """By scikit-learn; decoder rows get norm 1."""
        from sklearn.decomposition import NMF as Reference

        negative = float((x < 0).float().mean())
        if negative:
            warnings.warn(
                f"NMF presumes non-negative activations, but {negative:.0%} are negative and were taken as 0: train it "
                "with --model.normalise=none behind a ReLU.",
                stacklevel=2,
            )
        model = Reference(self.d_latent, max_iter=self.max_iterations, random_state=self.seed)
        parts = _fitted(model, x.relu()).components_
        rows = torch.from_numpy(parts).to(x)
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        self.W_dec.copy_(rows)
        self.W_enc.copy_(rows)


class ICA(WholeMatrix):
    """Independent components (FastICA with tanh): directions whose codes are as independent as can be.

    Args:
        spec: Widths of the streams.
        d_latent: Number of components, at most the width; None takes all.
        k: Codes kept per row, by magnitude; None keeps all.
        max_iterations: Of scikit-learn's algorithm.
        max_rows: Rows that are used; later ones are ignored.
        seed: Of the start.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int | None = None,
        k: int | None = None,
        max_iterations: int = 200,
        max_rows: int = 65536,
        seed: int = 0,
    ) -> None:
        width = ActivationSpec.of(spec).d_in
        super().__init__(spec, checked("d_latent", width if d_latent is None else d_latent, 1, width), max_rows)
        self.k = k if k is None else checked("k", k, 1, self.d_latent)
        self.max_iterations = checked("max_iterations", max_iterations, 1)
        self.seed = seed

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """All components, or the k of largest magnitude."""
        if self.k is None:
            return Codes(self.pre_activations(x), None, self.d_latent)
        x, table, bias, centre = self.encoder(x)
        return Codes(*linear_topk(x, table, bias, self.k, centre, signed=True), self.d_latent)

    @torch.no_grad()
    def fit_rows(self, x: Tensor) -> None:
        """By scikit-learn; directions are the rows of the pseudo-inverse, at norm 1."""
        from sklearn.decomposition import FastICA as Reference

        model = Reference(
            self.d_latent, whiten="unit-variance", max_iter=self.max_iterations, random_state=self.seed
        )  # the tanh of the paper is its default
        fitted = _fitted(model, x.double())
        directions = torch.from_numpy(fitted.mixing_.T).to(x)
        norms = directions.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        self.W_dec.copy_(directions / norms)
        self.W_enc.copy_(torch.from_numpy(fitted.components_).to(x) * norms)
        self.b_dec.copy_(torch.from_numpy(fitted.mean_).to(x))


def _fitted(model: Any, x: Tensor) -> Any:
    """A fitted factorisation; scikit-learn's words about convergence become advice."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x.cpu().numpy())
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn(warning.message, stacklevel=3)
            continue
        name = {"FastICA": "ICA"}.get(type(model).__name__, type(model).__name__)
        advice = f"{name} did not converge in {model.max_iter} iterations: give it more max_iterations."
        warnings.warn(advice, stacklevel=3)
    return model


def _cut(values: Tensor, k: int | None) -> Codes:
    """Dense codes, or the k largest of each row."""
    if k is None:
        return Codes(values, None, values.shape[-1])
    best = values.topk(k, dim=-1, sorted=False)
    return Codes(best.values, best.indices, values.shape[-1])

"""Semi-nonnegative matrix factorisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.whole_matrix import WholeMatrix
from mmsae.errors import checked
from mmsae.spec import ActivationSpec, Batch

RIDGE = 1e-6


class SemiNMF(WholeMatrix):
    """Sparse groups of neurons with signs, and non-negative codes (SNMF, arXiv 2506.10920).

    `rows = G @ W_dec` with G >= 0; codes are dense, as this factorisation is. Codes are updated by multiplication, the
    dictionary by least squares, after which each latent keeps only its neurons of largest weight. That choice makes
    the error go up at times, so the best factors seen are kept; starts differ, so the best of a few is. New rows are
    encoded by the same updates with the dictionary held fixed. Meant for hidden activations of an MLP as they are
    (`--model.normalise=none`).

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        neurons: Share of the neurons that a latent may use; 1 lets it use all.
        max_iterations: Iterations of a start at most.
        patience: Iterations without improvement after which a start ends.
        tolerance: What counts as improvement, as a share of the squared norm of all rows.
        n_starts: Random starts.
        encode_iterations: Updates that new rows get.
        max_rows: Rows that are factored; later ones are ignored.
        seed: Of the starts.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        neurons: float = 0.01,
        max_iterations: int = 200_000,
        patience: int = 1500,
        tolerance: float = 1e-4,
        n_starts: int = 3,
        encode_iterations: int = 100,
        max_rows: int = 65536,
        seed: int = 0,
    ) -> None:
        super().__init__(spec, d_latent, max_rows)
        self.neurons = checked("neurons", neurons, 0, 1)
        self.max_iterations = checked("max_iterations", max_iterations, 1)
        self.patience = checked("patience", patience, 1)
        self.tolerance = checked("tolerance", tolerance, 0)
        self.n_starts = checked("n_starts", n_starts, 1)
        self.encode_iterations = checked("encode_iterations", encode_iterations, 0)
        self.seed = seed

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """Non-negative codes of least error; those below a ten-thousandth of the row's largest are 0."""
        values = nonnegative(self.pre_activations(x), self.W_enc, self.W_dec, self.encode_iterations)
        return Codes(values, None, self.d_latent)

    @torch.no_grad()
    def fit_rows(self, x: Tensor) -> None:
        """The best of some starts; decoder rows get norm 1."""
        g = torch.Generator().manual_seed(self.seed)
        best = math.inf
        for _ in range(self.n_starts):
            codes = torch.rand(len(x), self.d_latent, generator=g).to(x)
            loss, dictionary = self.factor(x, codes)
            if loss < best:
                best, winner = loss, dictionary
        rows = winner / winner.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        self.W_dec.copy_(rows)
        self.W_enc.copy_(rows)

    def factor(self, x: Tensor, codes: Tensor) -> tuple[float, Tensor]:
        """Squared error and dictionary `[d_latent, d]` of the best iteration from a start `[n, d_latent]`."""
        best, found, waited = math.inf, codes.new_zeros(self.d_latent, x.shape[1]), 0
        scale = float(x.pow(2).sum())
        for _ in range(self.max_iterations):
            codes, dictionary = self.iteration(x, codes)
            loss = float((x - codes @ dictionary).pow(2).sum())
            waited = 0 if loss < best - self.tolerance * scale else waited + 1
            if loss < best:
                best, found = loss, dictionary
            if waited >= self.patience:
                break
        return best, found

    def iteration(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """One update of both factors: codes `[n, d_latent]` and dictionary `[d_latent, d]`."""
        gram = codes.T @ codes
        gram.diagonal().add_(RIDGE)
        dictionary = torch.linalg.solve(gram, codes.T @ x)
        kept = math.ceil(self.neurons * x.shape[1])
        if kept < x.shape[1]:
            best = dictionary.abs().topk(max(kept, 1), dim=-1).indices
            dictionary = torch.zeros_like(dictionary).scatter_(-1, best, dictionary.gather(-1, best))
        norms = codes.norm(dim=0).clamp_min(1e-12)
        codes, dictionary = codes / norms, dictionary * norms[:, None]
        return _updated(codes, x @ dictionary.T, dictionary @ dictionary.T), dictionary


def nonnegative(products: Tensor, table: Tensor, dictionary: Tensor, n_iterations: int) -> Tensor:
    """Codes >= 0 of least squared error by multiplicative updates, from the positive part of the least squares.

    Args:
        products: Of the rows with the dictionary, in normalised units, `[..., d_latent]`.
        table: Encoder rows `[d_latent, d]`.
        dictionary: Decoder rows; `table @ dictionary.T` is the same before and after a normalisation is folded in.
        n_iterations: Updates.

    Returns:
        `[..., d_latent]`; what is below a ten-thousandth of the largest of its row is 0.
    """
    shape, products = products.shape, products.reshape(-1, products.shape[-1])
    with torch.autocast(products.device.type, enabled=False):
        gram = table @ dictionary.T
        # every guard is in proportion to the data, so that codes change unit exactly as the data do
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
        codes = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), products.T).T.relu()
        codes = codes + RIDGE * codes.amax(-1, keepdim=True)
        for _ in range(n_iterations):
            codes = _updated(codes, products, gram)
    codes = codes * (codes > 1e-4 * codes.amax(-1, keepdim=True))
    return codes.view(shape)


def _updated(codes: Tensor, products: Tensor, gram: Tensor) -> Tensor:
    """The multiplicative update of Ding, Li and Jordan (2010); it never raises the error."""
    gain = products.relu() + codes @ (-gram).relu()
    loss = (-products).relu() + codes @ gram.relu()
    return codes * (gain / loss.clamp_min(1e-20)).sqrt()

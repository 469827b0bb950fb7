"""Matryoshka BatchTopK."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.batch_topk import BatchTopK
from mmsae.errors import MmsaeError
from mmsae.kernels import nested_error, sparse_decode_groups
from mmsae.spec import ActivationSpec


class Matryoshka(BatchTopK):
    """BatchTopK whose first latents must reconstruct by themselves (arXiv 2503.17547; MAIRA-2, 2507.12950).

    The main term is the mean FVU over nested prefixes of one code; early latents become general, and children do not
    absorb their parents. All prefixes together cost one decode.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Latents kept per activation, on average over a batch.
        prefixes: Shares of the dictionary, ascending, ending in 1.
        aux_coefficient: Weight of AuxK; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
        threshold_decay: Decay per step of the running mean behind the inference threshold.
    """

    prefix_ends: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        prefixes: Sequence[float] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
        threshold_decay: float = 0.99,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after, threshold_decay)
        ends = [round(share * d_latent) for share in prefixes]
        if not ends or ends[0] < 1 or ends[-1] != d_latent or sorted(set(ends)) != ends:
            raise MmsaeError(
                f"prefixes={list(prefixes)} must ascend to 1 and hold at least one more latent each; "
                f"with d_latent={d_latent} they end at {ends}."
            )
        self.prefixes = list(prefixes)
        self.register_buffer("prefix_ends", torch.tensor(ends), persistent=False)

    def reconstruct(self, target: Tensor, codes: Codes) -> tuple[dict[str, Tensor], Tensor]:
        """Mean over the prefixes; the reconstruction is that of the whole code."""
        codes = codes.sparse()
        assert codes.indices is not None
        groups = sparse_decode_groups(codes.values, codes.indices, self.W_dec, self.prefix_ends)
        error, reconstruction = nested_error(groups, self.b_dec, target)
        return {"reconstruction": error / self.variance}, reconstruction

    def decode_prefix(self, codes: Codes, n_latents: int) -> Tensor:
        """Reconstruction from the first `n_latents` latents alone, `[..., d_out]`."""
        codes = codes.sparse()
        assert codes.indices is not None
        return self.decode(Codes(codes.values * (codes.indices < n_latents), codes.indices, self.d_latent))

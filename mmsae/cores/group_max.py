"""GroupMax."""

from __future__ import annotations

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError
from mmsae.kernels import dense_linear
from mmsae.kernels.pairs import Pairs
from mmsae.kernels.products import encode_pairs
from mmsae.spec import ActivationSpec, Batch

CHUNK = 1 << 21  # pre-activations held at a time


class GroupMax(TopK):
    """Keeps the largest pre-activation of each of k groups of consecutive latents (EleutherAI's sparsify).

    Nothing is sorted, and latents of one group exclude each other: a code is k symbols from alphabets of
    `d_latent / k`. Features that occur together must lie in different groups, which training hardly brings
    about, so expect a worse reconstruction than TopK's, also of data that are made of such alternatives.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents, a multiple of k.
        k: Number of groups.
        aux_coefficient: Weight of AuxK, the share of the residual that dead latents fail to explain; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        if d_latent % k:
            raise MmsaeError(f"d_latent={d_latent} is not a multiple of k={k}, so the groups would differ in size.")

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """The best of each group, its positive part; group g at place g of the pair list."""
        x, table, bias, centre = self.encoder(x)
        rows = x.reshape(-1, x.shape[-1])
        with torch.no_grad():
            first = torch.arange(0, self.d_latent, self.d_latent // self.k, device=x.device)
            best = [
                dense_linear(part if centre is None else part - centre, table, bias).unflatten(-1, (self.k, -1)).max(-1)
                for part in rows.split(max(1, CHUNK // self.d_latent))
            ]
            indices = (torch.cat([found.indices for found in best]) + first).view(*x.shape[:-1], self.k)
            known = torch.cat([found.values for found in best]).flatten()
        pairs = Pairs.of(indices, self.d_latent)
        # in low precision the choice is made there, but the values are not
        exact = known if not torch.is_autocast_enabled(x.device.type) else None
        values = encode_pairs(rows, table, bias, pairs, centre, exact)
        return Codes(values.relu().view(indices.shape), indices, self.d_latent)

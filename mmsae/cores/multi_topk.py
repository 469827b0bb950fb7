"""TopK that also reconstructs from more latents."""

from __future__ import annotations

from mmsae.codes import Codes
from mmsae.cores.base import Losses
from mmsae.cores.topk import TopK
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import linear_topk
from mmsae.spec import ActivationSpec, Batch


class MultiTopK(TopK):
    """TopK trained at two sparsities at once, so that k may be raised afterwards (arXiv 2406.04093, section on
    progressive codes).

    Adds `multi_coefficient` times the FVU of the `multiple * k` largest pre-activations. The dictionary then encodes
    by the k largest; the attribute `k` may be set to anything up to `multiple * k` without a loss of reconstruction.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        k: Latents kept per activation.
        multiple: How many times k the wider code keeps.
        multi_coefficient: Weight of the wider code; 0 is TopK.
        aux_coefficient: Weight of AuxK, the share of the residual that dead latents fail to explain; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 32,
        multiple: int = 4,
        multi_coefficient: float = 1 / 8,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(spec, d_latent, k, aux_coefficient, k_aux, dead_after)
        self.multiple = checked("multiple", multiple, 2)
        self.multi_coefficient = checked("multi_coefficient", multi_coefficient, 0)
        if multiple * k > d_latent:
            raise MmsaeError(
                f"multiple={multiple} times k={k} is larger than d_latent={d_latent}: lower one of them or use TopK."
            )

    def losses(self, batch: Batch) -> Losses:
        """The terms of TopK, and the FVU of the wider code; both codes come from one selection."""
        x, target = self.inputs(batch), self.target(batch)
        rows, table, bias, centre = self.encoder(x)
        values, indices = linear_topk(rows, table, bias, self.multiple * self.k, centre)
        best = values.detach().topk(self.k, dim=-1, sorted=False).indices
        codes = Codes(values.gather(-1, best).relu(), indices.gather(-1, best), self.d_latent)
        terms, reconstruction = self.reconstruct(target, codes)
        wider = self.reconstruct(target, Codes(values.relu(), indices, self.d_latent))[0]
        terms["multi"] = self.multi_coefficient * wider["reconstruction"]
        terms |= self.auxiliary(x, target, reconstruction)
        return Losses(terms, codes, reconstruction)

"""AbsTopK: latents with two directions."""

from __future__ import annotations

from typing import ClassVar

from mmsae.cores.topk import TopK


class AbsTopK(TopK):
    """Keeps the k pre-activations of largest magnitude, with their sign (arXiv 2510.00404).

    A concept and its opposite share one latent. One proximal step from z = 0 on a reconstruction error gives ReLU where
    the price is L1 on non-negative codes, and TopK where it is a bound on their number; without non-negativity that
    bound gives AbsTopK. The signed AuxK is ours, the paper has none.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents; the paper's is 16 times the width.
        k: Latents kept per activation; the paper's is about a tenth of the width.
        aux_coefficient: Weight of AuxK, the share of the residual that dead latents fail to explain; 0 switches it off.
        k_aux: Dead latents used per row; None is half of the width that is reconstructed.
        dead_after: Rows (over all ranks) without firing after which a latent counts as dead.
    """

    signed: ClassVar[bool] = True

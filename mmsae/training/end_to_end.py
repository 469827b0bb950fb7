"""Training a dictionary for what the model does with its reconstructions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmsae.cores.base import squared_error, variance
from mmsae.errors import MmsaeError
from mmsae.layout import to_positions
from mmsae.spec import ACTS, Batch

if TYPE_CHECKING:
    from mmsae.sources import Source


@dataclass
class EndToEnd:
    """The model's predictions with reconstructions in place of activations (arXiv 2405.12241).

    Each step runs the model as it is, which gives the activations, and once more with each dictionary spliced in,
    differentiated from the output back to the dictionary. Sparsity and auxiliary terms of the core stay as they are.

    Args:
        loss: "kl", the divergence from the clean predictions; or "ce", the model's own loss. Both in nats, averaged
            over all that is predicted.
        weight: Of this loss.
        local: Weight of the core's own reconstruction term; 0 as in the paper, which then leaves the activations free.
        downstream: Hook points behind the dictionary whose activations must be kept too ("e2e+ds").
        downstream_weight: Of their squared error, as a share of their variance, averaged over these points.
    """

    loss: Literal["kl", "ce"] = "kl"
    weight: float = 1.0
    local: float = 0.0
    downstream: list[str] = field(default_factory=list)
    downstream_weight: float = 1.0

    def check(self, source: Source | None) -> None:
        """Refuse what cannot be spliced, before any work."""
        if source is None:
            raise MmsaeError("end-to-end training runs the model in every step: give data.source.")
        if source.positions == "mean":
            raise MmsaeError("a mean over positions cannot be put back into the model: set positions=all.")
        if self.downstream:
            source.check_points(self.downstream)

    def run(self, source: Source, inputs: dict[str, Any]) -> Downstream:
        """The clean pass over collated examples."""
        rows, clean, further = source.run(inputs, self.downstream)
        return Downstream(self, source, inputs, rows, clean, further)


@dataclass
class Downstream:
    """One batch of examples: the rows to encode, and the loss of what is put in their place.

    Attributes:
        rows: As `Source.read` gives them.
        clean: What the model returned.
        further: Activations at the points behind.
    """

    settings: EndToEnd
    source: Source
    inputs: dict[str, Any]
    rows: Batch
    clean: Any
    further: dict[str, Tensor]

    def adjust(self, terms: dict[str, Tensor], replacements: dict[str, Tensor]) -> None:
        """Weigh the local term and add those of the model.

        Args:
            terms: Of the core; changed in place.
            replacements: Hook point to rows, in the units of the model, that depend on the dictionary.
        """
        settings, source, inputs = self.settings, self.source, self.inputs
        if unknown := [s for s in replacements if s not in self.rows[ACTS]]:
            raise MmsaeError(f"the reconstruction of {unknown[0]!r} stands for no hook point of the model.")
        local = terms.pop("reconstruction", None)
        if local is not None and settings.local:
            terms["reconstruction"] = settings.local * local
        put = {stream: partial(_instead, rows) for stream, rows in replacements.items()}
        with source.spliced(inputs, put, settings.downstream) as found:
            output = source.forward(inputs)
        if settings.loss == "kl":
            loss = source.divergence(output, self.clean, inputs)
        else:
            loss = source.loss(output, inputs) / len(source.predictions(output, inputs)[0])
        terms[settings.loss] = settings.weight * loss
        if self.further:
            shares = [self._share(self.further[name], found[name]) for name in self.further]
            terms["downstream"] = settings.downstream_weight * torch.stack(shares).mean()

    def _share(self, clean: Tensor, spliced: Tensor) -> Tensor:
        """Squared error over variance, positions and examples alike."""
        clean, spliced = (to_positions(x.float(), self.source.channels_last)[0].flatten(0, 1) for x in (clean, spliced))
        return squared_error(clean, spliced) / variance(clean).clamp_min(1e-12)


def _instead(rows: Tensor, _: Tensor) -> Tensor:
    return rows

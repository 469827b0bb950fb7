"""ReLU with an Lp price whose p falls during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores.base import Losses, squared_error
from mmsae.cores.relu import ReLU
from mmsae.errors import MmsaeError, checked
from mmsae.spec import ActivationSpec, Batch

WINDOW = 10  # steps over which the price is measured before p changes
FLOOR = 0.1  # below it the slope at small codes is beyond any use
SMALL = 1e-6  # z^p has no slope at 0


class PAnneal(ReLU):
    """ReLU that pays `sum z^p` with p annealed from 1, an L1, towards 0, a count (arXiv 2408.00113).

    p falls in `n_updates` equal steps; each time the coefficient is changed so that the price stays what it was.
    Presumes activations scaled to a mean squared norm of `d_in` (`--model.normalise=center_scale`). In
    dictionary_learning, whose defaults these are, the error is a norm, not squared as here, and the price by default
    the Lp norm.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        sparsity_coefficient: Price at p = 1, of a unit of code.
        p_end: p that is reached at `anneal_end`; never less than 0.1 is used.
        anneal_start: Step from which p falls.
        anneal_end: Step at which `p_end` is reached: set it to the number of training steps.
        n_updates: Values of p, the first and the last included.
    """

    centres_input: ClassVar[bool] = True
    reduce: ClassVar[Mapping[str, str]] = {"recent": "mean"}

    p: Tensor
    factor: Tensor
    recent: Tensor

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        sparsity_coefficient: float = 0.1,
        p_end: float = 0.0,
        anneal_start: int = 15_000,
        anneal_end: int = 100_000,
        n_updates: int = 10,
    ) -> None:
        super().__init__(spec, d_latent, sparsity_coefficient, "unit")
        self.sparsity_coefficient = checked("sparsity_coefficient", sparsity_coefficient, 0)
        self.p_end = checked("p_end", p_end, 0, 1)
        self.anneal_start = checked("anneal_start", anneal_start, 1)
        self.n_updates = checked("n_updates", n_updates, 2)
        if anneal_end < anneal_start + WINDOW * (n_updates - 1):
            raise MmsaeError(
                f"anneal_end={anneal_end} leaves less than {WINDOW} steps from anneal_start={anneal_start} to each of "
                f"{n_updates} updates: set anneal_end to the number of training steps and start earlier."
            )
        self.anneal_end = anneal_end
        self.register_buffer("p", torch.ones((), dtype=torch.float64))
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))  # what the coefficient has been changed by
        self.register_buffer("recent", torch.zeros(2, WINDOW, dtype=torch.float64))  # price with this p and the next

    def losses(self, batch: Batch) -> Losses:
        """Squared error and the Lp price."""
        target, codes = self.target(batch), self.encode(self.inputs(batch))
        reconstruction = self.decode(codes)
        price = self.sparsity_coefficient * self.factor.to(codes.values.dtype) * _lp(codes.values, self.p)
        terms = {"reconstruction": squared_error(target, reconstruction), "sparsity": price}
        return Losses(terms, codes, reconstruction)

    def p_after(self, step: int) -> float:
        """P that is used after this step."""
        share = (step - self.anneal_start) / (self.anneal_end - self.anneal_start)
        done = min(max(int(share * (self.n_updates - 1) + 1e-9), 0), self.n_updates - 1) / (self.n_updates - 1)
        return max(1 + done * (self.p_end - 1), FLOOR)

    @torch.no_grad()
    def after_step(self, step: int, codes: Codes) -> None:
        """Unit rows; the price with this p and the next is measured shortly before p changes."""
        super().after_step(step, codes)
        p = self.p_after(step)
        if p != self.p_after(step - 1):  # `recent` was averaged over the ranks after the last step
            old, new = self.recent.sum(-1)
            self.factor.mul_(torch.where(new > 0, old / new.clamp_min(1e-300), 1.0))
            self.p.fill_(p)
            self.recent.zero_()
        upcoming = self.p_after(step + WINDOW)
        if upcoming != p:
            place = step % WINDOW
            self.recent[0, place] = _lp(codes.values.double(), self.p)
            self.recent[1, place] = _lp(codes.values.double(), self.p.new_tensor(upcoming))


def _lp(values: Tensor, p: Tensor) -> Tensor:
    """`sum z^p` over what fires, averaged over the rows."""
    powers = (values + SMALL).pow(p.to(values.dtype))
    return torch.where(values > 0, powers, 0.0).sum(-1).mean()

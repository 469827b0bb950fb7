"""A choice of latents against its control: the only way in which an effect of steering says something."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmsae.errors import MmsaeError, checked
from mmsae.steering.dose import DoseResponse, Interval, interval, resamples
from mmsae.steering.edits import Edit
from mmsae.steering.ledger import Ledger
from mmsae.steering.readouts import Readout
from mmsae.steering.select import Selection
from mmsae.steering.sweep import STRENGTHS, Make, Site, sweep

SELECTED, CONTROL = "latent", "random latent"


@dataclass
class Arm:
    """One way of steering, with the candidate and the strength that were best in the contexts to choose by.

    Attributes:
        name: What it is.
        chosen: Which candidate: a latent, or the name again.
        curve: Its responses in all contexts.
        best: Place of its strength in `curve.strengths`.
        make: Its edits at a strength.
    """

    name: str
    chosen: int | str
    curve: DoseResponse
    best: int
    make: Make

    @property
    def strength(self) -> float:
        """Of the edit."""
        return self.curve.strengths[self.best]


@dataclass
class Experiment:
    """Arms, each measured in contexts that it was not chosen by.

    Attributes:
        arms: By name; `SELECTED` and `CONTROL` are always there.
        held_out: Contexts that nothing was chosen by, bool `[n]`.
        difference: Score of the selection less that of the control in them.
    """

    arms: dict[str, Arm]
    held_out: np.ndarray
    difference: Interval

    def score(self, name: str) -> Interval:
        """Score of an arm in the contexts held out."""
        arm = self.arms[name]
        return arm.curve.interval(arm.best, self.held_out)

    def mean(self, name: str, what: str) -> Interval:
        """Effect, success, damage or changed of an arm in the contexts held out."""
        arm = self.arms[name]
        values = getattr(arm.curve, what)[arm.best, self.held_out]
        return interval(values, arm.curve.groups[self.held_out])


def experiment(
    selection: Selection | Sequence[int] | Tensor,
    edit: Callable[[int, float], Edit | Sequence[Edit]],
    readout: Readout,
    control: Selection | Sequence[int] | Tensor,
    *,
    site: Site,
    strengths: Sequence[float] = STRENGTHS,
    beside: Mapping[str, Make] | None = None,
    rows: Tensor | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    ledger: Ledger | None = None,
    context: str = "",
    tick: Callable[[], object] = lambda: None,
) -> Experiment:
    """Steer with each of some latents and with each of as many control latents; compare the best of both.

    Half of the groups of contexts choose candidate and strength, for the selection, the control and everything beside
    them alike; the other half measures. So the control has had the same number of tries.

    Args:
        selection: Candidates.
        edit: From a latent and a strength to edits.
        readout: What is measured.
        control: Latents that have nothing to do with the concept, `matched_random`; as many as candidates.
        site: Where.
        strengths: To try.
        beside: Other ways of steering by name (a difference of means, a probe), as functions of the strength.
        rows: Activations for the spread over other latents.
        n_boot: Resamples of the groups for intervals.
        seed: Of the halves and the resamples.
        ledger: Measurements that are there already, and where new ones go.
        context: Name of the readout in the ledger.
        tick: Called after each measurement.

    Raises:
        MmsaeError: The control is missing, has another size than the selection, or shares a latent with it.
    """
    ours, theirs = _ids(selection), _ids(control)
    if len(theirs) != len(ours):
        raise MmsaeError(
            f"the control has {len(theirs)} latents for {len(ours)} candidates; both need the same number of tries."
        )
    if not ours or set(ours) & set(theirs):
        raise MmsaeError(f"the control {theirs} must not share latents with the selection {ours}.")
    checked("n_boot", n_boot, 1)
    held_out = halves(readout.groups, seed)

    def arm(name: str, candidates: Mapping[int | str, Make]) -> Arm:
        best: Arm | None = None
        for which, make in candidates.items():
            own = [which] if isinstance(which, int) else []
            key = name if isinstance(which, str) else f"{name} {which}"
            curve = sweep(site, make, strengths, readout, rows, own, ledger, key, context, tick)
            place = curve.best(~held_out)
            found = Arm(name, which, curve, place, make)
            if best is None or curve.scores(~held_out)[place] > best.curve.scores(~held_out)[best.best]:
                best = found
        assert best is not None
        return best

    def steering(ids: list[int]) -> dict[int | str, Make]:
        return {i: (lambda strength, i=i: edit(i, strength)) for i in ids}  # type: ignore[misc]

    arms = {SELECTED: arm(SELECTED, steering(ours)), CONTROL: arm(CONTROL, steering(theirs))}
    for name, make in (beside or {}).items():
        arms[name] = arm(name, {name: make})
    weights = resamples(readout.groups[held_out], n_boot, seed)
    drawn = {name: one.curve.resampled(one.best, weights, held_out) for name, one in arms.items()}
    gap = drawn[SELECTED] - drawn[CONTROL]
    means = [float(arms[n].curve.scores(held_out)[arms[n].best]) for n in (SELECTED, CONTROL)]
    difference = Interval(means[0] - means[1], *(float(q) for q in np.quantile(gap, (0.025, 0.975))))
    return Experiment(arms, held_out, difference)


def halves(groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """Every second group in a random order, as a mask of contexts: those to measure in."""
    ids = np.unique(groups)
    if len(ids) < 4:
        raise MmsaeError(
            f"{len(ids)} groups of contexts are too few to choose by some and to measure in others: give 4."
        )
    order = np.random.default_rng(seed).permutation(ids)
    return np.isin(groups, order[::2])


def _ids(chosen: Selection | Sequence[int] | Tensor) -> list[int]:
    ids = chosen.ids if isinstance(chosen, Selection) else torch.as_tensor(chosen)
    return [int(i) for i in ids.reshape(-1)]

"""Strengths of one edit, one after the other, and the strength that gives a wanted effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError, checked
from mmsae.steering.context import Context
from mmsae.steering.dose import DoseResponse
from mmsae.steering.edits import Edit
from mmsae.steering.intervene import Intervention, edited, steer
from mmsae.steering.ledger import Ledger
from mmsae.steering.readouts import Readout

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
Make = Callable[[float], Edit | Sequence[Edit]]
"""From a strength to edits."""


@dataclass
class Site:
    """Where a model is steered, see `steer` for all of it.

    Attributes:
        model: A module, a source, or a pipeline.
        dictionary: Of the hook point; None if only vectors are added.
        hook_point: Exactly one module.
        where: Weight of every position.
        scale: Unit of strengths.
        keep_error: Keep what the dictionary does not explain.
    """

    model: Any
    dictionary: SAECore | None
    hook_point: str
    where: Callable[[Context], Tensor] | None = None
    scale: Tensor | float | None = None
    keep_error: bool = True

    def steered(self, edits: Edit | Sequence[Edit]) -> AbstractContextManager[None]:
        """A context in which the model is steered."""
        return steer(self.model, self.dictionary, self.hook_point, edits, self.where, self.keep_error, self.scale)

    def edited(self, edits: Edit | Sequence[Edit], x: Tensor) -> Tensor:
        """What the edits make of activation rows `[R, d]`."""
        chosen = [edits] if isinstance(edits, Edit) else list(edits)
        what = Intervention(self.dictionary, self.hook_point, chosen, None, self.keep_error, self.scale)
        return edited(what, x)


def sweep(
    site: Site,
    make: Make,
    strengths: Sequence[float],
    readout: Readout,
    rows: Tensor | None = None,
    own: Sequence[int] = (),
    ledger: Ledger | None = None,
    key: str = "",
    context: str = "",
    tick: Callable[[], object] = lambda: None,
) -> DoseResponse:
    """Measure an edit at each of some strengths.

    Args:
        site: Where.
        make: From a strength to the edit; 0 is never made: it is the model as it is.
        strengths: 0 is added.
        readout: What is measured.
        rows: Activations `[R, d]` that the spread over other latents is measured on; None leaves it out.
        own: Latents that are meant to change.
        ledger: Measurements that are there already, and where new ones go.
        key: Name of this edit in the ledger.
        context: Name of the readout in the ledger, of whatever is edited.
        tick: Called after each strength, for a progress bar.

    Raises:
        MmsaeError: A strength is negative, or there is none above 0.
    """
    grid = sorted({0.0, *(checked("strength", float(a), 0) for a in strengths)})
    if len(grid) < 2:
        raise MmsaeError(f"strengths={list(strengths)} need at least one above 0.")
    ledger = Ledger() if ledger is None else ledger
    moments = None if rows is None or site.dictionary is None else _moments(site.dictionary, rows)
    found: list[dict[str, Any]] = []
    for strength in grid:
        name = f"{context}/{key}@{strength:g}" if strength else f"{context}/unsteered"
        kept = ledger.get(name)
        if kept is None:
            edits = make(strength) if strength else None
            measured = readout.measure(nullcontext if edits is None else lambda e=edits: site.steered(e))  # type: ignore
            moved: int | None = None
            if moments is not None and rows is not None:
                moved = 0 if edits is None else _spread(site, edits, rows, moments, own)
            kept = {name: _plain(value) for name, value in measured._asdict().items()} | {"spread": moved}
            ledger.put(name, kept)
        found.append(kept)
        tick()
    columns = {f: np.array([one[f] for one in found], float) for f in ("effect", "success", "damage", "changed")}
    spread, shown = [one["spread"] for one in found], [one["shown"] for one in found]
    return DoseResponse(grid, **columns, groups=readout.groups, spread=spread, shown=shown)


def calibrate(
    effect: Callable[[float], float], target: float, low: float, high: float, steps: int = 20, tolerance: float = 0.01
) -> float:
    """The strength that gives an effect, by bisection, for effects that grow with strength between `low` and `high`.

    Args:
        effect: Measured at a strength.
        target: Wanted.
        low: Strength with less effect than wanted.
        high: Strength with more.
        steps: At most so many measurements between them.
        tolerance: Of the effect.

    Raises:
        MmsaeError: The target does not lie between the effects of `low` and `high`.
    """
    if not low < high:
        raise MmsaeError(f"calibrate looks between two strengths, and low={low:g} is not below high={high:g}.")
    below, above = effect(low), effect(high)
    if not min(below, above) <= target <= max(below, above):
        raise MmsaeError(
            f"an effect of {target:g} does not lie between those at {low:g} ({below:.3g}) and {high:g} ({above:.3g}); "
            "give a wider range of strengths."
        )
    rising = above >= below
    for _ in range(steps):
        middle = (low + high) / 2
        now = effect(middle)
        if abs(now - target) <= tolerance:
            return middle
        if (now < target) == rising:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@torch.no_grad()
def _moments(dictionary: SAECore, rows: Tensor) -> tuple[Tensor, Tensor]:
    z = dictionary.encode(rows).dense()
    return z.mean(0), z.std(0)


@torch.no_grad()
def _spread(
    site: Site, edits: Edit | Sequence[Edit], rows: Tensor, moments: tuple[Tensor, Tensor], own: Sequence[int]
) -> int:
    assert site.dictionary is not None
    z = site.dictionary.encode(site.edited(edits, rows)).dense()
    moved = (z.mean(0) - moments[0]).abs() > moments[1].clamp_min(1e-6)
    moved[list(own)] = False
    return int(moved.sum())


def _plain(value: Any) -> Any:
    return [round(float(v), 6) for v in value] if isinstance(value, np.ndarray) else value

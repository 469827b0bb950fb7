"""The streams of pairs in a store of codes: which rows are whose, and how a latent divides itself over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mmsae.cores import SAECore
from mmsae.latents import LatentStore
from mmsae.sources import MODALITIES


class Side(NamedTuple):
    """A stream.

    Attributes:
        name: Of the stream; empty if rows are not told apart by stream.
        rows: Its rows, bool `[n_rows]`; None for all.
    """

    name: str
    rows: np.ndarray | None


def sides_of(core: SAECore | None, latents: LatentStore) -> list[Side]:
    """The streams whose rows have codes of their own; none if rows are not told apart, or belong to one stream.

    They are named by the dictionary if it has a code for each stream, else by the modality of their rows.
    """
    number = latents.columns.get("stream")
    if number is None or len(known := np.unique(number)) < 2:
        return []
    named = {value: name for name, value in MODALITIES.items() if name != "other"}
    found = []
    for i in known.tolist():
        rows = np.asarray(number) == i
        modality = int(latents.columns["modality"][np.argmax(rows)]) if "modality" in latents.columns else -1
        outputs = core.outputs if core is not None and len(core.outputs) > i else []
        found.append(Side(outputs[i] if len(outputs) > 1 else named.get(modality, f"stream {i + 1}"), rows))
    return found


def facts_of(sides: list[Side], latents: LatentStore, latent: int) -> list[dict[str, Any]]:
    """For the page: in what share of the rows of each stream a latent fires, and how strongly at most."""
    rows, values = latents.of_latent(latent)
    facts = []
    for side in sides:
        assert side.rows is not None
        own = values[side.rows[rows]]
        peak = float(own[np.abs(own).argmax()]) if len(own) else 0.0
        facts.append({"name": side.name, "density": len(own) / int(side.rows.sum()), "max": peak})
    return facts

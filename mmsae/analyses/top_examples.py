"""What makes each latent fire: pictures, texts, sounds and signals for the page."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmsae.analyses.base import Analysis
from mmsae.analyses.media import Media
from mmsae.analyses.places import Places, StepProfile, window_of
from mmsae.analyses.sides import Side, facts_of, sides_of
from mmsae.cores import SAECore
from mmsae.errors import checked
from mmsae.latents import LatentStore
from mmsae.metrics.recovery import CHUNK, auroc, best_f1
from mmsae.results import Result


class TopExamples(Analysis):
    """The strongest examples of each latent, shown where it fires, with a histogram and the best-matching factor.

    Where each stream of a pair has a code of its own, the strongest examples of every stream stand side by side:
    concept sets, such as the pictures and the captions of one latent.

    Args:
        split: Where examples come from.
        n_latents: Latents shown: those with the best-matching factor, or without labels those that fire strongest.
        n_examples: Examples per latent, and per stream of a pair.
        n_captions: Captions per latent.
        thumbnail: Longest side of a picture, pixels.
        seconds: Longest excerpt of a sound or a signal, around the strongest window.
        megabytes: Limit of all examples together; the strongest of each latent come first.
    """

    def __init__(
        self,
        split: str = "test",
        n_latents: int = 1000,
        n_examples: int = 9,
        n_captions: int = 3,
        thumbnail: int = 96,
        seconds: float = 10.0,
        megabytes: float = 64.0,
    ) -> None:
        self.split, self.n_latents, self.n_examples = split, n_latents, n_examples
        self.n_captions, self.thumbnail = n_captions, thumbnail
        self.seconds, self.megabytes = checked("seconds", seconds, 0.1), checked("megabytes", megabytes, 0)

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Everything the gallery needs."""
        items: Any = data.items(self.split) if data.has_items else None
        factors = self._factors(latents, data.value_names)
        live = np.flatnonzero(latents.firings)
        strength = np.array([factors[int(j)]["auroc"] for j in live]) if factors else latents.strongest[live]
        shown = sorted(int(j) for j in live[np.argsort(-strength, kind="stable")][: self.n_latents])
        sides = sides_of(core, latents) or [Side("", None)]
        strongest = {
            (latent, side): latents.top_samples(latent, self.n_examples, one.rows)
            for latent in shown
            for side, one in enumerate(sides)
        }

        def render(sample_id: int, stream: str = "") -> dict[str, Any]:
            return data.render_stream(items[sample_id], stream) if stream else data.render(items[sample_id])

        media = Media(render, self.thumbnail, self.seconds, 1e6 * self.megabytes)
        places_of: dict[tuple[int, int, int], int] = {}  # latent, side and rank to the place of its medium
        if items is not None:
            for rank in range(self.n_examples):
                for (latent, side), found in strongest.items():
                    for sample, row, _ in found[rank : rank + 1]:
                        sample_id = int(latents.samples[0][sample])
                        window = window_of(latents, row)
                        places_of[latent, side, rank] = media.add(sample_id, window, sides[side].name)
        profile = StepProfile(latents) if "timestep" in latents.columns else None
        where = Places(latents)
        entries = []
        for latent in shown:
            examples: list[dict[str, Any]] = []
            captions: list[dict[str, Any]] = []
            for side, one in enumerate(sides):
                for rank, (sample, row, value) in enumerate(strongest[latent, side]):
                    place = places_of.get((latent, side, rank))
                    medium = None if place is None else media.packed[place]
                    examples.append(
                        {
                            "media": place,
                            "sample": int(latents.samples[0][sample]),
                            "activation": value,
                            "position": int(latents.columns["position"][row]) if "position" in latents.columns else -1,
                            **({"side": side} if one.name else where.of(latent, sample, row, medium)),
                        }
                    )
                    text = medium.get("text", "") if medium and len(captions) < self.n_captions else ""
                    if text and not one.name and all(text != c["text"] for c in captions):
                        captions.append({"text": text, "score": value})
            values = latents.of_latent(latent)[1]
            counts, edges = np.histogram(values, bins=24)
            entries.append(
                {
                    "id": latent,
                    "density": float(latents.density[latent]),
                    "mean": float(values.mean()),
                    "max": float(values[np.abs(values).argmax()]),
                    "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
                    "factor": factors.get(latent),
                    "captions": captions,
                    "label": "",
                    "examples": examples,
                    **({"profile": profile.of(latents, latent)} if profile else {}),
                    **({"sides": facts_of(sides, latents, latent)} if sides[0].name else {}),
                }
            )
        hidden = len(live) - len(shown)
        title = f"{len(shown)} latents and what makes them fire" + (f" ({hidden} more not shown)" if hidden else "")
        settings = {"split": self.split, "rows": latents.n_rows, "samples": len(latents.samples[0])}
        if media.cut_short:
            settings["examples not stored whole"] = media.cut_short
        return Result(name="TopExamples", title=title, latents=entries, media=media.packed, settings=settings)

    def _factors(self, latents: LatentStore, names: dict[str, list[str]]) -> dict[int, dict[str, Any]]:
        """The factor value that each latent tells best."""
        found = latents.labels()
        values = [(factor, value) for factor in names if factor in found for value in names[factor]]
        if not values:
            return {}
        labels = np.stack([found[f] == names[f].index(v) for f, v in values], axis=1)
        best = {}
        for first in range(0, latents.d_latent, CHUNK):
            features = latents.pool(first, min(first + CHUNK, latents.d_latent))
            scores, f1 = np.nan_to_num(auroc(features, labels)), best_f1(features, labels)[0]
            for j, i in enumerate(scores.argmax(0).tolist()):
                name, value = values[i]
                best[first + j] = {"name": name, "value": value, "auroc": float(scores[i, j]), "f1": float(f1[i, j])}
        return best

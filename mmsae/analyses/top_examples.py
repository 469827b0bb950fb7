"""What makes each latent fire: pictures or texts for the page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from torch import Tensor

from mmsae.analyses.base import Analysis
from mmsae.cores import SAECore
from mmsae.latents import LatentStore
from mmsae.metrics.recovery import CHUNK, auroc, best_f1
from mmsae.results import Result

PLACELESS = {1: "the class token", 3: "a register token"}
"""Kinds of tokens (`mmsae.sources.positions`) that lie nowhere in a picture."""


class TopExamples(Analysis):
    """The strongest examples of each latent, with heat maps over positions, a histogram and the best-matching factor.

    Args:
        split: Where examples come from.
        n_latents: Latents shown: those with the best-matching factor, or without labels those that fire strongest.
        n_examples: Examples per latent.
        n_captions: Captions per latent.
        thumbnail: Longest side of a picture, pixels.
    """

    def __init__(
        self,
        split: str = "test",
        n_latents: int = 1000,
        n_examples: int = 9,
        n_captions: int = 3,
        thumbnail: int = 96,
    ) -> None:
        self.split, self.n_latents, self.n_examples = split, n_latents, n_examples
        self.n_captions, self.thumbnail = n_captions, thumbnail

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Everything the gallery needs."""
        items = data.items(self.split) if data.has_items else None
        factors = self._factors(latents, data.value_names)
        live = np.flatnonzero(latents.firings)
        strength = np.array([factors[int(j)]["auroc"] for j in live]) if factors else latents.strongest[live]
        shown = sorted(int(j) for j in live[np.argsort(-strength, kind="stable")][: self.n_latents])
        media: dict[int, int] = {}
        rendered: list[dict[str, Any]] = []
        entries = []
        for latent in shown:
            examples: list[dict[str, Any]] = []
            captions: list[dict[str, Any]] = []
            for sample, row, value in latents.top_samples(latent, self.n_examples):
                sample_id = int(latents.samples[0][sample])
                if items is not None and sample not in media:
                    media[sample] = len(rendered)
                    rendered.append(self._render(data, items[sample_id]))
                examples.append(self._example(latents, latent, sample, row, value, media.get(sample), rendered))
                if items is not None and len(captions) < self.n_captions:
                    text = rendered[media[sample]].get("text", "")
                    if text and all(text != c["text"] for c in captions):
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
                }
            )
        hidden = len(live) - len(shown)
        title = f"{len(shown)} latents and what makes them fire" + (f" ({hidden} more not shown)" if hidden else "")
        settings = {"split": self.split, "rows": latents.n_rows, "samples": len(latents.samples[0])}
        return Result(name="TopExamples", title=title, latents=entries, media=rendered, settings=settings)

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

    def _example(
        self,
        latents: LatentStore,
        latent: int,
        sample: int,
        row: int,
        value: float,
        medium: int | None,
        rendered: list[dict[str, Any]],
    ) -> dict[str, Any]:
        columns, rows = latents.columns, latents.rows_of_sample[sample]
        position = int(columns["position"][row]) if "position" in columns else -1
        example: dict[str, Any] = {
            "media": medium,
            "sample": int(latents.samples[0][sample]),
            "activation": value,
            "position": position,
            "heat": None,
            "values": None,
        }
        codes = latents.at(latent, rows)
        if "row" in columns and (columns["row"][rows] >= 0).any():
            if columns["row"][row] < 0:  # a map of the patches would hide where it really fired
                return example | {"note": f"at {PLACELESS.get(int(columns['kind'][row]), 'a token')}"}
            placed = columns["row"][rows] >= 0
            y, x = columns["row"][rows][placed], columns["column"][rows][placed]
            heat = np.zeros((y.max() + 1, x.max() + 1))
            heat[y, x] = codes[placed]
            example["heat"] = heat.tolist()
        elif medium is not None and rendered[medium]["kind"] == "text":
            values = np.zeros(len(rendered[medium]["tokens"]))
            places = columns["position"][rows]
            inside = (places >= 0) & (places < len(values))
            values[places[inside]] = codes[inside]
            example["values"] = values.tolist()
        return example

    def _render(self, data: Any, item: dict[str, Any]) -> dict[str, Any]:
        medium = data.render(item)
        if medium["kind"] != "image":
            return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in medium.items()}
        picture = medium["image"].convert("RGB")
        picture.thumbnail((self.thumbnail, self.thumbnail))
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=90)
        data_uri = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        return {"kind": "image", "data": data_uri, "text": medium.get("text", "")}

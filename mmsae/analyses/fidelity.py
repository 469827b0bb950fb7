"""How well, and how sparsely, activations are reconstructed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mmsae.analyses.base import Analysis
from mmsae.cores import PCA, SAECore
from mmsae.latents import LatentStore
from mmsae.metrics import Fidelity as Measure
from mmsae.results import Plot, Result, Table
from mmsae.spec import ACTS, rows_of


class Fidelity(Analysis):
    """FVU, L0, dead latents and density on the test split, beside PCA at the same L0.

    Args:
        split: Where it is measured; PCA is fitted on the training split.
        pca_rows: Training rows that PCA sees.
    """

    def __init__(self, split: str = "test", pca_rows: int = 100_000) -> None:
        self.split, self.pca_rows = split, pca_rows

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Two passes over the split."""
        numbers, density = measure(core, data.rows(self.split))
        rivals = {"PCA, same L0": fitted_pca(core, data, self.pca_rows, k=max(round(numbers["l0"]), 1))}
        rows: list[list[Any]] = [["dictionary", *_row(numbers)]]
        for name, rival in rivals.items():
            found, _ = measure(rival, data.rows(self.split))
            rows.append([name, *_row(found)])
            numbers[f"{name}/fvu"] = found["fvu"]
        live = density[density > 0]
        edges = np.linspace(-6, 0, 37)
        counts = np.histogram(np.log10(live), bins=edges)[0] if len(live) else np.zeros(36, int)
        title = f"{numbers['explained_variance']:.1%} of the variance with {numbers['l0']:.1f} latents per activation"
        return Result(
            name="Fidelity",
            title=title,
            numbers=numbers,
            tables=[Table("Reconstruction", ["", "FVU ↓", "L0", "cosine ↑", "shrinkage", "dead ↓"], rows)],
            plots=[
                Plot(
                    title=f"{len(live)} of {len(density)} latents fire; the median one on {_median(live)} of rows",
                    x="share of rows a latent fires on, log10",
                    y="latents",
                    lines=[{"label": "latents", "x": edges.tolist(), "y": counts.tolist()}],
                    kind="bars",
                )
            ],
            settings={
                "split": self.split,
                "rows": latents.n_rows,
                "headline": [
                    {"label": "FVU", "value": f"{numbers['fvu']:.3f}", "note": f"PCA, same L0: {rows[1][1]:.3f}"},
                    {"label": "L0", "value": f"{numbers['l0']:.1f}", "note": f"of {core.d_latent} latents"},
                    {"label": "dead", "value": f"{numbers['dead_fraction']:.1%}", "note": f"of {latents.n_rows} rows"},
                ],
            },
        )


def measure(core: SAECore, batches: Any) -> tuple[dict[str, float], np.ndarray]:
    """Fidelity and density of a core over batches of raw activations."""
    metric = Measure(core.spec.d_out, core.d_latent)
    for batch in batches:
        with torch.no_grad():
            codes = core.encode(core.inputs(batch).float(), batch)
            metric.update(core.target(batch), core.decode(codes), codes)  # type: ignore[arg-type]
    return {name: float(value) for name, value in metric.compute().items()}, metric.density().numpy()


def fitted_pca(core: SAECore, data: Any, n_rows: int, k: int | None = None) -> PCA:
    """Principal components of the training activations."""
    pca, seen = PCA(core.spec, k=None if k is None else min(k, core.spec.d_in)), 0
    for batch in data.rows("train"):
        rows = {ACTS: {name: x.float() for name, x in batch[ACTS].items()}}
        pca.partial_fit(rows)
        pca.count(torch.ones(pca.d_latent), rows_of(batch))
        seen += rows_of(batch)
        if seen >= n_rows:
            break
    pca.finish()
    return pca.eval()


def _row(numbers: dict[str, float]) -> list[float]:
    return [numbers[key] for key in ("fvu", "l0", "cosine", "shrinkage", "dead_fraction")]


def _median(live: np.ndarray) -> str:
    return f"{np.median(live):.2%}" if len(live) else "none"

"""How well, and how sparsely, activations are reconstructed."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mmsae.analyses.base import Analysis
from mmsae.cores import PCA, SAECore
from mmsae.latents import LatentStore
from mmsae.metrics import Fidelity as Measure
from mmsae.results import Plot, Result, Table
from mmsae.spec import ACTS, in_float32, rows_of


class Fidelity(Analysis):
    """FVU, L0, dead latents and density on the test split, beside PCA at the same L0.

    Args:
        split: Where it is measured; PCA is fitted on the training split.
        pca_rows: Training rows that PCA sees.
    """

    def __init__(self, split: str = "test", pca_rows: int = 100_000) -> None:
        self.split, self.pca_rows = split, pca_rows

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """One pass over the split."""
        rival = "PCA, same L0"
        pca = fitted_pca(core, data, self.pca_rows, k=max(round(latents.l0), 1))
        measured = measure({"dictionary": core, rival: pca}, data.rows(self.split))
        rows: list[list[Any]] = [[name, *_row(metric.numbers())] for name, metric in measured.items()]
        ours = measured["dictionary"]
        numbers, density, n_rows = ours.numbers(), ours.density().numpy(), int(ours.n)
        numbers[f"{rival}/fvu"] = measured[rival].numbers()["fvu"]
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
                "rows": n_rows,
                "headline": [
                    {"label": "FVU", "value": f"{numbers['fvu']:.3f}", "note": f"PCA, same L0: {rows[1][1]:.3f}"},
                    {"label": "L0", "value": f"{numbers['l0']:.1f}", "note": f"of {core.d_latent} latents"},
                    {"label": "dead", "value": f"{numbers['dead_fraction']:.1%}", "note": f"of {n_rows} rows"},
                ],
            },
        )


@torch.no_grad()
def measure(cores: dict[str, SAECore], batches: Any) -> dict[str, Measure]:
    """Fidelity of some cores over batches of raw activations, in one pass."""
    widths = {name: sum(core.spec.streams[stream] for stream in core.outputs) for name, core in cores.items()}
    found = {name: Measure(widths[name], core.d_latent) for name, core in cores.items()}
    for batch in map(in_float32, batches):
        for name, core in cores.items():
            codes = core.encode(core.inputs(batch), batch)
            outputs = core.by_stream(core.decode(codes))
            target = torch.cat([batch[ACTS][stream] for stream in outputs], -1)
            found[name].update(target, torch.cat(list(outputs.values()), -1), codes)
    return found


_FITTED: WeakKeyDictionary[Any, dict[Any, PCA]] = WeakKeyDictionary()
"""Of each datamodule: several analyses stand beside the same components."""


def fitted_pca(core: SAECore, data: Any, n_rows: int, k: int | None = None) -> PCA:
    """Principal components of the training activations, fitted once for each datamodule."""
    known, key = _FITTED.setdefault(data, {}), (tuple(core.spec.streams.items()), n_rows)
    if key not in known:
        fresh, seen = PCA(core.spec), 0
        for batch in data.rows("train"):
            fresh.partial_fit(in_float32(batch))
            fresh.count(torch.ones(fresh.d_latent), rows_of(batch))
            seen += rows_of(batch)
            if seen >= n_rows:
                break
        fresh.finish()
        known[key] = fresh.eval()
    pca = copy.deepcopy(known[key])
    pca.k = None if k is None else min(k, core.spec.d_in)
    return pca


def _row(numbers: dict[str, float]) -> list[float]:
    return [numbers[key] for key in ("fvu", "l0", "cosine", "shrinkage", "dead_fraction")]


def _median(live: np.ndarray) -> str:
    return f"{np.median(live):.2%}" if len(live) else "none"

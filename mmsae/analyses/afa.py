"""Do the norms of codes agree with those of the activations?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsae.analyses.base import Analysis
from mmsae.cores import SAECore
from mmsae.errors import checked
from mmsae.latents import LatentStore
from mmsae.metrics.afa import AFA as Rows
from mmsae.metrics.afa import afa, decoder_norms, refusal
from mmsae.results import Plot, Result, Table
from mmsae.spec import in_float32

BANDS = {"¼": 0.25, "½": 0.5, "1": 1.0}
"""Values of c = ε (h - 1): how far the squared norms may lie apart, as a share of the code's."""
DRAWN = 600
"""Points of a scatter plot; more would only be drawn over each other."""
CLIP = 0.99
"""Quantile at which the histograms end."""


class AFA(Analysis):
    """Norms of activations beside those of their codes (approximate feature activation, arXiv 2503.24277).

    If decoder rows were orthogonal, the code weighted by decoder norms, joined with the decoder bias, would have the
    norm of the activation: all points of the plot (the paper's ZF plot) lie on the diagonal. With rows of coherence
    ε among h latents they lie in the band of `c = ε (h - 1)`. Read backwards, every row gives a lower bound of ε.

    Args:
        split: Where it is measured.
        n_rows: At most so many activations, the first of the split.
        n_bootstrap: Resamples of the samples for the intervals.
        seed: Of the resamples and of the points that are drawn.
    """

    def __init__(self, split: str = "test", n_rows: int = 20_000, n_bootstrap: int = 200, seed: int = 0) -> None:
        self.split, self.n_rows = split, checked("n_rows", n_rows, 1)
        self.n_bootstrap, self.seed = checked("n_bootstrap", n_bootstrap, 1), seed

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """One pass over some rows; a table and three plots for each stream that the dictionary writes."""
        if why := refusal(core):
            return Result(name="AFA", title=f"not measured: {why}")
        found, samples = self._measured(core, data)
        if not len(samples):
            return Result(name="AFA", title="not measured: all activations are 0")
        numbers: dict[str, float] = {}
        tables, plots, said = [], [], []
        for stream, rows in found.items():
            prefix, of = (f"{stream}/", f"{stream}: ") if len(found) > 1 else ("", "")
            means, low, high = self._means(rows, samples)
            for name, value, least, most in zip(MEASURES, means, low, high, strict=True):
                numbers |= {f"{prefix}{name}": value, f"{prefix}{name}/low": least, f"{prefix}{name}/high": most}
            numbers[f"{prefix}correlation"] = _correlation(rows.norm, rows.estimate)
            text: list[list[Any]] = [
                [label, f"{value:.3g}", f"{least:.3g} to {most:.3g}"]
                for label, value, least, most in zip(MEASURES.values(), means, low, high, strict=True)
            ]
            text.append(["correlation of both norms", f"{numbers[f'{prefix}correlation']:.3g}", "–"])
            tables.append(Table(f"{of}norms of codes and activations, means over rows", ["", "mean", "95 %"], text))
            plots += self._plots(rows, of, numbers[f"{prefix}within_1"])
            said.append(f"{of}codes have {means[0]:.2f} times the norm of their activations")
        settings = {"split": self.split, "rows": len(samples), "samples": len(samples.unique())}
        return Result("AFA", "; ".join(said), numbers, tables, plots, settings=settings)

    def _measured(self, core: SAECore, data: Any) -> tuple[dict[str, Rows], Tensor]:
        """Norms by stream, without rows of zeros, and the sample of each row."""
        norms, left = decoder_norms(core), self.n_rows
        parts: dict[str, list[Tensor]] = {}
        samples: list[Tensor] = []
        for batch in map(in_float32, data.rows(self.split)):
            found = afa(core, core.inputs(batch), batch, norms)
            for stream, rows in found.items():
                parts.setdefault(stream, []).append(torch.stack(rows)[:, :left])
            samples.append(batch["sample_id"][:left])
            left -= len(samples[-1])
            if left <= 0:
                break
        joined = {stream: torch.cat(some, 1).double().cpu() for stream, some in parts.items()}
        kept = torch.stack([rows[0] > 0 for rows in joined.values()]).all(0)
        return {stream: Rows(*rows[:, kept]) for stream, rows in joined.items()}, torch.cat(samples).cpu()[kept]

    def _means(self, rows: Rows, samples: Tensor) -> tuple[list[float], list[float], list[float]]:
        """Mean of each of `MEASURES` and its interval; samples are drawn whole, since their rows are alike."""
        squares = rows.norm**2, rows.estimate**2
        gap = (squares[0] - squares[1]).abs() / squares[1].clamp_min(1e-30)
        within = [(gap <= c).double() for c in BANDS.values()]
        epsilon = rows.epsilon.clamp_max(1)  # no coherence explains the norm of a code of zeros
        values = torch.stack([rows.estimate / rows.norm, *within, epsilon, rows.error], 1)
        own, place = samples.unique(return_inverse=True)
        sums = torch.zeros(len(own), values.shape[1], dtype=values.dtype).index_add_(0, place, values).numpy()
        counts = place.bincount().double().numpy()
        draws = np.random.default_rng(self.seed).multinomial(
            len(own), np.full(len(own), 1 / len(own)), self.n_bootstrap
        )
        means = (draws @ sums) / (draws @ counts)[:, None]
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        return values.mean(0).tolist(), low.tolist(), high.tolist()

    def _plots(self, rows: Rows, of: str, within: float) -> list[Plot]:
        order = torch.from_numpy(np.random.default_rng(self.seed).permutation(len(rows.norm))[:DRAWN])
        x, y = rows.norm[order], rows.estimate[order]
        wide = max(_spread(x), _spread(y[y > 0])) > 20
        ends = [float(x.min()), float(x.max())]
        slopes = [("equal", 1.0)]
        for name, c in BANDS.items():
            slopes += [(f"c = {name}", (1 / square) ** 0.5) for square in (1 + c, 1 - c) if square > 0]
        rules = [{"label": name, "x": ends, "y": [slope * end for end in ends], "rule": True} for name, slope in slopes]
        points = {"label": "activations", "x": x.tolist(), "y": y.tolist()}
        histograms = [
            (f"{of}the least ε that explains the norms", "lower bound of ε", rows.epsilon),
            (f"{of}what the reconstruction misses", "‖x − x̂‖² / ‖x‖²", rows.error),
        ]
        return [
            Plot(f"{of}{within:.0%} of rows lie within c = 1", "‖x‖", "‖f̃‖, norm of the code", [points, *rules],
                 kind="points", log="xy" if wide else ""),
            *(Plot(title, label, "rows", [_histogram(values)], kind="bars") for title, label, values in histograms),
        ]  # fmt: skip


MEASURES = {
    "ratio": "norm of the code over that of the activation (1 if orthogonal)",
    "within_1/4": "share of rows within c = ¼",
    "within_1/2": "share of rows within c = ½",
    "within_1": "share of rows within c = 1",
    "epsilon": "lower bound of ε",
    "error": "squared error over squared norm",
}
"""Name of a number to what it is."""


def _histogram(values: Tensor) -> dict[str, Any]:
    """Up to the 99th percentile; the few rows above it would squeeze all others into one bar."""
    kept = values[values <= values.quantile(CLIP)].numpy()
    counts, edges = np.histogram(kept, bins=40)
    return {"label": "rows", "x": edges.tolist(), "y": counts.tolist()}


def _spread(values: Tensor) -> float:
    return float(values.max() / values.min()) if len(values) else 1.0


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()).clamp_min(1e-30))

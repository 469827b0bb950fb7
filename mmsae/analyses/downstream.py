"""Does the model still work with reconstructions in place of its activations?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmsae.analyses.base import Analysis
from mmsae.cores import SAECore
from mmsae.latents import LatentStore
from mmsae.results import Result, Table

MEAN_ROWS = 50_000
"""Training rows behind the mean when no store knows it."""


class Downstream(Analysis):
    """The model's own task with clean, reconstructed and mean-ablated activations.

    `recovered = (ablated - spliced) / (ablated - clean)`: 1 if nothing is lost, 0 if the reconstruction is no better
    than the mean activation. Only the positions that the dictionary was trained on are replaced.

    Args:
        split: Where it is measured.
        n_samples: At most so many examples.
    """

    def __init__(self, split: str = "test", n_samples: int = 1000) -> None:
        self.split, self.n_samples = split, n_samples

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Three forward passes over the examples."""
        source = data.source
        if source is None:
            return Result(name="Downstream", title="not measured: there is no model, only stored activations")
        if source.positions == "mean":
            return Result(name="Downstream", title="not measured: pooled activations cannot be put back")
        if len(core.outputs) > 1:
            return Result(name="Downstream", title="not measured: the dictionary reads several streams at once")
        device = source.placed
        core = core.to(device)
        mean = self._mean(core, data).to(device)
        ways: dict[str, Callable[[Tensor], Tensor] | None] = {
            "clean": None,
            "reconstructed": lambda x: core(x),  # type: ignore[return-value]
            "mean-ablated": lambda x: mean.expand_as(x),
        }
        found: dict[str, dict[str, list[Tensor]]] = {way: {} for way in ways}
        seen = 0
        for batch in tqdm(self._batches(data), desc="downstream", leave=False, disable=None):
            for way, replace in ways.items():
                outcomes = self._outcomes(source, batch, core.spec.input, replace)
                for name, values in outcomes.items():
                    found[way].setdefault(name, []).append(values.double().cpu())
            seen += len(batch["sample_id"])
        core.to("cpu")
        if not found["clean"]:
            return Result(name="Downstream", title="not measured: the source knows no task for its model")
        means = {
            way: {name: float(torch.cat(values).nanmean()) for name, values in measures.items()}
            for way, measures in found.items()
        }
        return self._result(means, seen)

    def _batches(self, data: Any) -> Iterator[dict[str, Any]]:
        left = self.n_samples
        for batch in data.item_batches(self.split):
            yield batch
            left -= len(batch["sample_id"])
            if left <= 0:
                return

    def _mean(self, core: SAECore, data: Any) -> Tensor:
        statistics = data.statistics
        if statistics is not None:
            return statistics[core.spec.input].mean.float()
        total, n = torch.zeros(core.spec.d_in, dtype=torch.float64), 0
        for batch in data.rows("train"):
            x = core.inputs(batch).double().cpu()
            total, n = total + x.sum(0), n + len(x)
            if n >= MEAN_ROWS:
                break
        return (total / n).float()

    @torch.no_grad()
    def _outcomes(
        self, source: Any, batch: dict[str, Any], stream: str, replace: Callable[[Tensor], Tensor] | None
    ) -> dict[str, Tensor]:
        if replace is None:
            return source.outcomes(source.forward(batch), batch)

        with source.spliced(batch, {stream: lambda x: replace(x.float())}):
            return source.outcomes(source.forward(batch), batch)

    def _result(self, means: dict[str, dict[str, float]], n: int) -> Result:
        rows: list[list[Any]] = []
        numbers: dict[str, float] = {}
        shares = []
        for name, clean in means["clean"].items():
            spliced, ablated = means["reconstructed"][name], means["mean-ablated"][name]
            effect = ablated - clean
            recovered = (ablated - spliced) / effect if abs(effect) > 1e-9 else None
            rows.append([name.replace("_", " "), clean, spliced, ablated, recovered])
            numbers |= {f"{name}/clean": clean, f"{name}/reconstructed": spliced, f"{name}/mean_ablated": ablated}
            if recovered is not None:
                numbers[f"{name}/recovered"] = recovered
                shares.append(recovered)
        average = sum(shares) / len(shares) if shares else float("nan")
        if shares:
            numbers["recovered"] = average
        return Result(
            name="Downstream",
            title=f"{average:.1%} of what mean ablation destroys is kept",
            numbers=numbers,
            tables=[Table("The model's own task", ["", "clean", "reconstructed", "mean-ablated", "recovered ↑"], rows)],
            settings={
                "split": self.split,
                "samples": n,
                "ablation": "mean",
                "headline": [{"label": "task recovered", "value": f"{average:.1%}", "note": "mean ablation: 0 %"}],
            },
        )

"""Do single latents stand for known factors?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmsae.analyses.base import Analysis
from mmsae.analyses.fidelity import fitted_pca
from mmsae.cores import Neurons, RandomDictionary, SAECore
from mmsae.latents import LatentStore
from mmsae.metrics.recovery import Recovery, f1_score, recover
from mmsae.results import Result, Table
from mmsae.spec import in_float32

GOOD = 0.9
"""AUROC from which a latent counts as standing for a value."""


class FactorRecovery(Analysis):
    """For each value of each known factor, the best single latent, chosen on one split and scored on another.

    Raw neurons, PCA and a random dictionary of the same size are measured in the same way, with both of their signs.
    The strongest activation within a sample counts.

    Args:
        choose_on: Split on which the latent and its threshold are chosen.
        score_on: Split of the figures.
        pca_rows: Training rows that PCA sees.
        n_bootstrap: Resamples of the scoring split for the intervals.
        seed: Of the resamples and the random dictionary.
    """

    def __init__(
        self,
        choose_on: str = "val",
        score_on: str = "test",
        pca_rows: int = 100_000,
        n_bootstrap: int = 200,
        seed: int = 0,
    ) -> None:
        self.choose_on, self.score_on, self.pca_rows = choose_on, score_on, pca_rows
        self.n_bootstrap, self.seed = n_bootstrap, seed

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Four dictionaries, one table."""
        names = data.value_names
        if not names:
            return Result(name="FactorRecovery", title="the data have no labels, so there are no factors to recover")
        dictionaries: dict[str, SAECore] = {
            "dictionary": core,
            "neurons": Neurons(core.spec).eval(),
            "PCA": fitted_pca(core, data, self.pca_rows),
            "random": RandomDictionary(core.spec, core.d_latent, seed=self.seed).eval(),
        }
        chosen_on, chosen_labels = self._features(dictionaries, latents, data, self.choose_on)
        scored_on, scored_labels = self._features(dictionaries, latents, data, self.score_on)
        values = [(factor, value) for factor in names if factor in scored_labels for value in names[factor]]

        def told(found: dict[str, np.ndarray]) -> np.ndarray:
            return np.stack([found[factor] == names[factor].index(value) for factor, value in values], axis=1)

        y, y_test = told(chosen_labels), told(scored_labels)
        found = {name: recover((chosen_on.pop(name), y), (scored_on.pop(name), y_test)) for name in dictionaries}
        return self._result(found, values, y_test)

    def _features(
        self, dictionaries: dict[str, SAECore], latents: LatentStore, data: Any, split: str
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        known = {"dictionary": latents.pool()} if latents.split == split and not latents.signed else {}
        asked = {name: core for name, core in dictionaries.items() if name not in known}
        found, labels = pooled(asked, data.rows(split), f"baselines on {split}")
        return found | known, labels

    def _result(self, found: dict[str, Recovery], values: list[tuple[str, str]], labels: np.ndarray) -> Result:
        rows: list[list[Any]] = []
        numbers: dict[str, float] = {}
        for name, recovery in found.items():
            low, high = self._interval(recovery.predicted, labels)
            share = float((recovery.auroc >= GOOD).mean())
            mean_f1, mean_auroc = float(recovery.f1.mean()), float(np.nanmean(recovery.auroc))
            numbers |= {f"{name}/mean_f1": mean_f1, f"{name}/mean_auroc": mean_auroc, f"{name}/recovered": share}
            rows.append([name, mean_f1, f"{low:.3f} to {high:.3f}", mean_auroc, share])
        ours = found["dictionary"]
        per_value: list[list[Any]] = [
            [factor, value, int(ours.by_auroc[i]), float(ours.auroc[i]), *(float(r.f1[i]) for r in found.values())]
            for i, (factor, value) in enumerate(values)
        ]
        share = numbers["dictionary/recovered"]
        rivals = max((name for name in found if name != "dictionary"), key=lambda name: numbers[f"{name}/mean_f1"])
        return Result(
            name="FactorRecovery",
            title=f"{share:.0%} of {len(values)} factor values have a latent of their own (AUROC of at least {GOOD})",
            numbers=numbers,
            tables=[
                Table("Best single latent", ["", "mean F1 ↑", "95 %", "mean AUROC ↑", f"AUROC ≥ {GOOD} ↑"], rows),
                Table(
                    "AUROC of the best latent, and best F1 of each, by factor value",
                    ["factor", "value", "latent", "AUROC", "ours", *list(found)[1:]],
                    per_value,
                ),
            ],
            settings={
                "choose_on": self.choose_on,
                "score_on": self.score_on,
                "samples": len(labels),
                "headline": [
                    {
                        "label": "mean best F1",
                        "value": f"{numbers['dictionary/mean_f1']:.2f}",
                        "note": f"best baseline ({rivals}): {numbers[f'{rivals}/mean_f1']:.2f}",
                    },
                    {"label": "factors found", "value": f"{share:.0%}", "note": f"{len(values)} values"},
                ],
            },
        )

    def _interval(self, predicted: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        rng = np.random.default_rng(self.seed)
        n = len(labels)
        draws = [rng.integers(0, n, n) for _ in range(self.n_bootstrap)]
        means = [f1_score(predicted[i], labels[i]).mean() for i in draws]
        return (float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))) if means else (np.nan, np.nan)


@torch.no_grad()
def pooled(cores: dict[str, SAECore], batches: Any, label: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Strongest code of each latent in each sample, both signs of signed codes apart, and the labels of the samples.

    Returns:
        Features of each core `[n_samples, d_latent or twice that]`, and factor to value index `[n_samples]`.
    """
    ids: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in cores}
    labels: dict[str, list[Tensor]] = {}
    for batch in tqdm(batches, desc=label, leave=False, disable=None):
        own, place = batch["sample_id"].cpu().unique(return_inverse=True)
        for name, core in cores.items():
            codes, rows = core.by_row(core.encode(core.inputs(in_float32(batch)), batch), {"place": place})
            z = codes.dense()
            z = torch.cat([z, -z], dim=1) if core.signed else z
            parts[name].append(strongest(z, rows["place"], len(own)))
        ids.append(own)
        first = torch.zeros(len(own), dtype=torch.int64).scatter_reduce(
            0, place, torch.arange(len(place)), "amin", include_self=False
        )
        for name, column in batch.items():
            if name.startswith("label."):
                labels.setdefault(name.removeprefix("label."), []).append(column.cpu()[first])
    # a sample may be cut by the end of a batch
    own, place = torch.cat(ids).unique(return_inverse=True)
    features = {name: strongest(torch.cat(parts.pop(name)), place, len(own)).numpy() for name in cores}
    none = torch.zeros(len(own), dtype=torch.int64)
    found = {name: none.scatter(0, place, torch.cat(values)) for name, values in labels.items()}
    return features, {name: values.numpy() for name, values in found.items()}


def strongest(z: Tensor, place: Tensor, n_samples: int) -> Tensor:
    """Largest code of each latent, at least 0, over the rows of each sample, `[n_samples, d_latent]`."""
    empty = z.new_zeros(n_samples, z.shape[1])
    return empty.scatter_reduce(0, place[:, None].expand_as(z), z, "amax")

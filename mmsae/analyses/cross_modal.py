"""Do latents mean the same in both streams of a pair?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsae.analyses.base import Analysis
from mmsae.analyses.cross_modal_measures import (
    GOOD,
    SET,
    Codes,
    Measured,
    Recovered,
    auroc_of,
    dense_numbers,
    measure,
    random_coder,
)
from mmsae.analyses.pairs import Pairs, pairs_of
from mmsae.analyses.per_stream import coder_of
from mmsae.cores import SAECore
from mmsae.latents import LatentStore
from mmsae.metrics import cross_modal
from mmsae.results import Plot, Result, Table


class CrossModal(Analysis):
    """Which latents fire in both streams of pairs, whether they mean the same there, and what the codes are good for.

    Shares of multimodal latents rise on shuffled pairs, too: read them beside the retrieval of partners by code, and
    train a control on shuffled pairs (`recipes/compare_cross_modal.py` does). Beside the dictionary stand a random one
    of the same size and sparsity, and where it makes sense the embeddings themselves and shuffled pairs.

    Args:
        choose_on: Split on which latents are chosen for factor values.
        score_on: Split of the figures.
        max_pairs: At most so many pairs of each split.
        n_bootstrap: Resamples of the pairs for the intervals.
        n_queries: Queries of the cross-modal control for each factor value; 0 leaves it out.
        strength: What the control adds to a latent, in multiples of its mean activation.
        judge: A source of two towers whose embeddings say how alike examples are; without one the labels do.
        seed: Of the resamples, the shuffle and the random dictionary.
    """

    def __init__(
        self,
        choose_on: str = "val",
        score_on: str = "test",
        max_pairs: int = 5000,
        n_bootstrap: int = 200,
        n_queries: int = 50,
        strength: float = 3.0,
        judge: Any = None,
        seed: int = 0,
    ) -> None:
        self.choose_on, self.score_on, self.max_pairs = choose_on, score_on, max_pairs
        self.n_bootstrap, self.n_queries, self.strength = n_bootstrap, n_queries, strength
        self.judge, self.seed = judge, seed

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Two dictionaries, four tables."""
        chosen, scored = (pairs_of(core, data, split, self.max_pairs) for split in (self.choose_on, self.score_on))
        streams = list(scored.acts)
        factors = {name: len(values) for name, values in data.value_names.items() if name in scored.labels}
        ours = coder_of(core, streams)
        found = {"dictionary": ours}
        widths = {x.shape[1] for x in scored.acts.values()}
        if len(widths) == 1:
            k = max(round(latents.l0), 1)
            found["random"] = random_coder(widths.pop(), ours.d_latent, k, chosen, self.seed)
        judged = self._judged(scored, factors, data)
        numbers: dict[str, float] = {}
        measured = {}
        for name, coder in found.items():
            measured[name] = measure(coder, chosen, scored, factors, judged, self.n_queries, self.strength, self.seed)
            numbers |= {f"{name}/{key}": value for key, value in measured[name].numbers.items()}
        numbers |= {f"dense/{key}": value for key, value in dense_numbers(chosen, scored, factors).items()}
        first = measured["dictionary"]
        intervals = self._intervals(first, scored, factors)
        return self._result(numbers, intervals, measured, data.value_names, scored)

    def _judged(self, pairs: Pairs, factors: dict[str, int], data: Any) -> dict[str, Tensor]:
        if self.judge is not None and data.has_items:
            items = data.items(self.score_on)
            wanted = [items[int(i)] for i in pairs.samples]
            source = self.judge
            read = [source.read(source.collate(wanted[i : i + 64])) for i in range(0, len(wanted), 64)]
            names = list(read[0]["acts"])
            return {
                own: torch.cat([r["acts"][name] for r in read]) for own, name in zip(pairs.acts, names, strict=True)
            }
        return {stream: pairs.features(factors, stream) for stream in pairs.acts} if factors else {}

    def _intervals(self, found: Measured, scored: Pairs, factors: dict[str, int]) -> dict[str, tuple[float, float]]:
        one, other = found.scored.values()
        n, rng = one.shape[0], np.random.default_rng(self.seed)

        def interval(statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
            draws = [statistic(rng.integers(0, n, n)) for _ in range(self.n_bootstrap)]
            low, high = np.nanquantile(draws, [0.025, 0.975]) if draws else (np.nan, np.nan)
            return float(low), float(high)

        spans = {"jaccard": interval(lambda i: cross_modal.pair_support_jaccard(one[i], other[i]))}
        if factors:
            chosen = {name: codes[:, np.unique(found.crossed.latent)].toarray() for name, codes in found.scored.items()}
            place = {int(latent): i for i, latent in enumerate(np.unique(found.crossed.latent))}

            def recovered(rows: np.ndarray) -> float:
                scores = [
                    auroc_of(chosen[to], place[int(latent)], scored, factor, value, to, rows)
                    for (factor, value, _, to), latent in zip(found.crossed.values, found.crossed.latent, strict=True)
                ]
                return float(np.nanmean(scores))

            spans["cross_recovery"] = interval(recovered)
        for key in ("r@1",):
            share = found.numbers[key]
            spans[key] = wilson(share, 2 * n)
        return spans

    def _result(
        self,
        numbers: dict[str, float],
        spans: dict[str, tuple[float, float]],
        measured: dict[str, Measured],
        names: dict[str, list[str]],
        scored: Pairs,
    ) -> Result:
        columns = list(measured)

        def row(label: str, key: str, *dense: Any) -> list[Any]:
            span = "{:.3f} to {:.3f}".format(*spans[key]) if key in spans else ""
            return [label, *(numbers.get(f"{name}/{key}") for name in columns), *(dense or (None,)), span]

        streams = list(scored.acts)
        n = len(scored.samples)
        head = ["", *columns, "embeddings", "95 %"]
        usage = [
            row("fire in both streams", "both"),
            *(row(f"fire in {name} alone", f"only_{name}") for name in streams),
            row("dead", "dead"),
            row("of the live, balanced", "balanced"),
            row("latents shared by a pair, Jaccard ↑", "jaccard"),
            row("the same, pairs shuffled", "jaccard_shuffled"),
        ]
        use = [
            row("partner nearest (R@1) ↑", "r@1", numbers["dense/r@1"]),
            row("embeddings centred by stream: R@1 ↑", "", numbers["dense/r@1_centred"]),
            row("mean reciprocal rank ↑", "mrr", numbers["dense/mrr"]),
            row("modality gap ↓", "gap", numbers["dense/gap"]),
            row("cosine of a pair ↑", "pair_cosine", numbers["dense/pair_cosine"]),
            row("FVU ↓", "fvu"),
        ]
        tables = [Table("Share of latents that …", head, usage), Table("What codes tell of pairs", head, use)]
        if "dictionary/cross_recovery" in numbers:
            dense = (numbers.get("dense/cross_recovery"), numbers.get("dense/cross_found"), None)
            meaning = [
                row("AUROC of the latent chosen in the other stream ↑", "cross_recovery", dense[0]),
                row(f"values whose latent has {GOOD} there ↑", "cross_found", dense[1]),
                row("the same latent where it was chosen ↑", "same_recovery", numbers.get("dense/same_recovery")),
                row(f"latents with {SET} examples in both streams", "sets"),
                row("intra-similarity of concept sets ↑", "intra"),
                row("inter-similarity of concept sets ↓", "inter"),
                row("multimodal monosemanticity ↑", "mms"),
                row("precision gained by raising the latent ↑", "control"),
                row("the same, random latents", "control_random"),
            ]
            tables.append(Table("Do latents mean the same?", head, meaning))
            tables.append(self._by_value(measured["dictionary"].crossed, names))
        share = numbers["dictionary/both"]
        title = (
            f"{share:.0%} of the latents fire in both streams; codes find {numbers['dictionary/r@1']:.0%} of the "
            f"partners (embeddings {numbers['dense/r@1']:.0%})"
        )
        return Result(
            name="CrossModal",
            title=title,
            numbers=numbers,
            tables=tables,
            plots=[_plot(measured["dictionary"].scored, streams)],
            settings={
                "choose_on": self.choose_on,
                "score_on": self.score_on,
                "pairs": n,
                "chance of R@1": f"{1 / n:.4f}",
                "headline": [
                    {
                        "label": "latents in both streams",
                        "value": f"{share:.0%}",
                        "note": f"balanced {numbers['dictionary/balanced']:.0%} of the live",
                    },
                    {
                        "label": "partner found by code",
                        "value": f"{numbers['dictionary/r@1']:.1%}",
                        "note": f"embeddings {numbers['dense/r@1']:.1%}, chance {1 / n:.1%}",
                    },
                ],
            },
        )

    def _by_value(self, found: Recovered, names: dict[str, list[str]]) -> Table:
        rows: list[list[Any]] = [
            [factor, names[factor][value], f"{a} → {b}", int(latent), float(score)]
            for (factor, value, a, b), latent, score in zip(found.values, found.latent, found.auroc, strict=True)
        ]
        return Table(
            "The latent of each factor value, in the other stream", ["factor", "value", "", "latent", "AUROC"], rows
        )


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n trials."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(max(middle - half, 0)), float(min(middle + half, 1))


def _plot(codes: Codes, streams: list[str]) -> Plot:
    rates = cross_modal.firing_rates([codes[name] for name in streams[:2]])
    live = rates.max(0) > 0
    both = float((rates.min(0)[live] > 0).mean()) if live.any() else 0.0
    top = float(rates.max()) if live.any() else 1.0
    return Plot(
        title=f"{both:.0%} of the live latents fire in both streams; on the line as often in each",
        x=f"share of rows it fires on, {streams[0]}",
        y=f"share of rows it fires on, {streams[1]}",
        lines=[
            {"label": "latents", "x": rates[0][live].tolist(), "y": rates[1][live].tolist()},
            {"label": "as often in both", "x": [0, top], "y": [0, top], "rule": True},
        ],
        kind="points",
    )

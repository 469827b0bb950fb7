"""Do latents mean the same in both streams of a pair?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from mmsae.analyses.base import Analysis
from mmsae.analyses.pairs import Pairs, pairs_of
from mmsae.analyses.per_stream import StreamCoder, Union, coder_of, encoded
from mmsae.cores import RandomDictionary, SAECore
from mmsae.latents import LatentStore
from mmsae.metrics import code_retrieval, concept_sets, cross_modal
from mmsae.metrics.concept_control import cross_modal_control
from mmsae.metrics.monosemanticity import multimodal_monosemanticity
from mmsae.metrics.recovery import auroc
from mmsae.results import Plot, Result, Table

Codes = dict[str, Any]
"""Stream to SciPy sparse codes `[n, d_latent]`."""
GOOD = 0.9
"""AUROC from which a latent counts as standing for a value in the other stream."""
SET = 10
"""Examples of a concept set, as in the paper."""


class Recovered(NamedTuple):
    """Latents chosen for a factor value in one stream, tested in another.

    Attributes:
        values: Factor and value of each test, with the stream of choice and the stream of the test.
        auroc: Of the chosen latent, `[n]`.
        latent: The chosen latent, `[n]`.
    """

    values: list[tuple[str, int, str, str]]
    auroc: np.ndarray
    latent: np.ndarray


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
            return {own: torch.cat([r["acts"][name] for r in read]) for own, name in zip(pairs.acts, names, strict=True)}
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
                    _auroc(chosen[to], place[int(latent)], scored, factor, value, to, rows)
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
            f"{share:.0%} of the latents fire in both streams; codes find {numbers['dictionary/r@1']:.0%} of the partners "
            f"(embeddings {numbers['dense/r@1']:.0%})"
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
        return Table("The latent of each factor value, in the other stream", ["factor", "value", "", "latent", "AUROC"], rows)


class Measured(NamedTuple):
    """What `measure` found.

    Attributes:
        numbers: By name.
        scored: Codes of the scoring split.
        crossed: The latents of factor values; empty without labels.
    """

    numbers: dict[str, float]
    scored: Codes
    crossed: Recovered


def measure(
    coder: StreamCoder,
    chosen: Pairs,
    scored: Pairs,
    factors: dict[str, int],
    judged: dict[str, Tensor] | None = None,
    n_queries: int = 50,
    strength: float = 3.0,
    seed: int = 0,
) -> Measured:
    """All figures of one dictionary.

    Args:
        coder: The dictionary.
        chosen: Pairs on which latents are chosen.
        scored: Pairs of the figures.
        factors: Number of values of each factor.
        judged: Stream to features of the scoring pairs that tell how alike they are; the labels by default.
        n_queries: Queries of the cross-modal control; 0 leaves it out.
        strength: Of the control, in multiples of a latent's mean activation.
        seed: Of the shuffle and of the control's random latents.
    """
    streams = list(scored.acts)
    first = {name: encoded(coder, x, name) for name, x in chosen.acts.items()}
    codes = {name: encoded(coder, x, name) for name, x in scored.acts.items()}
    one, other = (codes[name] for name in streams[:2])
    shuffled = other[np.random.default_rng(seed).permutation(other.shape[0])]
    counts = cross_modal.census([one, other])
    found = {f"only_{name}": count / coder.d_latent for name, count in zip(streams, counts.only, strict=False)}
    found |= {
        "both": counts.shared / coder.d_latent,
        "dead": counts.dead / coder.d_latent,
        "balanced": cross_modal.balanced_share([one, other]),
        "jaccard": cross_modal.pair_support_jaccard(one, other),
        "jaccard_shuffled": cross_modal.pair_support_jaccard(one, shuffled),
        **_found_partners(one, other),
        "gap": code_retrieval.modality_gap(one, other),
        "pair_cosine": code_retrieval.pair_cosine(one, other),
        "l0": float(np.mean([own.getnnz() / own.shape[0] for own in codes.values()])),
        "fvu": fvu(coder, scored),
    }
    crossed = Recovered([], np.zeros(0), np.zeros(0, np.int64))
    if factors:
        crossed = recover_across(first, codes, chosen, scored, factors)
        same = recover_across(first, codes, chosen, scored, factors, cross=False)
        found["cross_recovery"] = float(np.nanmean(crossed.auroc))
        found["cross_found"] = float(np.mean(np.nan_to_num(crossed.auroc) >= GOOD))
        found["same_recovery"] = float(np.nanmean(same.auroc))
    judged = judged or {name: scored.features(factors, name) for name in streams}
    if all(features.shape[1] for features in judged.values()):
        means = [concept_sets.set_means(codes[name], judged[name], SET) for name in streams[:2]]
        found["intra"] = concept_sets.intra_similarity(*means)
        found["inter"] = concept_sets.inter_similarity(*means)
        found["inter_symmetric"] = concept_sets.inter_similarity(*means, symmetric=True)
        mms = multimodal_monosemanticity(one, judged[streams[0]], other, judged[streams[1]])
        found["mms"] = float(mms.mean())  # over all latents: a dead one has 0
    if factors and n_queries and len({x.shape[1] for x in scored.acts.values()}) == 1:
        found |= control(coder, crossed, codes, scored, n_queries, strength, seed)
    return Measured(found, codes, crossed)


def fvu(coder: StreamCoder, pairs: Pairs) -> float:
    """Fraction of the variance about the mean of each stream that is left unexplained, over all streams together."""
    error = spread = 0.0
    with torch.no_grad():
        for name, x in pairs.acts.items():
            made = coder.decode_stream(name, coder.encode_stream(name, x))
            error += float((x - made).double().pow(2).sum())
            spread += float((x - x.double().mean(0)).pow(2).sum())
    return error / spread


def recover_across(
    chosen_codes: Codes,
    scored_codes: Codes,
    chosen: Pairs,
    scored: Pairs,
    factors: dict[str, int],
    cross: bool = True,
) -> Recovered:
    """The latent with the best AUROC for each factor value in one stream, tested in each other one.

    Args:
        chosen_codes: Of the pairs that latents are chosen on.
        scored_codes: Of the pairs that they are tested on.
        chosen: Labels of the former.
        scored: Labels of the latter.
        factors: Number of values of each factor.
        cross: Test in the other streams; else where they were chosen.
    """
    values: list[tuple[str, int, str, str]] = []
    scores: list[float] = []
    latents: list[int] = []
    for stream, codes in chosen_codes.items():
        dense = _dense(codes)
        targets = [name for name in scored_codes if (name != stream) == cross]
        for factor, n_values in factors.items():
            rows = np.flatnonzero(chosen.known(factor, stream))
            labels = chosen.labels[factor][rows][:, None] == np.arange(n_values)
            best = np.nan_to_num(auroc(dense[rows], labels)).argmax(1)
            for target in targets:
                own = _dense(scored_codes[target][:, best])
                for value in range(n_values):
                    score = _auroc(own, value, scored, factor, value, target, None)
                    values.append((factor, value, stream, target))
                    scores.append(score)
                    latents.append(int(best[value]))
    return Recovered(values, np.array(scores), np.array(latents, np.int64))


def control(
    coder: StreamCoder, crossed: Recovered, codes: Codes, pairs: Pairs, n_queries: int, strength: float, seed: int
) -> dict[str, float]:
    """Raise the latent of a factor value in queries without it, and count what is then found in the other stream."""
    gained, by_chance = [], []
    for (factor, value, stream, target), latent in zip(crossed.values, crossed.latent, strict=True):
        has = torch.as_tensor(pairs.labels[factor] == value) & torch.as_tensor(pairs.known(factor, target))
        without = np.flatnonzero(pairs.labels[factor] != value)[:n_queries]
        active = codes[stream][:, [int(latent)]].data
        if not len(active) or not has.any() or not len(without):
            gained.append(0.0)
            by_chance.append(0.0)
            continue
        found = cross_modal_control(
            coder, pairs.acts[stream][without], pairs.acts[target], has, int(latent),  # type: ignore[arg-type]
            strength * float(np.abs(active).mean()), stream, seed=seed,
        )  # fmt: skip
        gained.append(found.delta)
        by_chance.append(float(found.random.mean()) - found.before if len(found.random) else 0.0)
    return {"control": float(np.mean(gained)), "control_random": float(np.mean(by_chance))}


def dense_numbers(chosen: Pairs, scored: Pairs, factors: dict[str, int]) -> dict[str, float]:
    """The same of the embeddings themselves, as far as it makes sense; their dimensions count with both signs."""
    one, other = list(scored.acts.values())[:2]
    if one.shape[1] != other.shape[1]:
        return dict.fromkeys(("r@1", "mrr", "gap", "pair_cosine"), float("nan"))
    found = {
        **_found_partners(one, other),
        "gap": code_retrieval.modality_gap(one, other),
        "pair_cosine": code_retrieval.pair_cosine(one, other),
    }
    if factors:
        signs = [{n: torch.cat([x, -x], 1).numpy() for n, x in p.acts.items()} for p in (chosen, scored)]
        crossed = recover_across(*signs, chosen, scored, factors)
        found["cross_recovery"] = float(np.nanmean(crossed.auroc))
        found["cross_found"] = float(np.mean(np.nan_to_num(crossed.auroc) >= GOOD))
        found["same_recovery"] = float(
            np.nanmean(recover_across(*signs, chosen, scored, factors, cross=False).auroc)
        )
    return found


def random_coder(width: int, d_latent: int, k: int, pairs: Pairs, seed: int) -> Union:
    """Random unit directions of the same number and sparsity, about the mean of each stream."""
    core = RandomDictionary(width, d_latent, k=k, seed=seed).eval()
    return Union(core, list(pairs.acts), {name: x.mean(0) for name, x in pairs.acts.items()})


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n trials."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(max(middle - half, 0)), float(min(middle + half, 1))


def _found_partners(one: Any, other: Any) -> dict[str, float]:
    """Retrieval, the mean over both directions."""
    ways = [code_retrieval.retrieval(a, b, (1, 5, 10)) for a, b in ((one, other), (other, one))]
    return {key: (ways[0][key] + ways[1][key]) / 2 for key in ways[0]}


def _auroc(
    codes: np.ndarray, column: int, pairs: Pairs, factor: str, value: int, stream: str, rows: np.ndarray | None
) -> float:
    """Of one column of codes `[n, columns]` for a factor value, on the rows (or a resample of them) that tell it."""
    known = pairs.known(factor, stream)
    rows = np.flatnonzero(known) if rows is None else rows[known[rows]]
    labels = pairs.labels[factor][rows][:, None] == value
    if labels.all() or not labels.any():
        return float("nan")
    return float(auroc(codes[rows][:, [column]], labels)[0, 0])


def _dense(codes: Any) -> np.ndarray:
    return codes.toarray() if sparse.issparse(codes) else np.asarray(codes)


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

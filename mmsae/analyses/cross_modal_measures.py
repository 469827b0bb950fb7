"""Figures of one dictionary on pairs: which latents fire where, and what they mean on either side."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from mmsae.analyses.pairs import Pairs
from mmsae.analyses.per_stream import StreamCoder, Union, encoded
from mmsae.cores import RandomDictionary
from mmsae.metrics import code_retrieval, concept_sets, cross_modal
from mmsae.metrics.concept_control import cross_modal_control
from mmsae.metrics.monosemanticity import multimodal_monosemanticity
from mmsae.metrics.recovery import auroc

Codes = dict[str, Any]
"""Stream to SciPy sparse codes `[n, d_latent]`, or to dense ones."""
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
        found |= alike(codes, judged)
        mms = multimodal_monosemanticity(one, judged[streams[0]], other, judged[streams[1]])
        found["mms"] = float(mms.mean())  # over all latents: a dead one has 0
    if factors and n_queries and len({x.shape[1] for x in scored.acts.values()}) == 1:
        found |= control(coder, crossed, codes, scored, n_queries, strength, seed)
    return Measured(found, codes, crossed)


def alike(codes: Codes, judged: dict[str, Tensor]) -> dict[str, float]:
    """How alike the concept sets of a latent are in both streams, and those of different latents.

    Args:
        codes: Of the pairs that the sets are drawn from.
        judged: Stream to features of the same pairs.
    """
    mine, theirs = (concept_sets.set_means(codes[name], judged[name], SET) for name in list(codes)[:2])
    return {
        "sets": float((np.isfinite(mine) & np.isfinite(theirs)).all(1).mean()),
        "intra": concept_sets.intra_similarity(mine, theirs),
        "inter": concept_sets.inter_similarity(mine, theirs),
        "inter_symmetric": concept_sets.inter_similarity(mine, theirs, symmetric=True),
    }


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
                    score = auroc_of(own, value, scored, factor, value, target)
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
    """The same of the embeddings themselves, as far as it makes sense; their dimensions count with both signs.

    Partners are also sought after the mean of each stream is subtracted, as many dictionaries do: that alone helps.
    """
    one, other = list(scored.acts.values())[:2]
    if one.shape[1] != other.shape[1]:
        return dict.fromkeys(("r@1", "mrr", "gap", "pair_cosine", "r@1_centred", "mrr_centred"), float("nan"))
    means = [x.mean(0) for x in list(chosen.acts.values())[:2]]
    centred = _found_partners(one - means[0], other - means[1])
    found = {
        **_found_partners(one, other),
        "gap": code_retrieval.modality_gap(one, other),
        "pair_cosine": code_retrieval.pair_cosine(one, other),
        "r@1_centred": centred["r@1"],
        "mrr_centred": centred["mrr"],
    }
    if factors:
        first, codes = ({n: torch.cat([x, -x], 1).numpy() for n, x in p.acts.items()} for p in (chosen, scored))
        crossed = recover_across(first, codes, chosen, scored, factors)
        same = recover_across(first, codes, chosen, scored, factors, cross=False)
        found["cross_recovery"] = float(np.nanmean(crossed.auroc))
        found["cross_found"] = float(np.mean(np.nan_to_num(crossed.auroc) >= GOOD))
        found["same_recovery"] = float(np.nanmean(same.auroc))
    return found


def random_coder(width: int, d_latent: int, k: int, pairs: Pairs, seed: int) -> Union:
    """Random unit directions of the same number and sparsity, about the mean of each stream."""
    core = RandomDictionary(width, d_latent, k=k, seed=seed).eval()
    return Union(core, list(pairs.acts), {name: x.mean(0) for name, x in pairs.acts.items()})


def _found_partners(one: Any, other: Any) -> dict[str, float]:
    """Retrieval, the mean over both directions."""
    ways = [code_retrieval.retrieval(a, b, (1, 5, 10)) for a, b in ((one, other), (other, one))]
    return {key: (ways[0][key] + ways[1][key]) / 2 for key in ways[0]}


def auroc_of(
    codes: np.ndarray, column: int, pairs: Pairs, factor: str, value: int, stream: str, rows: np.ndarray | None = None
) -> float:
    """AUROC of one column of codes `[n, columns]` for a factor value, on those of the rows that tell it."""
    known = pairs.known(factor, stream)
    rows = np.flatnonzero(known) if rows is None else rows[known[rows]]
    labels = pairs.labels[factor][rows][:, None] == value
    if labels.all() or not labels.any():
        return float("nan")
    return float(auroc(codes[rows][:, [column]], labels)[0, 0])


def _dense(codes: Any) -> np.ndarray:
    return codes.toarray() if sparse.issparse(codes) else np.asarray(codes)

"""Zero-shot decisions by embeddings and concepts together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.analyses.base import Analysis
from mmsae.analyses.cross_modal_measures import random_coder
from mmsae.analyses.pairs import Pairs, pairs_of
from mmsae.analyses.per_stream import StreamCoder, Union, coder_of, encoded
from mmsae.cores import PCA, SAECore
from mmsae.errors import MmsaeError
from mmsae.latents import LatentStore
from mmsae.results import Plot, Result, Table
from mmsae.spec import ACTS

ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Weights of concepts that are tried; 0, the embeddings alone, is among them."""


class ZeroShotConcepts(Analysis):
    """Does the alignment of concepts help to classify? `score = cos(x, t) + alpha cos(h(x), h(t))` (arXiv 2510.21323).

    x is an input and t a prompt for each value of a factor, h their codes; alpha is chosen for each factor on one split
    and scored on another. A random dictionary of the same size and sparsity and principal components get an alpha of
    their own in the same way: what they gain is what any second opinion gains.

    Args:
        choose_on: Split on which alpha is chosen.
        score_on: Split of the figures.
        prompts: Name of a label to one prompt for each of its values; by default those of the source.
        max_pairs: At most so many inputs of each split.
        pca_rows: Training rows that the components see.
        n_bootstrap: Resamples of the scoring split for the intervals of the gains.
        seed: Of the resamples and the random dictionary.
    """

    def __init__(
        self,
        choose_on: str = "val",
        score_on: str = "test",
        prompts: dict[str, list[str]] | None = None,
        max_pairs: int = 10_000,
        pca_rows: int = 100_000,
        n_bootstrap: int = 1000,
        seed: int = 0,
    ) -> None:
        self.choose_on, self.score_on, self.prompts, self.max_pairs = choose_on, score_on, prompts, max_pairs
        self.pca_rows, self.n_bootstrap, self.seed = pca_rows, n_bootstrap, seed

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Three dictionaries, one table."""
        source = data.source
        if source is None or not hasattr(source, "embed_texts"):
            return Result(name="ZeroShotConcepts", title="not measured: prompts need a source of two towers")
        given: Mapping[str, Sequence[str]] = self.prompts or source.prompts
        chosen, scored = (pairs_of(core, data, split, self.max_pairs) for split in (self.choose_on, self.score_on))
        prompts = {name: source.embed_texts(texts).float() for name, texts in given.items() if name in scored.labels}
        if not prompts:
            raise MmsaeError(f"no label has prompts: there are prompts for {', '.join(given) or 'none'}; give prompts.")
        stream = next(iter(scored.acts))
        x, y = chosen.acts[stream], scored.acts[stream]
        k, width = max(round(latents.l0), 1), y.shape[1]
        coders: dict[str, StreamCoder] = {"dictionary": coder_of(core, list(scored.acts))}
        coders["random"] = random_coder(width, core.d_latent, k, chosen, self.seed)
        coders["PCA"] = components(pairs_of(core, data, "train", self.pca_rows), k)
        found = {
            name: [
                decide(coder, x, y, texts, chosen.labels[factor], scored.labels[factor], stream)
                for factor, texts in prompts.items()
            ]
            for name, coder in coders.items()
        }
        return self._result(found, list(prompts), len(scored.samples))

    def _result(self, found: dict[str, list[Decided]], factors: list[str], n: int) -> Result:
        rng = np.random.default_rng(self.seed)
        draws = [rng.integers(0, n, n) for _ in range(self.n_bootstrap)]
        numbers: dict[str, float] = {}
        rows: list[list[Any]] = []
        for name, decided in found.items():
            gains = np.stack([d.with_concepts.astype(float) - d.base for d in decided])  # [factors, n]
            means = [gains[:, i].mean() for i in draws]
            low, high = np.quantile(means, [0.025, 0.975]) if means else (np.nan, np.nan)
            kinds = zip(*((d.base, d.with_concepts, d.alone) for d in decided), strict=True)
            base, ours, alone = (float(np.mean(kind)) for kind in kinds)
            numbers |= {f"{name}/base": base, f"{name}/with_concepts": ours, f"{name}/codes_alone": alone}
            numbers |= {f"{name}/gain": ours - base}
            rows.append([name, base, ours, ours - base, f"{low:+.4f} to {high:+.4f}", alone])
            for factor, d in zip(factors, decided, strict=True):
                own = {"base": d.base.mean(), "with_concepts": d.with_concepts.mean(), "alpha": d.alpha}
                numbers |= {f"{name}/{factor}/{key}": float(value) for key, value in own.items()}
        ours_by_factor: list[list[Any]] = [
            [factor, float(d.base.mean()), float(d.with_concepts.mean()), d.alpha, float(d.alone.mean())]
            for factor, d in zip(factors, found["dictionary"], strict=True)
        ]
        gain = numbers["dictionary/gain"]
        columns = ["", "embeddings", "with concepts ↑", "gain ↑", "95 %", "codes alone"]
        ours_by = zip(factors, found["dictionary"], strict=True)
        lines = [{"label": factor, "x": list(ALPHAS), "y": d.by_alpha} for factor, d in ours_by]
        return Result(
            name="ZeroShotConcepts",
            title=f"concepts change zero-shot accuracy by {100 * gain:+.1f} points",
            numbers=numbers,
            tables=[
                Table("Zero-shot accuracy, mean over the factors", columns, rows),
                Table("By factor", ["factor", "embeddings", "with concepts ↑", "alpha", "codes alone"], ours_by_factor),
            ],
            plots=[Plot("zero-shot accuracy on the split that alpha is chosen on", "alpha", "accuracy", lines)],
            settings={"choose_on": self.choose_on, "score_on": self.score_on, "inputs": n},
        )


class Decided(NamedTuple):
    """Decisions on one factor.

    Attributes:
        base: Whether embeddings alone are right, bool `[n]`.
        with_concepts: Whether they are with concepts.
        alone: Whether codes alone are.
        alpha: What was chosen.
        by_alpha: Accuracy of each alpha on the choosing split.
    """

    base: np.ndarray
    with_concepts: np.ndarray
    alone: np.ndarray
    alpha: float
    by_alpha: list[float]


def components(pairs: Pairs, k: int) -> Union:
    """Principal components of both streams, each less its mean; the k largest of a row are its code."""
    means = {name: x.mean(0) for name, x in pairs.acts.items()}
    core = PCA(next(iter(means.values())).shape[0])
    rows = torch.cat([x - means[name] for name, x in pairs.acts.items()])
    core.partial_fit({ACTS: {core.spec.input: rows}})
    core.count(torch.ones(core.d_latent), len(rows))
    core.finish()
    core.k = min(k, core.d_latent)
    return Union(core.eval(), list(pairs.acts), means)


def decide(
    coder: StreamCoder,
    chosen: Tensor,
    scored: Tensor,
    prompts: Tensor,
    chosen_labels: np.ndarray,
    scored_labels: np.ndarray,
    stream: str,
    text: str = "text",
) -> Decided:
    """Choose alpha, and classify.

    Args:
        coder: The dictionary.
        chosen: Inputs that alpha is chosen on, `[n, width]`.
        scored: Inputs that are classified.
        prompts: One for each class, `[n_classes, width]`.
        chosen_labels: Classes `[n]`.
        scored_labels: Classes.
        stream: Of the inputs.
        text: Of the prompts.
    """
    dense = [(normalize(x, dim=-1) @ normalize(prompts, dim=-1).t()).numpy() for x in (chosen, scored)]
    codes = [_code_cosines(coder, x, prompts, stream, text) for x in (chosen, scored)]
    by_alpha = [float(((dense[0] + a * codes[0]).argmax(1) == chosen_labels).mean()) for a in ALPHAS]
    alpha = ALPHAS[int(np.argmax(by_alpha))]  # the smallest of the best
    decisions = (dense[1], dense[1] + alpha * codes[1], codes[1])
    base, ours, alone = (d.argmax(1) == scored_labels for d in decisions)
    return Decided(base, ours, alone, alpha, by_alpha)


def _code_cosines(coder: StreamCoder, x: Tensor, prompts: Tensor, stream: str, text: str) -> np.ndarray:
    """Cosines of the codes of inputs and of prompts, `[n, n_classes]`; 0 where a code is empty."""
    units = []
    for rows, name in ((x, stream), (prompts, text)):
        code = torch.as_tensor(encoded(coder, rows, name).toarray())
        units.append(normalize(code, dim=-1))
    return (units[0] @ units[1].t()).numpy()

"""Which latents fire on words and on pictures, and do their words and pictures lie in the same direction?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mmsae.analyses.base import Analysis
from mmsae.analyses.media import Media
from mmsae.analyses.places import Places
from mmsae.analyses.strongest_tokens import KINDS, CrossModal, strongest_tokens
from mmsae.cores import SAECore
from mmsae.errors import checked
from mmsae.latents import LatentStore
from mmsae.metrics.cross_modal_weight import IMAGE, TEXT
from mmsae.results import Plot, Result, Table

WORDS = 5  # strongest words of a latent in the table


class Shown(NamedTuple):
    """A strong token: place of its sample, its row, its code, its kind."""

    sample: int
    row: int
    value: float
    kind: int


class CrossModalWeights(Analysis):
    """SAE-V's weight of each latent of a multimodal model: how alike are the text and image tokens on which it fires
    most (arXiv 2502.17514)? Beside it the weight of random tokens, and the latents with the largest weights.

    Args:
        split: Split whose tokens are looked at; the same as that of the evaluation.
        n: Text and image tokens of each latent (K).
        delta: Share of a latent's 99.9th percentile above which it counts as firing.
        max_rows: Activation rows looked at.
        n_latents: Latents shown, those with the largest weights.
        n_examples: Examples of each latent, half of them words, half of them pictures.
        thumbnail: Longest side of a picture, pixels.
        megabytes: Limit of all examples together.
        seed: Of the random tokens.
    """

    def __init__(
        self,
        split: str = "test",
        n: int = 16,
        delta: float = 0.1,
        max_rows: int = 200_000,
        n_latents: int = 100,
        n_examples: int = 8,
        thumbnail: int = 96,
        megabytes: float = 32.0,
        seed: int = 0,
    ) -> None:
        self.split, self.n, self.delta = split, checked("n", n, 1), checked("delta", delta, 0, 1)
        self.max_rows, self.seed = checked("max_rows", max_rows, 1), seed
        self.n_latents, self.n_examples = checked("n_latents", n_latents, 0), checked("n_examples", n_examples, 2)
        self.thumbnail, self.megabytes = thumbnail, checked("megabytes", megabytes, 0)

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Weights, their null, and the latents that have the largest."""
        if "token_type" not in latents.columns or latents.split != self.split:
            why = "these activations do not tell text from image tokens"
            if "token_type" in latents.columns:
                why = f"the codes are not those of all of the split {self.split!r}"
            return Result("CrossModalWeights", f"not measured: {why}")
        found = strongest_tokens(core, data.rows(self.split), self.n, self.delta, self.max_rows, self.seed)
        numbers, weights = self._numbers(found), found.weights.numpy()
        live = int((found.firings.sum(0) > 0).sum())
        order = np.argsort(-weights, kind="stable")
        largest = [int(j) for j in order[: self.n_latents] if weights[j] > 0]
        excess = numbers["omega"] - numbers["null"]
        title = (
            f"{numbers['bimodal']:.0%} of the live latents fire on words and pictures; their weight is "
            f"{numbers['omega']:.2f}, {abs(excess):.2f} {'above' if excess > 0 else 'below'} that of random tokens"
        )
        result = Result(
            "CrossModalWeights",
            title,
            numbers,
            [self._summary(found, numbers), self._largest(found, largest, latents, data)],
            [self._histogram(found, excess)] if found.bimodal.any() else [],
            settings={"split": self.split, "rows": int(found.n_tokens.sum()), "live latents": live, "K": self.n,
                      "delta": self.delta},
        )  # fmt: skip
        if data.has_items and largest:
            self._add_examples(result, found, largest, latents, data)
        return result

    def _numbers(self, found: CrossModal) -> dict[str, float]:
        live, own = found.firings.sum(0) > 0, found.bimodal
        n_live = max(int(live.sum()), 1)
        omega, centred = (float(w[own].mean()) if own.any() else float("nan") for w in (found.weights, found.centred))
        text, image = found.firings[TEXT] > 0, found.firings[IMAGE] > 0
        l0 = (found.firings.sum(1) / found.n_tokens).tolist()
        return {
            "bimodal": int(own.sum()) / n_live,
            "text_only": int((text & ~image).sum()) / n_live,
            "image_only": int((image & ~text).sum()) / n_live,
            "omega": omega,
            "null": float(found.null[0]),
            "omega_minus_null": omega - float(found.null[0]),
            "omega_centred": centred,
            "null_centred": float(found.null[1]),
            "l0_text": l0[TEXT],
            "l0_image": l0[IMAGE],
        }

    def _summary(self, found: CrossModal, numbers: dict[str, float]) -> Table:
        rows: list[list[Any]] = [
            ["mean weight ω", numbers["omega"], numbers["null"], numbers["omega_minus_null"]],
            ["mean weight ω, means of both kinds taken away", numbers["omega_centred"], numbers["null_centred"],
             numbers["omega_centred"] - numbers["null_centred"]],
        ]  # fmt: skip
        return Table("Latents that fire on both kinds of tokens", ["", "latents", "random tokens", "difference"], rows)

    def _largest(self, found: CrossModal, largest: list[int], latents: LatentStore, data: Any) -> Table:
        tokenizer = getattr(data.source, "tokenizer", None)
        rows: list[list[Any]] = []
        for j in largest[:20]:
            words: list[str] = []
            if tokenizer is not None and "token_id" in latents.columns:
                ids = latents.columns["token_id"][found.rows[TEXT, j].numpy()]
                words = list(dict.fromkeys(tokenizer.decode([int(i)]).strip() or "␣" for i in ids))[:WORDS]
            weight, centred = float(found.weights[j]), float(found.centred[j])
            on = [int(found.firings[kind, j]) for kind in KINDS]
            rows.append([j, weight, centred, *on, " · ".join(words)])
        columns = ["latent", "ω", "centred", "on text", "on image", "strongest words"]
        return Table("Largest weights", columns, rows)

    def _histogram(self, found: CrossModal, excess: float) -> Plot:
        values, null = found.weights[found.bimodal].numpy(), found.null_draws.numpy()
        edges = np.linspace(min(values.min(), null.min(), 0.0), 1, 41)
        lines = [{"label": name, "x": edges.tolist(), "y": np.histogram(of, bins=edges)[0].tolist()}
                 for name, of in (("latents", values), ("random tokens", null))]  # fmt: skip
        title = f"words and pictures of a latent lie {'closer' if excess > 0 else 'no closer'} than random tokens"
        return Plot(title, "weight ω: mean cosine of the strongest tokens", "latents", lines, kind="bars")

    def _add_examples(
        self, result: Result, found: CrossModal, largest: list[int], latents: LatentStore, data: Any
    ) -> None:
        """Gallery entries: the strongest words and the strongest patches of each latent, in their conversations."""
        items, where = data.items(self.split), Places(latents)
        media = Media(lambda i: data.render(items[i]), self.thumbnail, 10.0, 1e6 * self.megabytes)
        for j in largest:
            examples = []
            for shown in self._strongest(found, j, latents):
                sample_id = int(latents.samples[0][shown.sample])
                place = media.add(sample_id)
                said = where.of(j, shown.sample, shown.row, media.packed[place])
                note = f"strongest {KINDS[shown.kind]} token" + (f", {said['note']}" if said.get("note") else "")
                position = int(latents.columns["position"][shown.row]) if "position" in latents.columns else -1
                examples.append({"media": place, "sample": sample_id, "activation": shown.value, "position": position,
                                 **said, "note": note})  # fmt: skip
            values = latents.of_latent(j)[1]
            counts, edges = np.histogram(values, bins=24)
            result.latents.append(
                {
                    "id": j,
                    "density": float(latents.density[j]),
                    "mean": float(values.mean()),
                    "max": float(values[np.abs(values).argmax()]),
                    "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
                    "factor": None,
                    "captions": [],
                    "label": f"ω {float(found.weights[j]):.2f}, random tokens {float(found.null[0]):.2f}",
                    "examples": examples,
                }
            )
        result.media = media.packed

    def _strongest(self, found: CrossModal, latent: int, latents: LatentStore) -> Iterator[Shown]:
        """Of each kind the strongest tokens, one of each sample, in turn."""
        _, place = latents.samples
        sides: list[list[Shown]] = []
        for kind in KINDS:
            rows: np.ndarray = found.rows[kind, latent].numpy()
            rows = rows[rows >= 0]
            first = np.sort(np.unique(place[rows], return_index=True)[1])[: self.n_examples // 2]
            codes = latents.at(latent, rows[first])
            sides.append(
                [Shown(int(place[r]), int(r), float(v), kind) for r, v in zip(rows[first], codes, strict=True)]
            )
        for i in range(max(map(len, sides))):
            yield from (side[i] for side in sides if i < len(side))

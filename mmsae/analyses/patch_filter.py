"""How many image tokens does an answer need, and which?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmsae.analyses.base import Analysis
from mmsae.analyses.strongest_tokens import CrossModal, strongest_tokens
from mmsae.cores import SAECore
from mmsae.errors import checked
from mmsae.latents import LatentStore
from mmsae.metrics.cross_modal_weight import IMAGE, PATCH_SCORES, firing, patch_scores
from mmsae.results import Plot, Result, Table
from mmsae.spec import in_float32

RANDOM = "random"
MEASURES = {"accuracy": ("Exact answers", "↑"), "cross_entropy": ("Nats per token of the answers", "↓")}


class PatchFilter(Analysis):
    """SAE-V's filter of image tokens: keep the best of each picture, leave out the rest, and ask again
    (arXiv 2502.17514). Beside each score stands a random choice of as many.

    A token that is left out is masked from attention, so that no other token sees it; the positions of those that stay
    do not change. Answers are those of the data, `accuracy` being the share of answers of which every word is the
    likeliest one.

    Args:
        split: Split whose conversations are asked.
        weights_on: Split on which the weights of the latents are found.
        n_items: Conversations.
        keep: Shares of the image tokens of each picture that are kept.
        n: Text and image tokens of each latent, for the weights.
        delta: Share of a latent's 99.9th percentile above which it counts as firing.
        seed: Of the random choice.
    """

    def __init__(
        self,
        split: str = "test",
        weights_on: str = "val",
        n_items: int = 500,
        keep: Sequence[float] = (0.75, 0.5, 0.25),
        n: int = 16,
        delta: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.split, self.weights_on, self.n_items = split, weights_on, checked("n_items", n_items, 1)
        self.keep = [checked("keep", share, 0, 1) for share in keep]
        self.n, self.delta, self.seed = n, checked("delta", delta, 0, 1), seed

    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Accuracy and cross entropy of the answers for each score and share."""
        if why := unmasked(data.source):
            return Result("PatchFilter", f"not measured: {why}")
        found = strongest_tokens(core, data.rows(self.weights_on), self.n, self.delta, seed=self.seed)
        sums, n_items = self._asked(core, data, found)
        if not n_items:
            return Result("PatchFilter", "not measured: no conversation has an answer")
        numbers = {f"{name}/{measure}": float(total[i]) / n_items
                   for name, total in sums.items() for i, measure in enumerate(MEASURES)}  # fmt: skip
        names = [*PATCH_SCORES, RANDOM]
        tables = [self._table(numbers, measure, names) for measure in MEASURES]
        low = min(self.keep)
        best = max(PATCH_SCORES, key=lambda name: numbers[f"{name}/{low:g}/accuracy"])
        title = (
            f"with {low:.0%} of the image tokens, chosen by {best}, {numbers[f'{best}/{low:g}/accuracy']:.0%} of the "
            f"answers are right; by chance {numbers[f'{RANDOM}/{low:g}/accuracy']:.0%}, with all "
            f"{numbers['all/accuracy']:.0%}"
        )
        shares = [*self.keep, 1.0]
        lines = [{"label": name, "x": shares,
                  "y": [*(numbers[f"{name}/{s:g}/accuracy"] for s in self.keep), numbers["all/accuracy"]]}
                 for name in names]  # fmt: skip
        plot = Plot(f"kept by {best}, image tokens matter most", "share of image tokens kept", "exact answers", lines)
        settings = {"split": self.split, "conversations": n_items, "weights_on": self.weights_on}
        return Result("PatchFilter", title, numbers, tables, [plot], settings=settings)

    def _table(self, numbers: dict[str, float], measure: str, names: list[str]) -> Table:
        """One measure: a row for each score, a column for each share."""
        rows: list[list[Any]] = [
            [name, *(numbers[f"{name}/{share:g}/{measure}"] for share in self.keep)] for name in names
        ]
        rows.append(["all tokens", *(numbers[f"all/{measure}"] for _ in self.keep)])
        said, arrow = MEASURES[measure]
        return Table(
            f"{said} with a part of the image tokens", ["kept by", *(f"{s:.0%} {arrow}" for s in self.keep)], rows
        )

    @torch.no_grad()
    def _asked(self, core: SAECore, data: Any, found: CrossModal) -> tuple[dict[str, Tensor], int]:
        """Sums of the measures over conversations that have an answer, and the number of these."""
        g, sums, n_items, seen = torch.Generator().manual_seed(self.seed), {}, 0, 0  # type: ignore[var-annotated]

        def add(name: str, output: Any, batch: dict[str, Any]) -> None:
            measured = data.source.outcomes(output, batch)
            values = torch.stack([measured[m].float().cpu().nan_to_num() for m in MEASURES], 1)
            sums[name] = sums.get(name, 0) + values.sum(0).double()

        for batch in tqdm(data.item_batches(self.split), desc="leaving out image tokens", leave=False, disable=None):
            rows, output, _ = data.source.run(batch)
            rows = in_float32(rows)
            n_items += int((~data.source.outcomes(output, batch)["accuracy"].isnan()).sum())
            add("all", output, batch)
            ids, place = torch.unique(rows["sample_id"].cpu(), return_inverse=True)
            item = torch.searchsorted(batch["sample_id"], ids)[place]  # of a batch in order
            codes = core.encode(core.inputs(rows).cpu(), rows)
            kinds, position = rows["token_type"].cpu(), rows["position"].cpu()
            patches = kinds == IMAGE
            fires = firing(codes, kinds, item, len(batch["sample_id"]), found.threshold)
            scores = patch_scores(codes.sparse()[patches], item[patches], fires, found.weights)
            scores[RANDOM] = torch.rand(int(patches.sum()), generator=g)
            for name, score in scores.items():
                for share in self.keep:
                    lost = worst(score, item[patches], share)
                    mask = batch["attention_mask"].clone()
                    mask[item[patches][lost], position[patches][lost]] = 0
                    add(f"{name}/{share:g}", data.source.forward({**batch, "attention_mask": mask}), batch)
            seen += len(batch["sample_id"])
            if seen >= self.n_items:
                break
        return sums, n_items


def worst(score: Tensor, group: Tensor, keep: float) -> Tensor:
    """Which rows are not among the best `keep` of their group; of equal ones the first stay. Bool `[rows]`."""
    order = torch.argsort(score, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    counts = torch.bincount(group)
    rank = torch.arange(len(score)) - (counts.cumsum(0) - counts)[group[order]]
    lost = torch.zeros(len(score), dtype=torch.bool)
    lost[order] = rank >= (keep * counts[group[order]]).round().clamp_min(1)
    return lost


def unmasked(source: Any) -> str:
    """Why image tokens of a source cannot be left out by a mask; empty if they can."""
    if source is None:
        return "there is no model, only stored activations"
    if not hasattr(source, "image_id") or source.sees or source.positions == "mean":
        return "it takes a multimodal model (VisionLanguage), read at the tokens of its language model"
    if "mrope" in str(getattr(source.model_config, "text_config", source.model_config)):
        return "this model counts positions by its mask, so a token cannot be left out without moving the others"
    return ""

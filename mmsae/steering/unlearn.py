"""Removing concepts from a diffusion model: which latents speak of them at which step, and their negation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError, checked
from mmsae.spec import Batch, in_float32
from mmsae.steering.edits import LatentEdit, Rows


@dataclass(frozen=True)
class ConceptMeans:
    """How active each latent is, on average over all positions, for prompts of each concept at each timestep.

    Attributes:
        means: `[n_concepts, n_timesteps, d_latent]`.
        counts: Rows that each mean was taken over, `[n_concepts, n_timesteps]`.
        timesteps: Of the scheduler, descending as they are denoised, `[n_timesteps]`.
        concepts: Names of the concepts.
    """

    means: Tensor
    counts: Tensor
    timesteps: Tensor
    concepts: tuple[str, ...]

    @classmethod
    @torch.no_grad()
    def measure(cls, core: SAECore, batches: Iterable[Batch], factor: str, concepts: Sequence[str]) -> ConceptMeans:
        """Encode rows that carry `timestep` and `label.<factor>`, and keep nothing but the means.

        Args:
            core: A folded dictionary in `eval` mode.
            batches: As `ActivationDataModule.rows` gives them.
            factor: Name of the label.
            concepts: One name for each of its values.
        """
        sums: dict[int, Tensor] = {}
        counts: dict[int, Tensor] = {}
        for batch in batches:
            if f"label.{factor}" not in batch or "timestep" not in batch:
                has = ", ".join(name for name in batch if name.startswith("label.")) or "no labels"
                raise MmsaeError(f"the rows have no label {factor!r} with timesteps (they have {has}).")
            codes = core.encode(core.inputs(in_float32(batch)), batch).sparse()
            assert codes.indices is not None
            label = batch[f"label.{factor}"].long().to(codes.values.device)
            for time in batch["timestep"].unique().tolist():
                rows = (batch["timestep"].to(label.device) == time) & (label >= 0)
                if time not in sums:
                    sums[time] = torch.zeros(len(concepts), core.d_latent, dtype=torch.float64)
                    counts[time] = torch.zeros(len(concepts), dtype=torch.float64)
                place = label[rows, None] * core.d_latent + codes.indices[rows]
                sums[time].view(-1).index_add_(
                    0, place.reshape(-1).cpu(), codes.values[rows].reshape(-1).double().cpu()
                )
                counts[time] += torch.bincount(label[rows], minlength=len(concepts)).cpu()
        if not sums:
            raise MmsaeError("there are no activations to learn a concept from.")
        times = sorted(sums, reverse=True)
        total, number = torch.stack([sums[t] for t in times], 1), torch.stack([counts[t] for t in times], 1)
        if empty := [name for name, n in zip(concepts, number.sum(1).tolist(), strict=True) if n == 0]:
            raise MmsaeError(f"no row has the {factor} {', '.join(empty)}; give more prompts.")
        means = total / number.clamp_min(1)[..., None]
        return cls(means.float(), number, torch.tensor(times, dtype=torch.float32), tuple(concepts))

    def index(self, concept: str) -> int:
        """The number of a concept."""
        if concept not in self.concepts:
            raise MmsaeError(f"there is no concept {concept!r}; choose among {', '.join(self.concepts)}.")
        return self.concepts.index(concept)

    def scores(self, concept: str) -> Tensor:
        """How much larger the share of a latent in all activity is for the concept than for the rest.

        `mu_i(t, D_c) / sum_j mu_j(t, D_c) - mu_i(t, D_other) / sum_j mu_j(t, D_other)`, `[n_timesteps, d_latent]`.
        """
        own = self.index(concept)
        others = torch.arange(len(self.concepts)) != own
        weights = self.counts[others][..., None].to(self.means)
        rest = (self.means[others] * weights).sum(0) / weights.sum(0).clamp_min(1)
        share = [mean / mean.sum(-1, keepdim=True).clamp_min(1e-12) for mean in (self.means[own], rest)]
        return share[0] - share[1]

    def selected(self, concept: str, percentile: float) -> Tensor:
        """Latents whose score exceeds the percentile of all scores at their timestep, bool `[n_timesteps, d_latent]`.

        With 20,480 latents the percentiles 99.999, 99.995 and 99.99 choose 1, 2 and 3.
        """
        checked("percentile", percentile, 0, 100)
        scores = self.scores(concept).double().numpy()
        return torch.as_tensor(scores > np.percentile(scores, percentile, axis=-1, keepdims=True))


class Unlearn(LatentEdit):
    """SAeUron: where a latent of the concept is unusually active, its code is multiplied by `gamma` times its mean.

    `z <- gamma * mu_i(t, D_c) * z` for the latents that were selected at the running timestep, at positions where z
    exceeds its mean over all concepts; what the dictionary does not explain is kept by `steer`. Acts on both halves of
    a guided step unless `where` says otherwise. Several concepts are removed at once by the union of their latents.

    Source: *SAeUron*, arXiv 2501.18052.

    Args:
        means: Of the concepts and of others to compare with.
        concepts: What to remove.
        percentile: See `ConceptMeans.selected`; one number, or one for each concept.
        gamma: 0 is ablation, negative values push to the other side.
        relative: Multiply by `gamma` alone, so that it does not depend on the unit of the codes.
    """

    def __init__(
        self,
        means: ConceptMeans,
        concepts: str | Sequence[str],
        percentile: float | Mapping[str, float] = 99.99,
        gamma: float | Mapping[str, float] = -1.0,
        relative: bool = False,
    ) -> None:
        names = [concepts] if isinstance(concepts, str) else list(concepts)
        if not names:
            raise MmsaeError("Unlearn needs a concept to remove.")
        n_times, d_latent = means.means.shape[1:]
        best = torch.full((n_times, d_latent), -torch.inf)
        factor = torch.ones(n_times, d_latent)
        chosen = torch.zeros(n_times, d_latent, dtype=torch.bool)
        for name in names:
            own = means.selected(name, percentile[name] if isinstance(percentile, Mapping) else percentile)
            scores = means.scores(name)
            strongest = own & (scores > best)  # a latent of two concepts belongs to the one that it speaks of more
            push = gamma[name] if isinstance(gamma, Mapping) else gamma
            value = torch.full_like(factor, push) if relative else push * means.means[means.index(name)]
            factor = torch.where(strongest, value, factor)
            best = torch.where(strongest, scores, best)
            chosen |= own
        union = chosen.any(0).nonzero()[:, 0]
        self.empty = not len(union)
        super().__init__(union if len(union) else torch.tensor([0]))
        self.timesteps = means.timesteps
        self.factor, self.chosen = factor[:, self.latents], chosen[:, self.latents]
        usual = (means.means * means.counts[..., None]).sum(0) / means.counts.sum(0).clamp_min(1)[:, None]
        self.usual = usual[:, self.latents].float()

    @property
    def n_selected(self) -> list[int]:
        """Latents that are edited at each timestep."""
        return self.chosen.sum(1).tolist()

    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """See the class."""
        if self.empty:
            return z
        if len(self.timesteps) == 1:  # words of a text encoder know none
            step = torch.zeros(len(z), dtype=torch.int64)
        else:
            now = rows.context.time.float().cpu()  # [B] or [1]
            step = (self.timesteps[:, None] - now[None]).abs().argmin(0).expand(rows.context.shape[0])
            step = step[rows.example.cpu()]  # [R]
        chosen, factor, usual = (x[step].to(z.device) for x in (self.chosen, self.factor, self.usual))
        return torch.where(chosen & (z > usual), factor.to(z) * z, z)

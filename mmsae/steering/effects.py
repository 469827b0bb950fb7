"""Choosing latents of a diffusion model by what they do to its pictures, asked or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError, checked
from mmsae.latents import LatentStore
from mmsae.sources.diffusion import Diffusion
from mmsae.steering.context import Context
from mmsae.steering.directions import random_direction
from mmsae.steering.drawing import Item, draw, over
from mmsae.steering.edits import Add, AddVector, Edit
from mmsae.steering.intervene import Intervention
from mmsae.steering.picture_judge import PictureJudge
from mmsae.steering.select import mean_difference


@dataclass(frozen=True)
class Stage:
    """Where effects are measured: a model, a dictionary, and some prompts with some seeds.

    Attributes:
        source: Draws.
        dictionary: Of `hook_point`.
        hook_point: Exactly one module.
        scale: What a strength of 1 is worth for each latent, `[d_latent]` (`mmsae.steering.quantiles`).
        items: Neutral prompts.
        seeds: Of the noise; every prompt is drawn with each.
        where: Positions, timesteps and half of the edit.
        batch_size: Pictures at a time.
    """

    source: Diffusion
    dictionary: SAECore
    hook_point: str
    scale: Tensor
    items: Sequence[Item]
    seeds: Sequence[int]
    where: Callable[[Context], Tensor] | None = None
    batch_size: int = 16

    def pictures(self, edits: Edit | Sequence[Edit] = ()) -> Tensor:
        """Pictures of all prompts with all seeds, prompts outermost, `[n, 3, H, W]`."""
        chosen = [edits] if isinstance(edits, Edit) else list(edits)
        items, seeds = over(self.items, self.seeds)
        own = Intervention(self.dictionary, self.hook_point, chosen, self.where, scale=self.scale)
        return draw(self.source, items, seeds, [own] if chosen else [], self.batch_size)


@dataclass(frozen=True)
class Effect:
    """What an edit does to the pictures.

    Attributes:
        latents: What was added to; empty for a random direction.
        strength: In units of `scale`.
        size: Mean distance 1 - cos of the embeddings before and after.
        consistency: Mean cosine between the changes of different pictures.
        direction: Mean change of the embedding, of length 1, `[embed_dim]`.
        description: The nearest words, best first, with their cosines.
    """

    latents: tuple[int, ...]
    strength: float
    size: float
    consistency: float
    direction: Tensor
    description: tuple[tuple[str, float], ...] = ()


def effect_of(before: Tensor, after: Tensor, latents: Sequence[int] = (), strength: float = 1.0) -> Effect:
    """Size and consistency of a change of unit embeddings `[n, embed_dim]`."""
    change = after - before
    unit = normalize(change, dim=-1)
    n = len(unit)
    alike = (unit @ unit.T).sum() - (unit * unit).sum()  # a picture that did not change agrees with none
    consistency = float(alike / (n * (n - 1))) if n > 1 else 1.0
    size = float((1 - (before * after).sum(-1)).mean())
    return Effect(tuple(int(i) for i in latents), strength, size, consistency, normalize(change.mean(0), dim=0))


def in_band(latents: LatentStore, low: float = 1e-4, high: float = 1e-2, n: int | None = None) -> Tensor:
    """Latents that fire in a share of rows between `low` and `high`, the strongest on single rows first, int64 `[n]`.

    What fires hardly ever, or nearly always, rarely stands for an attribute.
    """
    density = latents.density
    found = np.flatnonzero((density >= low) & (density <= high))
    if not len(found):
        at = np.percentile(density[density > 0], [5, 95]) if (density > 0).any() else [0, 0]
        raise MmsaeError(
            f"no latent fires in {low:g} to {high:g} of the rows; 90 % of those that fire at all lie between "
            f"{at[0]:.2g} and {at[1]:.2g}."
        )
    mean = np.array([np.abs(latents.of_latent(int(i))[1]).mean() for i in found])
    order = found[np.argsort(-latents.strongest[found] / mean, kind="stable")]
    return torch.as_tensor(order[:n].copy())


def candidates_for(latents: LatentStore, positive: np.ndarray, scale: Tensor, n: int = 8) -> list[int]:
    """Latents to try for a concept: those that fire most strongly more for it, and those that do so most reliably.

    The second alone (`mean_difference`) lists latents that hardly move anything, but never fail to.

    Args:
        latents: Codes of a data set.
        positive: Which of `latents.samples` have the concept, bool.
        scale: Unit of each latent, `[d_latent]`.
        n: How many.
    """
    reliable = mean_difference(latents, positive, n=n).ids.tolist()
    pooled = latents.pool()
    more = (pooled[positive].mean(0) - pooled[~positive].mean(0)) / scale.cpu().numpy()
    strong = np.argsort(-more, kind="stable")[:n].tolist()
    both = [int(i) for pair in zip(strong, reliable, strict=True) for i in pair]
    return list(dict.fromkeys(both))[:n]


def describe(
    effect: Effect, judge: PictureJudge, words: Sequence[str], neutral: str, template: str = "{}", n: int = 3
) -> Effect:
    """The effect with the words nearest to its direction in the space of the judge.

    Args:
        effect: Measured with this judge.
        judge: A CLIP.
        words: The vocabulary.
        neutral: The text that words are compared with: what the prompts have in common.
        template: How a word becomes a text.
        n: Words that are kept.
    """
    texts = judge.texts([template.format(word) for word in words])
    # a CLIP's texts all point to one side; the mean of the vocabulary says where
    towards = texts - torch.stack([judge.texts([neutral])[0], texts.mean(0)]).mean(0)
    cosines = cosine_similarity(towards, effect.direction[None], dim=-1)
    best = cosines.topk(min(n, len(words)))
    named = tuple((words[i], float(c)) for c, i in zip(best.values, best.indices.tolist(), strict=True))
    return replace(effect, description=named)


@dataclass(frozen=True)
class Discovery:
    """What `discover` found.

    Attributes:
        effects: One for each candidate, most consistent first.
        control: Of random directions of the same norms.
        threshold: The percentile of the control's consistencies above which an effect counts as found.
    """

    effects: list[Effect]
    control: list[Effect]
    threshold: float

    @property
    def found(self) -> list[Effect]:
        """Effects above the threshold."""
        return [effect for effect in self.effects if effect.consistency > self.threshold]


def discover(
    stage: Stage,
    judge: PictureJudge,
    candidates: Sequence[int],
    words: Sequence[str],
    neutral: str,
    template: str = "{}",
    strength: float = 1.0,
    n_random: int = 20,
    percentile: float = 95.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Discovery:
    """Find latents with a consistent effect on pictures, and words for it, without labels.

    The pipeline of *Probing the Representational Power of Sparse Autoencoders in Vision Models*, arXiv 2508.11277; the
    abstract leaves its details open, and these are ours: each candidate is added with the same strength, its effect is
    compared with that of random directions as long as the candidates' own steps, and named by the nearest word.

    Args:
        stage: Model, dictionary, neutral prompts and seeds.
        judge: A CLIP.
        candidates: Latents, for example of `in_band`.
        words: Vocabulary.
        neutral: See `describe`.
        template: See `describe`.
        strength: In units of the stage's `scale`.
        n_random: Random directions.
        percentile: Of their consistencies, above which an effect is kept.
        seed: Of the random directions.
        progress: Called with what is done and how much there is.
    """
    checked("n_random", n_random, 1)
    ids = [int(i) for i in candidates]
    rows = stage.dictionary.dictionary.detach()
    before = judge.pictures(stage.pictures())
    total = len(ids) + n_random
    effects = []
    for done, latent in enumerate(ids):
        after = judge.pictures(stage.pictures(Add(latent, strength)))
        effects.append(describe(effect_of(before, after, [latent], strength), judge, words, neutral, template))
        if progress is not None:
            progress(done + 1, total)
    lengths = (strength * stage.scale[ids] * rows[ids].norm(dim=-1).cpu()).tolist()
    control = []
    for number in range(n_random):
        length = lengths[number * max(len(lengths) // n_random, 1) % len(lengths)]
        vector = random_direction(rows.shape[1], length, seed=seed + number)
        after = judge.pictures(stage.pictures(AddVector(vector)))
        control.append(describe(effect_of(before, after, (), strength), judge, words, neutral, template))
        if progress is not None:
            progress(len(ids) + number + 1, total)
    threshold = float(np.percentile([effect.consistency for effect in control], percentile))
    return Discovery(sorted(effects, key=lambda effect: -effect.consistency), control, threshold)


def by_effect(
    stage: Stage,
    judge: PictureJudge,
    candidates: Sequence[int],
    text: str,
    neutral: str,
    strength: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Effect]:
    """Rank latents by how far each moves the pictures towards a text: activation alone does not tell.

    The score is the gain in similarity with `text`, less that with `neutral`; it replaces the words of `description`.

    Args:
        stage: Model, dictionary, prompts, seeds.
        judge: A CLIP.
        candidates: Latents to try, such as those of `mean_difference`.
        text: What the pictures shall show.
        neutral: What they show anyway.
        strength: In units of the stage's `scale`.
        progress: Called with what is done and how much there is.
    """
    before = judge.pictures(stage.pictures())
    towards = judge.texts([text])[0] - judge.texts([neutral])[0]
    found = []
    for done, latent in enumerate(int(i) for i in candidates):
        after = judge.pictures(stage.pictures(Add(latent, strength)))
        effect = effect_of(before, after, [latent], strength)
        gain = float(((after - before) @ towards).mean())
        found.append(replace(effect, description=((text, gain),)))
        if progress is not None:
            progress(done + 1, len(candidates))
    return sorted(found, key=lambda effect: -effect.description[0][1])

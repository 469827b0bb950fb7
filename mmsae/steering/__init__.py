"""Interventions on any model: what to edit, where, with which latents, and what it is compared with."""

from mmsae.steering.attribution import Attribution, attribute
from mmsae.steering.context import Context
from mmsae.steering.directions import difference_in_means, probe_direction, random_direction
from mmsae.steering.drawing import Content, draw
from mmsae.steering.edits import (
    Ablate,
    Add,
    AddVector,
    Attenuate,
    Clamp,
    CodesEdit,
    Edit,
    LatentEdit,
    Only,
    Patch,
    Project,
    Reconstruct,
    Replace,
    Rows,
    Scale,
    Suppress,
    SuppressRange,
    VectorEdit,
)
from mmsae.steering.effects import (
    Discovery,
    Effect,
    Stage,
    by_effect,
    candidates_for,
    discover,
    effect_of,
    in_band,
)
from mmsae.steering.intervene import Intervention, codes_at, columns_of, intervene, steer
from mmsae.steering.judge import Judge
from mmsae.steering.posterior import ConceptPosterior
from mmsae.steering.select import (
    Selection,
    frequency_difference,
    matched_random,
    mean_difference,
    means,
    nearest,
    quantiles,
)
from mmsae.steering.transplant import Trace, Transplant, trace
from mmsae.steering.unlearn import ConceptMeans, Unlearn
from mmsae.steering.where import (
    At,
    Between,
    Box,
    Conditional,
    Examples,
    Generated,
    ImageTokens,
    Mask,
    Steps,
    Timesteps,
    TokenIds,
    Where,
)

__all__ = [
    "Ablate", "Add", "AddVector", "At", "Attenuate", "Attribution", "Between", "Box", "Clamp", "CodesEdit",
    "ConceptMeans", "ConceptPosterior", "Conditional", "Content", "Context", "Discovery", "Edit", "Effect",
    "Examples", "Generated", "ImageTokens", "Intervention", "Judge", "LatentEdit", "Mask", "Only", "Patch", "Project",
    "Reconstruct", "Replace", "Rows", "Scale", "Selection", "Stage", "Steps", "Suppress", "SuppressRange",
    "Timesteps", "TokenIds", "Trace", "Transplant", "Unlearn", "VectorEdit", "Where", "attribute", "by_effect", "candidates_for",
    "codes_at", "columns_of", "difference_in_means", "discover", "draw", "effect_of", "frequency_difference",
    "in_band", "intervene", "matched_random", "mean_difference", "means", "nearest", "probe_direction", "quantiles",
    "random_direction", "steer", "trace",
]  # fmt: skip

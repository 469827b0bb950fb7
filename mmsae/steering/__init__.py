"""Interventions on any model: what to edit, where, with which latents, and what it is compared with."""

from mmsae.steering.attribution import Attribution, attribute
from mmsae.steering.context import Context
from mmsae.steering.directions import difference_in_means, probe_direction, random_direction
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
from mmsae.steering.intervene import Intervention, codes_at, columns_of, intervene, steer
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
    "ConceptMeans", "ConceptPosterior", "Conditional", "Context", "Edit", "Examples", "Generated", "ImageTokens",
    "Intervention", "LatentEdit", "Mask", "Only", "Patch", "Project", "Reconstruct", "Replace", "Rows", "Scale",
    "Selection", "Steps", "Suppress", "SuppressRange", "Timesteps", "TokenIds", "Unlearn", "VectorEdit", "Where",
    "attribute", "codes_at", "columns_of", "difference_in_means", "frequency_difference", "intervene",
    "matched_random", "mean_difference", "means", "nearest", "probe_direction", "quantiles", "random_direction",
    "steer",
]  # fmt: skip

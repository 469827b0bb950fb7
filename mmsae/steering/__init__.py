"""Interventions on any model: what to edit, where, with which latents, and what it is compared with."""

from mmsae.steering.attribution import Attribution, attribute
from mmsae.steering.context import Context
from mmsae.steering.directions import difference_in_means, probe_direction, random_direction
from mmsae.steering.dose import DoseResponse, score
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
    Swap,
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
from mmsae.steering.experiment import Arm, Experiment, experiment
from mmsae.steering.intervene import Intervention, codes_at, columns_of, edited, intervene, steer
from mmsae.steering.judges import Judge, RuleJudge, axbench
from mmsae.steering.picture_judge import PictureJudge
from mmsae.steering.posterior import ConceptPosterior
from mmsae.steering.readouts import PosteriorReadout, Probe, Readout, deciding
from mmsae.steering.select import (
    Selection,
    frequency_difference,
    matched_random,
    mean_difference,
    means,
    nearest,
    quantiles,
)
from mmsae.steering.sweep import Site, calibrate, sweep
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
from mmsae.steering.word_readouts import AnswerReadout, ContinuationReadout

__all__ = [
    "Ablate", "Add", "AddVector", "AnswerReadout", "Arm", "At", "Attenuate", "Attribution", "Between", "Box",
    "Clamp", "CodesEdit", "ConceptMeans", "ConceptPosterior", "Conditional", "Content", "Context",
    "ContinuationReadout", "Discovery", "DoseResponse", "Edit", "Effect", "Examples", "Experiment", "Generated",
    "ImageTokens", "Intervention", "Judge", "LatentEdit", "Mask", "Only", "Patch", "PictureJudge",
    "PosteriorReadout", "Probe", "Project", "Readout", "Reconstruct", "Replace", "Rows", "RuleJudge", "Scale",
    "Selection", "Site", "Stage", "Steps", "Suppress", "SuppressRange", "Swap", "Timesteps", "TokenIds", "Trace",
    "Transplant", "Unlearn", "VectorEdit", "Where", "attribute", "axbench", "by_effect", "calibrate",
    "candidates_for", "codes_at", "columns_of", "deciding", "difference_in_means", "discover", "draw", "edited",
    "effect_of", "experiment",
    "frequency_difference", "in_band", "intervene", "matched_random", "mean_difference", "means", "nearest",
    "probe_direction", "quantiles", "random_direction", "score", "steer", "sweep", "trace",
]  # fmt: skip

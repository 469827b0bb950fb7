"""Questions asked of a trained dictionary: one file each. The imports below are the registry."""

from mmsae.analyses.afa import AFA
from mmsae.analyses.base import Analysis
from mmsae.analyses.cross_modal import CrossModal
from mmsae.analyses.cross_modal_weights import CrossModalWeights
from mmsae.analyses.downstream import Downstream
from mmsae.analyses.factor_recovery import FactorRecovery
from mmsae.analyses.fidelity import Fidelity
from mmsae.analyses.head_attribution import HeadAttribution
from mmsae.analyses.patch_filter import PatchFilter
from mmsae.analyses.top_examples import TopExamples
from mmsae.analyses.zero_shot_concepts import ZeroShotConcepts
from mmsae.results import Plot, Result, Table

__all__ = [
    "AFA",
    "Analysis",
    "CrossModal",
    "CrossModalWeights",
    "Downstream",
    "FactorRecovery",
    "Fidelity",
    "HeadAttribution",
    "PatchFilter",
    "Plot",
    "Result",
    "Table",
    "TopExamples",
    "ZeroShotConcepts",
]

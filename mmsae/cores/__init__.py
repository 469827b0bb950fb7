"""Sparse dictionaries: one file each. The imports below are the registry."""

from mmsae.cores.abs_topk import AbsTopK
from mmsae.cores.alignment_autoencoder import AlignmentAutoencoder
from mmsae.cores.archetypal import Archetypal
from mmsae.cores.atoms import Atoms
from mmsae.cores.base import Affine, Losses, SAECore
from mmsae.cores.baselines import PCA, Neurons, RandomDictionary
from mmsae.cores.batch_topk import BatchTopK
from mmsae.cores.crosscoder import BatchTopKCrosscoder, Crosscoder, TopKCrosscoder
from mmsae.cores.feature_choice import FeatureChoice
from mmsae.cores.gated import Gated
from mmsae.cores.gradient_topk import GradientTopK
from mmsae.cores.group_bias import GroupBias
from mmsae.cores.group_max import GroupMax
from mmsae.cores.group_sparse import GroupSparse
from mmsae.cores.itda import ITDA
from mmsae.cores.jump_relu import JumpReLU
from mmsae.cores.linear import LinearCore
from mmsae.cores.matching_pursuit import MatchingPursuit
from mmsae.cores.matryoshka import Matryoshka
from mmsae.cores.multi_topk import MultiTopK
from mmsae.cores.p_anneal import PAnneal
from mmsae.cores.poly import PolySAE
from mmsae.cores.relu import ReLU
from mmsae.cores.saev import SAEV
from mmsae.cores.scikit import ICA, NMF, KMeans
from mmsae.cores.semi_nmf import SemiNMF
from mmsae.cores.shared_dictionary import SharedDictionary
from mmsae.cores.skip_transcoder import JumpReLUSkipTranscoder, SkipTranscoder
from mmsae.cores.temporal import Temporal
from mmsae.cores.top_afa import TopAFA
from mmsae.cores.topk import TopK
from mmsae.cores.variational import Variational
from mmsae.cores.vl_sae import VLSAE

__all__ = [
    "ICA",
    "ITDA",
    "NMF",
    "PCA",
    "SAEV",
    "VLSAE",
    "AbsTopK",
    "Affine",
    "AlignmentAutoencoder",
    "Archetypal",
    "Atoms",
    "BatchTopK",
    "BatchTopKCrosscoder",
    "Crosscoder",
    "FeatureChoice",
    "Gated",
    "GradientTopK",
    "GroupBias",
    "GroupMax",
    "GroupSparse",
    "JumpReLU",
    "JumpReLUSkipTranscoder",
    "KMeans",
    "LinearCore",
    "Losses",
    "MatchingPursuit",
    "Matryoshka",
    "MultiTopK",
    "Neurons",
    "PAnneal",
    "PolySAE",
    "RandomDictionary",
    "ReLU",
    "SAECore",
    "SemiNMF",
    "SharedDictionary",
    "SkipTranscoder",
    "Temporal",
    "TopAFA",
    "TopK",
    "TopKCrosscoder",
    "Variational",
]

"""Sparse dictionaries: one file each. The imports below are the registry."""

from mmsae.cores.base import Affine, Losses, SAECore
from mmsae.cores.baselines import PCA, Neurons, RandomDictionary
from mmsae.cores.batch_topk import BatchTopK
from mmsae.cores.jump_relu import JumpReLU
from mmsae.cores.linear import LinearCore
from mmsae.cores.matryoshka import Matryoshka
from mmsae.cores.relu import ReLU
from mmsae.cores.topk import TopK

__all__ = [
    "PCA",
    "Affine",
    "BatchTopK",
    "JumpReLU",
    "LinearCore",
    "Losses",
    "Matryoshka",
    "Neurons",
    "RandomDictionary",
    "ReLU",
    "SAECore",
    "TopK",
]

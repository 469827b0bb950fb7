"""The sparse operations that cores are made of; every body has the same signature, and gradients are exact."""

from mmsae.kernels.dense import dense_linear, nested_error
from mmsae.kernels.precision import CROSSOVER, LOW, fast_dtype, fast_precision
from mmsae.kernels.products import sparse_decode, sparse_decode_groups
from mmsae.kernels.selection import linear_above, linear_batch_topk, linear_topk

__all__ = [
    "CROSSOVER",
    "LOW",
    "dense_linear",
    "fast_dtype",
    "fast_precision",
    "linear_above",
    "linear_batch_topk",
    "linear_topk",
    "nested_error",
    "sparse_decode",
    "sparse_decode_groups",
]

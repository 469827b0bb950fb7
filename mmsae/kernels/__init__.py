"""The sparse operations that cores are made of; every body has the same signature and is exact."""

from mmsae.kernels.decode import sparse_decode, sparse_decode_groups
from mmsae.kernels.selection import batch_topk, topk

__all__ = ["batch_topk", "sparse_decode", "sparse_decode_groups", "topk"]

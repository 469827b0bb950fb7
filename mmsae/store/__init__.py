"""Activations and codes on disk, and activations live: knows tensors and metadata, never models."""

from mmsae.store.batches import Batches, Chunks
from mmsae.store.code_store import CodeStore
from mmsae.store.code_writer import CodeWriter
from mmsae.store.live import LiveChunks
from mmsae.store.manifest import CodeManifest, Manifest, Statistics
from mmsae.store.reader import DiskChunks, Store
from mmsae.store.shard_writer import Progress
from mmsae.store.top import TopActivations
from mmsae.store.writer import Writer

__all__ = [
    "Batches", "Chunks", "CodeManifest", "CodeStore", "CodeWriter", "DiskChunks", "LiveChunks", "Manifest", "Progress",
    "Statistics", "Store", "TopActivations", "Writer",
]  # fmt: skip

"""Activations on disk and live: knows tensors and metadata, never models."""

from mmsae.store.batches import Batches, Chunks
from mmsae.store.live import LiveChunks
from mmsae.store.manifest import Manifest, Statistics
from mmsae.store.reader import DiskChunks, Store
from mmsae.store.writer import Progress, Writer

__all__ = ["Batches", "Chunks", "DiskChunks", "LiveChunks", "Manifest", "Progress", "Statistics", "Store", "Writer"]

"""The Lightning module that writes the codes of a dictionary to disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

import mmsae.artifact
from mmsae.files import sha256
from mmsae.spec import Batch, in_float32
from mmsae.store import CodeWriter
from mmsae.store.manifest import MANIFEST
from mmsae.training.writing import StoreWritingModule

if TYPE_CHECKING:
    from datamodules.base import ActivationDataModule, Split


class EncodeModule(StoreWritingModule[CodeWriter]):
    """Encodes the activations of each split, stored or live, and writes the codes to a store.

    Args:
        sae: The dictionary: a run, an sae folder, or a hub id.
        data: The activations.
        out: Folder of the stores; each split gets one below it.
        splits: Which splits.
        dtype: How codes are stored, "float32" or "float16".
        rows_per_shard: Activation rows per file.
    """

    doing = "encoding"

    def __init__(
        self,
        sae: str | Path,
        data: ActivationDataModule,
        out: str | Path,
        splits: Iterable[Split],
        dtype: str = "float32",
        rows_per_shard: int = 65536,
    ) -> None:
        super().__init__(out, splits)
        self.core, self.dictionary = mmsae.artifact.load(sae), mmsae.artifact.identity(sae)
        self.data, self.stored_dtype, self.rows_per_shard = data, dtype, rows_per_shard
        self.core.check(data.spec)

    def writer(self, split: Split) -> CodeWriter:
        """For one split and this rank."""
        data, store = self.data, self.data.stored(split)
        plan = {
            "dictionary": self.dictionary,
            **data.origin(split),
            "activations": None if store is None else sha256(store.folder / MANIFEST),
            "batch_size": data.examples_per_forward if store is None else data.batch_size,
        }
        sizes = (self.core.d_latent, self.stored_dtype, self.rows_per_shard)
        return CodeWriter(self.out / split, plan, *sizes, self.trainer.global_rank, self.trainer.world_size)

    def batches(self, split: Split, skip: int) -> Iterable[Batch]:
        """Activation rows in order."""
        return self.data.rows(split, self.trainer.global_rank, self.trainer.world_size, skip)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """One batch, to disk."""
        columns = {name: column for name, column in batch.items() if isinstance(column, Tensor)}
        codes = self.core.encode(self.core.inputs(in_float32(batch)), batch)
        self.writer_of(dataloader_idx).add(*self.core.by_row(codes, columns))

    def finish(self, split: Split, writer: CodeWriter) -> None:
        """Write the manifest."""
        origin = self.data.origin(split)
        writer.finish(
            self.dictionary, self.core.spec, self.core.signed, origin["source"], origin["data"], self.data.value_names
        )

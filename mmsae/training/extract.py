"""The Lightning module that writes activations to disk, so that several devices share the work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L

from mmsae.errors import MmsaeError
from mmsae.store import Writer

if TYPE_CHECKING:
    from datamodules.base import ActivationDataModule, Split


class Remaining:
    """What a rank has left to do of a split.

    Not a `DataLoader`, because Lightning would deal those out to the ranks once more; and never of length 0, because
    then Lightning runs nothing, and an extraction that was killed before its manifest would never get one.

    Args:
        batches: Of this rank.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return max(len(self.batches), 1)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class ExtractModule(L.LightningModule):
    """Runs a source over a data set and writes the activations of each split to a store.

    Args:
        out: Folder of the stores; each split gets one below it.
        dtype: How activations are stored; "auto" keeps them as the model gives them.
        rows_per_shard: Activation rows per file.
        covariance: Also keep second moments, which whitening needs.
        splits: Which splits.
    """

    def __init__(
        self,
        out: str,
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        rows_per_shard: int = 65536,
        covariance: bool = False,
        splits: list[Literal["train", "val", "test"]] | None = None,
    ) -> None:
        super().__init__()
        self.out = Path(out)
        self.stored_dtype: str = dtype
        self.rows_per_shard, self.covariance = rows_per_shard, covariance
        self.splits: list[Split] = list(splits or ("train", "val", "test"))
        self.writers: dict[Split, Writer] = {}

    def prepare(self, data: ActivationDataModule) -> None:
        """Take the source; call before `trainer.predict`."""
        if data.source is None:
            raise MmsaeError(f"mmsae extract runs a model on {type(data).__name__}: give --data.source.")
        self.data = data
        self.model = data.source.model  # a submodule, so that Lightning places it

    def writer(self, split: Split, rank: int, world_size: int, precision: str) -> Writer:
        """For one split and rank."""
        assert self.data.source is not None
        plan: dict[str, Any] = {
            "source": self.data.source.identity,
            "data": self.data.identity(split),
            "examples_per_forward": self.data.examples_per_forward,
            "precision": precision,
        }
        sizes = (self.stored_dtype, self.rows_per_shard, self.covariance)
        return Writer(self.out / split, plan, *sizes, rank, world_size)

    def predict_dataloader(self) -> list[Any]:
        """What is left to do of each split, for this rank."""
        trainer, loaders = self.trainer, []
        for split in self.splits:
            writer = self.writer(split, trainer.global_rank, trainer.world_size, str(trainer.precision))
            if writer.complete:
                continue
            skip = writer.resume().batches
            self.writers[split] = writer
            loaders.append(Remaining(self.data.item_batches(split, skip, trainer.global_rank, trainer.world_size)))
        return loaders

    def title(self, dataloader_idx: int) -> str:
        """Of the progress bar."""
        return f"extracting {list(self.writers)[dataloader_idx]}"

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """One forward pass, to disk."""
        assert self.data.source is not None
        list(self.writers.values())[dataloader_idx].add(self.data.source.read(batch))

    def on_predict_end(self) -> None:
        """Last shards of all ranks, then the manifests."""
        for writer in self.writers.values():
            writer.close()
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            assert self.data.source is not None
            for split, writer in self.writers.items():
                names = {factor: list(values) for factor, values in self.data.factors.items()}
                writer.finish(self.data.source.identity, self.data.identity(split), names)
        self.trainer.strategy.barrier()

"""What the Lightning modules that write stores share: splits, ranks, and going on where they stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import lightning as L

from mmsae.store.shard_writer import ShardWriter

if TYPE_CHECKING:
    from datamodules.base import Split

AnyWriter = TypeVar("AnyWriter", bound=ShardWriter[Any])


class Remaining:
    """What a rank has left to do of a split.

    Not a `DataLoader`, because Lightning would deal those out to the ranks once more; and never of length 0, because
    then Lightning runs nothing, and a store whose writer was killed before the manifest would never get one.

    Args:
        batches: Of this rank.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return max(len(self.batches), 1)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class StoreWritingModule(L.LightningModule, ABC, Generic[AnyWriter]):
    """Writes one store for each split, in `trainer.predict`.

    Args:
        out: Folder of the stores; each split gets one below it.
        splits: Which splits.
    """

    doing = "writing"
    """For the progress bar."""

    def __init__(self, out: str | Path, splits: Iterable[Split]) -> None:
        super().__init__()
        self.out, self.splits = Path(out), list(splits)
        self.writers: dict[Split, AnyWriter] = {}

    @abstractmethod
    def writer(self, split: Split) -> AnyWriter:
        """For one split and this rank."""

    @abstractmethod
    def batches(self, split: Split, skip: int) -> Iterable[Any]:
        """What this rank does of a split, without its first `skip` batches."""

    @abstractmethod
    def finish(self, split: Split, writer: AnyWriter) -> None:
        """Write the manifest; called on one rank, after all have written their shards."""

    def predict_dataloader(self) -> list[Any]:
        """What is left to do of each split, for this rank."""
        loaders = []
        for split in self.splits:
            writer = self.writer(split)
            if writer.complete:
                continue
            skip = writer.resume().batches
            self.writers[split] = writer
            loaders.append(Remaining(self.batches(split, skip)))
        return loaders

    def title(self, dataloader_idx: int) -> str:
        """Of the progress bar."""
        return f"{self.doing} {list(self.writers)[dataloader_idx]}"

    def writer_of(self, dataloader_idx: int) -> AnyWriter:
        """The writer that a batch belongs to."""
        return list(self.writers.values())[dataloader_idx]

    def on_predict_end(self) -> None:
        """Last shards of all ranks, then the manifests."""
        for writer in self.writers.values():
            writer.close()
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            for split, writer in self.writers.items():
                self.finish(split, writer)
        self.trainer.strategy.barrier()

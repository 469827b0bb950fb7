"""The Lightning module that writes activations to disk, so that several devices share the work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from mmsae.errors import MmsaeError
from mmsae.store import Writer
from mmsae.training.writing import StoreWritingModule

if TYPE_CHECKING:
    from datamodules.base import ActivationDataModule, Split


class ExtractModule(StoreWritingModule[Writer]):
    """Runs a source over a data set and writes the activations of each split to a store.

    Args:
        out: Folder of the stores; each split gets one below it.
        dtype: How activations are stored; "auto" keeps them as the model gives them.
        rows_per_shard: Activation rows per file.
        covariance: Also keep second moments, which whitening needs.
        splits: Which splits.
    """

    doing = "extracting"

    def __init__(
        self,
        out: str,
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        rows_per_shard: int = 65536,
        covariance: bool = False,
        splits: list[Literal["train", "val", "test"]] | None = None,
    ) -> None:
        super().__init__(out, splits or ("train", "val", "test"))
        self.stored_dtype: str = dtype
        self.rows_per_shard, self.covariance = rows_per_shard, covariance

    def prepare(self, data: ActivationDataModule) -> None:
        """Take the source; call before `trainer.predict`."""
        if data.source is None:
            raise MmsaeError(f"mmsae extract runs a model on {type(data).__name__}: give --data.source.")
        self.data, self.source = data, data.source
        self.model = data.source.model  # a submodule, so that Lightning places it

    def writer(self, split: Split) -> Writer:
        """For one split and this rank."""
        plan: dict[str, Any] = {
            "source": self.source.identity,
            "data": self.data.identity(split),
            "examples_per_forward": self.data.examples_per_forward,
            "precision": str(self.trainer.precision),
            **({"gradients": True} if self.data.gradients else {}),
        }
        sizes = (self.stored_dtype, self.rows_per_shard, self.covariance)
        return Writer(self.out / split, plan, *sizes, self.trainer.global_rank, self.trainer.world_size)

    def batches(self, split: Split, skip: int) -> Iterable[Any]:
        """Collated examples."""
        return self.data.item_batches(split, skip, self.trainer.global_rank, self.trainer.world_size)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """One forward pass, to disk."""
        self.writer_of(dataloader_idx).add(self.source.read(batch, self.data.gradients))

    def finish(self, split: Split, writer: Writer) -> None:
        """Write the manifest."""
        names = {factor: list(values) for factor, values in self.data.factors.items()}
        writer.finish(self.source.identity, self.data.identity(split), names)

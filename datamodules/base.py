"""What a datamodule is: a data set of items, and a source or a store that turns them into activations."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from mmsae.errors import MmsaeError, checked
from mmsae.sources import Source
from mmsae.sources.items import render_image
from mmsae.spec import ActivationSpec, Batch, map_batch
from mmsae.store import Batches, DiskChunks, LiveChunks, Statistics, Store
from mmsae.store.batches import first_rows

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class ActivationDataModule(L.LightningDataModule):
    """Activations of a model on a data set, live from `source` or from a `store` on disk.

    A subclass writes `items(split)`, a data set of dicts: what its source collates (`image`, `text`, `input`, ...),
    `sample_id`, and optionally `labels`, a dict from factor to the index of its value.

    Args:
        source: The model and its hook points; not needed when training from a store.
        store: Folder of stores by split, as written by `mmsae extract`.
        batch_size: Activation rows per training step.
        chunk_rows: Rows held in memory and shuffled at a time.
        block_rows: Consecutive rows read from disk at once: larger is faster, smaller mixes better.
        examples_per_forward: Examples per forward pass of the source.
        seed: Of the order of rows.
        columns: Metadata columns that training batches carry, for cores that need them.
        gradients: Whether rows carry the gradient of the model's loss by the activation, for cores that need it;
            extraction then writes it and takes a backward pass more.
        whole_examples: Whether training batches are `batch_size` examples for the model, for end-to-end training,
            not activation rows.
        verify: "checksum" reads every stored byte once before training; "size" only finds truncated files.
    """

    factors: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Names of the values of each label."""
    allow_zero_length_dataloader_with_multiple_devices = True  # a small validation split may not reach every rank

    def __init__(
        self,
        source: Source | None = None,
        store: str | None = None,
        batch_size: int = 4096,
        chunk_rows: int = 131072,
        block_rows: int = 512,
        examples_per_forward: int = 64,
        seed: int = 0,
        columns: list[str] | None = None,
        gradients: bool = False,
        whole_examples: bool = False,
        verify: Literal["checksum", "size"] = "checksum",
    ) -> None:
        super().__init__()
        if source is None and store is None:
            raise MmsaeError(
                f"{type(self).__name__} needs activations: give --data.source (a model) or --data.store (a folder)."
            )
        self.source, self.store = source, store
        self.batch_size = checked("batch_size", batch_size, 1)
        self.chunk_rows = checked("chunk_rows", chunk_rows, 1)
        self.block_rows = checked("block_rows", block_rows, 1)
        self.examples_per_forward = checked("examples_per_forward", examples_per_forward, 1)
        self.seed, self.columns, self.verify = seed, list(columns or []), verify
        self.gradients, self.whole_examples = gradients, whole_examples
        if whole_examples and source is None:
            raise MmsaeError("whole_examples=true runs the model in every step: give --data.source.")
        self._stores: dict[str, Store] = {}

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """The examples of a split."""
        raise MmsaeError(f"{type(self).__name__} has no examples, only stored activations.")

    # ---- where activations come from

    def stored(self, split: Split) -> Store | None:
        """The opened and checked store of a split, or None if activations come live."""
        if self.store is None:
            return None
        if split not in self._stores:
            self._stores[split] = Store(Path(self.store) / split, self.verify)
        return self._stores[split]

    @cached_property
    def spec(self) -> ActivationSpec:
        """Widths of the streams, from the manifest or by asking the source once."""
        store = self.stored("train")
        if store is not None:
            return store.spec
        assert self.source is not None
        return self.source.spec

    @property
    def statistics(self) -> dict[str, Statistics] | None:
        """Moments of the training activations, if a store knows them."""
        store = self.stored("train")
        return None if store is None else store.statistics

    @property
    def value_names(self) -> dict[str, list[str]]:
        """Label column (without "label.") to the names of its values."""
        store = self.stored("train")
        return store.manifest.factors if store is not None else {f: list(values) for f, values in self.factors.items()}

    def origin(self, split: Split = "train") -> dict[str, Any]:
        """Model, hook points and data set, for the artifact and for stores of codes."""
        store = self.stored(split)
        if store is not None:
            return {"source": store.manifest.source, "data": store.manifest.data}
        assert self.source is not None
        return {"source": self.source.identity, "data": self.identity(split)}

    def identity(self, split: Split) -> dict[str, Any]:
        """Class, own arguments, split and size of the data set."""
        own = set(inspect.signature(type(self).__init__).parameters) - set(
            inspect.signature(ActivationDataModule.__init__).parameters
        )
        arguments = {name: getattr(self, name) for name in sorted(own - {"kwargs"})}
        n_examples = len(self.items(split))  # type: ignore[arg-type]
        return {"class": type(self).__name__, **arguments, "split": split, "n_examples": n_examples}

    @property
    def has_items(self) -> bool:
        """Whether examples can be shown, not only their activations."""
        return type(self).items is not ActivationDataModule.items

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """An example for the page: `{"kind": "image", "image": PIL.Image, "text": str}` or `{"kind": "text", ...}`."""
        if self.source is not None:
            return self.source.render(item)
        if "image" in item:
            return render_image(item)
        return {"kind": "text", "tokens": str(item.get("text", "")).split()}

    def render_stream(self, item: dict[str, Any], stream: str) -> dict[str, Any]:
        """What one stream of a pair sees of an example, such as its caption alone."""
        if self.source is not None:
            return self.source.render_stream(item, stream)
        return {"kind": "text", "tokens": [str(item.get("text", ""))]} if stream == "text" else self.render(item)

    def stated(self, split: Split) -> dict[str, np.ndarray]:
        """Factor to whether the text of each example says it, bool by `sample_id`; factors left out are said always."""
        return {}

    def rows(self, split: Split, rank: int = 0, world_size: int = 1, skip: int = 0) -> Rows:
        """Activation rows of a split in order, with all metadata; of one rank, without its first `skip` batches."""
        return Rows(self, split, rank, world_size, skip)

    # ---- loaders

    def train_dataloader(self) -> TrainedBatches | ExampleBatches:
        """Shuffled batches, resumable in the middle of an epoch."""
        if self.whole_examples:
            return ExampleBatches(self, *self._share())
        store, share = self.stored("train"), (*self._share(), self.gradients)
        chunk_rows = max(self.chunk_rows - self.chunk_rows % self.batch_size, self.batch_size)
        if store is not None:
            chunks = DiskChunks(store, chunk_rows, self.block_rows, self.columns, *share)
            return TrainedBatches(chunks, self.batch_size, self.seed, device=self._device())
        assert self.source is not None
        items = _not_empty(self.items("train"), type(self).__name__, "train")
        live = LiveChunks(self.source, items, chunk_rows, self.examples_per_forward, self.columns, *share)
        return TrainedBatches(live, self.batch_size, self.seed, device=self._device())

    def val_dataloader(self) -> Rows:
        """The validation split in order."""
        return Rows(self, "val", *self._share())

    def test_dataloader(self) -> Rows:
        """The test split in order."""
        return Rows(self, "test", *self._share())

    def predict_dataloader(self) -> Rows:
        """The test split in order."""
        return self.test_dataloader()

    def item_batches(self, split: Split, skip: int = 0, rank: int = 0, world_size: int = 1) -> DataLoader[Any]:
        """Collated examples in order, ready for the source; `skip` batches left out."""
        if self.source is None:
            raise MmsaeError(f"running the model on {type(self).__name__} needs --data.source.")
        items = _not_empty(self.items(split), type(self).__name__, split)
        chosen = range(rank, len(items), world_size)[skip * self.examples_per_forward :]  # type: ignore[arg-type]
        return DataLoader(
            dataset=Subset(items, chosen),
            batch_size=self.examples_per_forward,
            collate_fn=self.source.collate,
            generator=torch.Generator(),  # its own: a validation must not move the generator of the training
        )

    def _device(self) -> torch.device:
        """Where the training runs."""
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")

    def _share(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)


class TrainedBatches(Batches):
    """Batches whose saved position is that of the last one trained on.

    Lightning fetches one batch ahead from a loader that does not know its length, as live activations do not; a resumed
    run would skip that batch. So the module tells of each batch that it takes, by `trained`.
    """

    _taken: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Batch]:
        self._fetched: deque[dict[str, Any]] = deque(maxlen=8)
        for batch in super().__iter__():
            self._fetched.append(super().state_dict())
            yield batch

    def trained(self) -> None:
        """The oldest batch that was fetched is in use."""
        if self._fetched:
            self._taken = self._fetched.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Position after the batch in use."""
        return self._taken or super().state_dict()


class ExampleBatches:
    """Whole examples in a random order, collated for the model: what end-to-end training reads; resumable.

    Args:
        data: Where they come from.
        rank: Which share of each epoch.
        world_size: Number of shares.
    """

    def __init__(self, data: ActivationDataModule, rank: int = 0, world_size: int = 1) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size
        self.items = _not_empty(data.items("train"), type(data).__name__, "train")
        self.epoch, self.used, self.resumed = -1, 0, False

    def __len__(self) -> int:
        share = len(self.items) // self.world_size  # type: ignore[arg-type]
        return -(-share // self.data.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self.data.source is not None
        if not self.resumed:
            self.epoch, self.used = self.epoch + 1, 0
        self.resumed = False
        n = len(self.items)  # type: ignore[arg-type]
        order = np.random.default_rng([self.data.seed, self.epoch, 0]).permutation(n)
        order = order[: n - n % self.world_size][self.rank :: self.world_size]
        for start in range(self.used * self.data.batch_size, len(order), self.data.batch_size):
            chosen = order[start : start + self.data.batch_size]
            self.used += 1
            yield self.data.source.collate([self.items[int(i)] for i in chosen])

    def sample(self, n_rows: int) -> Batch:
        """Activation rows of the first examples, without moving the position."""
        source = self.data.source
        assert source is not None
        return first_rows((source.read(batch) for batch in ExampleBatches(self.data)), n_rows)

    def state_dict(self) -> dict[str, Any]:
        """Position in the running epoch."""
        return {"seed": self.data.seed, "epoch": self.epoch, "used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; the next `iter` finishes that epoch."""
        if state["seed"] != self.data.seed:
            raise MmsaeError(
                f"the checkpoint was made with another data seed than {self.data.seed}: resume with that one."
            )
        self.epoch, self.used = state["epoch"], state["used"]
        self.resumed = self.used < len(self)


class Rows:
    """Activation rows of a split in order, with all their metadata.

    Args:
        data: Where they come from.
        split: Which split.
        rank: Which share.
        world_size: Number of shares.
        skip: Batches of this share to leave out.
    """

    def __init__(
        self, data: ActivationDataModule, split: Split, rank: int = 0, world_size: int = 1, skip: int = 0
    ) -> None:
        self.data = data
        self.store = data.stored(split)
        self.loader = None if self.store is not None else data.item_batches(split, skip, rank, world_size)
        self.first, self.step = rank + skip * world_size, world_size

    def __len__(self) -> int:
        if self.store is None:
            return len(self.loader)  # type: ignore[arg-type]
        return len(self.store.cuts(self.data.batch_size)[self.first :: self.step])

    def __iter__(self) -> Iterator[Batch]:
        if self.store is not None:
            for piece in self.store.cuts(self.data.batch_size)[self.first :: self.step]:
                yield self.store.read([piece], gradients=self.data.gradients and self.store.manifest.gradients)
            return
        assert self.loader is not None
        assert self.data.source is not None
        for items in self.loader:
            with torch.no_grad():
                rows = self.data.source.read(items, self.data.gradients)
            yield map_batch(rows, lambda t: t.cpu())  # where dictionaries that are analysed are


def _not_empty(items: Dataset[dict[str, Any]], name: str, split: str) -> Dataset[dict[str, Any]]:
    if len(items) == 0:  # type: ignore[arg-type]
        raise MmsaeError(f"the {split} split of {name} is empty.")
    return items

"""What sources of images share: pictures to tensors, the patch grid, classification as the downstream measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmsae.errors import MmsaeError
from mmsae.sources.arrays import ArrayInput
from mmsae.sources.base import Source
from mmsae.sources.items import picture, render_image
from mmsae.sources.masks import majority, mask_of, origins
from mmsae.sources.positions import grid_places, patch_grid, patch_kinds

Task = Literal["classification"]


class ImageSource(Source):
    """A model that reads pictures; `load` sets `transform`, and `prefix` and `registers` where there are some."""

    modality = "image"
    prefix: int = 0  # class and register tokens in front of the patches
    registers: int = 0  # how many of them are registers
    transform: Callable[[Any], Tensor] | None = None  # picture to [C, H, W]
    arrays: ArrayInput | None = None  # how items with an `array` are read; without it as pictures of 8 bits
    task: Task | None = None
    _origins: dict[tuple[bool, int, int], Tensor] | None = None  # by kind and size, see `masks.origins`

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`input` float `[B, C, H, W]`; for items with a `mask` also `mask`, int64 `[B, H, W]`, -1 where unknown."""
        if self.transform is None:
            self.model  # noqa: B018, loading sets the transform
        inputs, sizes = [], []
        for item in items:
            if self.arrays is not None and "array" in item:
                inputs.append(self.arrays(item))
                sizes.append(tuple(item["array"].shape[:0:-1]))
            else:
                image = picture(item)
                inputs.append(self.transform(image))  # type: ignore[misc]
                sizes.append(image.size)
        batch = {"input": stacked(inputs)}
        if any("mask" in item for item in items):
            batch["mask"] = self._masks(items, sizes, batch["input"].shape[-2:])
        return batch

    def forward(self, batch: dict[str, Any]) -> Any:
        """What the model returns for `batch["input"]`."""
        return self.model(batch["input"].to(self.placed))

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Class tokens, registers, patches."""
        return patch_kinds(len(batch["sample_id"]), T, self._grid(batch, T)[0], self.registers)

    def grid(self, batch: dict[str, Any], T: int) -> tuple[Tensor, Tensor]:
        """Row and column of every patch."""
        return grid_places(len(batch["sample_id"]), T, *self._grid(batch, T))

    def columns(self, batch: dict[str, Any], T: int) -> dict[str, Tensor]:
        """`label.mask`: the most frequent value of the mask in each patch; -1 for class tokens, and where unknown."""
        mask = batch.get("mask")
        first, rows, columns = self._grid(batch, T)
        if mask is None or not rows:
            return {}
        labels = torch.full((len(mask), T), -1)
        labels[:, first:] = majority(mask.cpu(), rows, columns)
        return {"label.mask": labels}

    def outcomes(self, output: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`cross_entropy` (nats) and `accuracy` (0 or 1) against the label `class`, with `task="classification"`."""
        return classification(output, batch) if self.task == "classification" else {}

    def predictions(self, output: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits of the classes, and the label `class`."""
        if not isinstance(output, Tensor) or output.dim() != 2:
            return super().predictions(output, batch)
        labels = batch["columns"].get("label.class", torch.full((len(output),), -1))
        return output, labels.to(output.device)

    def generate(self, items: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        """The posterior of `class`, with `task="classification"`."""
        return decided(self, items) if self.task == "classification" else super().generate(items, **settings)

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The picture and its caption."""
        return render_image(item)

    def _masks(self, items: list[dict[str, Any]], sizes: list[tuple[int, int]], shape: torch.Size) -> Tensor:
        """The masks of items as their pictures were transformed."""
        if self._origins is None:
            self._origins = {}
        masks = torch.full((len(items), *shape), -1)
        for i, (item, size) in enumerate(zip(items, sizes, strict=True)):
            if "mask" not in item:
                continue
            as_array = self.arrays is not None and "array" in item
            key = (as_array, *size)
            if key not in self._origins:
                if len(self._origins) > 64:  # photographs come in any size
                    self._origins.clear()
                self._origins[key] = self.arrays.origins(size) if as_array else origins(self.transform, size)  # type: ignore
            values = torch.from_numpy(mask_of(item, size)).flatten()
            masks[i] = torch.where(self._origins[key] >= 0, values[self._origins[key]], -1)
        return masks

    def _grid(self, batch: dict[str, Any], T: int) -> tuple[int, int, int]:
        shape = batch["input"].shape
        if len(shape) != 4:
            return (self.prefix if self.prefix < T else 0), 0, 0
        return patch_grid(T, self.prefix, shape[2], shape[3])


def stacked(tensors: list[Tensor]) -> Tensor:
    """One tensor of several; MmsaeError when their shapes differ."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        shown = ", ".join(map(str, sorted(shapes)))
        raise MmsaeError(f"the inputs of one batch have different shapes ({shown}); make them equal with a transform.")
    return torch.stack(tensors)


@torch.no_grad()
def decided(source: Source, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Posteriors of the class for each item, from the logits that a classifier returns."""
    logits = source.forward(source.collate(items)).float().cpu()
    return [{"posterior": {"class": row}} for row in logits.softmax(-1)]


def classification(output: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Per example cross entropy and accuracy of logits `[B, n_classes]`; NaN where the label is unknown (-1)."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise MmsaeError("task='classification' needs a model that returns logits [batch, classes]; leave task out.")
    if "label.class" not in batch["columns"]:
        raise MmsaeError("task='classification' needs a label named 'class' in item['labels']; leave task out.")
    labels = batch["columns"]["label.class"].to(output.device)
    if int(labels.max()) >= output.shape[1]:
        raise MmsaeError(f"the label class={int(labels.max())} is none of the {output.shape[1]} classes of the model.")
    known = labels >= 0
    logits = output.float()
    loss = cross_entropy(logits, labels.clamp(min=0), reduction="none")
    right = (logits.argmax(1) == labels).float()
    return {"cross_entropy": loss.where(known, torch.nan), "accuracy": right.where(known, torch.nan)}

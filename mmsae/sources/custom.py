"""Any module of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmsae.errors import MmsaeError
from mmsae.sources.image import ImageSource, Task, stacked
from mmsae.sources.items import example_images, picture
from mmsae.spec import map_batch


class Custom(ImageSource):
    """Any PyTorch module, with items that hold its input.

        import torch
        from mmsae.sources import Custom

        from torch import nn
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5408, 10))
        source = Custom(net, ["1"], input_shape=[1, 28, 28], task="classification")
        items = [{"input": torch.rand(1, 28, 28), "sample_id": i, "labels": {"class": i % 10}} for i in range(4)]
        batch = source.read(source.collate(items))
        batch["acts"]["1"].shape                    # [4 * 26 * 26, 8], with row and column of every pixel
        source.spec.d_in                            # 8

    Args:
        model: The module, or a function without arguments that builds it.
        hook_points: Where to read.
        inputs: Key of the item that the model gets, unless the item has a tensor under `input`. A picture or the path
            of one becomes a float tensor `[3, H, W]` in 0..1.
        modality: What the items are: image, text, audio, signal, video, volume, graph or other.
        input_shape: Shape of one input, to find the widths without data; needed unless the inputs are pictures.
        transform: From what the item holds to the tensor.
        prefix_tokens: Tokens in front of the patches.
        channels_last: Feature maps are `[B, H, W, C]`.
        task: "classification" measures logits against the label `class`.
        call: Runs the model on a batch, `call(model, batch)`; by default `model(batch["input"])`. Further tensors of
            the items are in the batch under their keys.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        hook_points: Sequence[str],
        inputs: str = "image",
        modality: str = "image",
        input_shape: Sequence[int] | None = None,
        transform: Callable[[Any], Tensor] | None = None,
        prefix_tokens: int = 0,
        channels_last: bool = False,
        task: Task | None = None,
        call: Callable[[nn.Module, dict[str, Any]], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.modality = modality
        super().__init__(hook_points, **kwargs)
        self.given = model
        self.key = inputs
        self.input_shape = input_shape
        self.transform = transform
        self.prefix = prefix_tokens
        self.channels_last = channels_last
        self.task = task
        self.call = call

    def load(self) -> nn.Module:
        """The module that was given or is built now."""
        model = self.given if isinstance(self.given, nn.Module) else self.given()
        if not isinstance(model, nn.Module):
            raise MmsaeError(f"the model of Custom is {type(model).__name__}; give a torch module, or what builds one.")
        return model

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`input`, and the other tensors of the items under their keys, stacked."""
        batch = {"input": stacked([self._tensor(item) for item in items])}
        for key, value in items[0].items():
            if key not in ("input", self.key) and isinstance(value, Tensor) and value.dim():
                batch[key] = stacked([item[key] for item in items])
        return batch

    def forward(self, batch: dict[str, Any]) -> Any:
        """The model's output, through `call` if there is one."""
        moved = map_batch(batch, lambda tensor: tensor.to(self.placed))
        return self.call(self.model, moved) if self.call else self.model(moved["input"])

    def example_items(self) -> list[dict[str, Any]]:
        """Noise of `input_shape`, or plain pictures."""
        if self.input_shape is not None:
            noise = torch.rand(2, *self.input_shape, generator=torch.Generator().manual_seed(0))
            return [{"input": noise[i], "sample_id": i, "labels": {"class": 0}} for i in range(2)]
        if self.modality != "image":
            raise MmsaeError(
                f"Custom does not know the shape of {self.modality} inputs; give input_shape, e.g. [1, 1000]."
            )
        return example_images(224)

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """A picture where there is one (tensors stretched to 0..255), else the values or the text."""
        if self.modality == "image":
            shown = item if "image" in item else {**item, "image": as_picture(self._tensor(item))}
            return super().render(shown)
        if self.modality == "text":
            return {"kind": "text", "tokens": str(item.get("text", "")).split()}
        return {"kind": "signal", "values": self._tensor(item), "text": str(item.get("text") or "")}

    def describe(self) -> dict[str, Any]:
        """Name of the module's class."""
        kind = type(self.model)
        return {"model": f"{kind.__module__}.{kind.__qualname__}", "revision": None}

    def _tensor(self, item: dict[str, Any]) -> Tensor:
        key = "input" if "input" in item else self.key
        if key not in item:
            has = ", ".join(item)
            raise MmsaeError(f"item {item.get('sample_id')} has neither 'input' nor {self.key!r}; it has {has}.")
        value = item[key]
        if isinstance(value, Image.Image | str | Path):
            value = picture({**item, "image": value})
            if not self.transform:
                return torch.from_numpy(np.array(value)).permute(2, 0, 1) / 255
        tensor = torch.as_tensor(self.transform(value) if self.transform else value)
        return tensor.float() if tensor.dtype == torch.float64 else tensor


def as_picture(tensor: Tensor) -> Image.Image:
    """A `[H, W]` or `[C, H, W]` tensor as a picture, its values stretched to black and white."""
    maps = tensor.float()[None] if tensor.dim() == 2 else tensor.float()
    if maps.dim() != 3:
        raise MmsaeError(f"an input of shape {tuple(tensor.shape)} is no picture; say what it is: modality='signal'.")
    maps = maps[:3] if len(maps) >= 3 else maps[:1].expand(3, -1, -1)
    maps = (maps - maps.min()) / (maps.max() - maps.min()).clamp(min=1e-12)
    return Image.fromarray((maps * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy())

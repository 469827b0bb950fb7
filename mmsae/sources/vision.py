"""Image models of timm and torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmsae.errors import MmsaeError, nearest
from mmsae.sources.arrays import ArrayInput, example_arrays
from mmsae.sources.image import ImageSource, Task
from mmsae.sources.items import example_images
from mmsae.sources.weights import existing_file, first_line, hub_or_cache, load_weights, needs


class _NamedModel(ImageSource):
    """What models that a library knows by name have in common: where their weights are from, and their size."""

    def __init__(
        self,
        model: str,
        hook_points: Sequence[str],
        pretrained: bool | str | None,
        checkpoint: str | Path | None,
        image_size: int | None,
        config: dict[str, Any] | None,
        channels_last: bool | None,
        task: Task | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(hook_points, **kwargs)
        self.name = model
        self.pretrained = pretrained
        self.checkpoint = checkpoint
        self.image_size = image_size
        self.config = config or {}
        self.maps_last = channels_last
        self.task = task
        self.side = 0

    def example_items(self) -> list[dict[str, Any]]:
        """Plain pictures of the model's size, or arrays where it reads other than three channels."""
        self.model  # noqa: B018, loading finds the size
        if self.arrays is not None and self.arrays.n_channels != 3:
            return example_arrays(self.arrays.n_channels, self.arrays.size)
        return example_images(self.side)

    def describe(self) -> dict[str, Any]:
        """Name and weights."""
        given = {"pretrained": self.pretrained, "checkpoint": str(self.checkpoint) if self.checkpoint else None}
        return {"model": self.name, "revision": None, **given, "image_size": self.image_size, "config": self.config}


class Timm(_NamedModel):
    """An image model of timm: ViT, DINOv2 and v3, SigLIP, ConvNeXt, Swin, ResNet …

    Args:
        model: Name in timm, `hf-hub:org/name`, or a local folder.
        hook_points: Where to read, for example `blocks.11` (ViT), `layers.2` (Swin), `stages.3` (ConvNeXt).
        pretrained: Download the weights.
        checkpoint: Weight file to load instead.
        image_size: Side in pixels; by default the one the model was made for.
        config: Further arguments of `timm.create_model`, for example `in_chans: 5`.
        channels_last: Feature maps are `[B, H, W, C]`; by default as the model says of itself.
        task: "classification" measures logits against the label `class`.
        mean: One number per channel, of arrays in 0..1; needed where the model reads other than three channels.
        std: One number per channel.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    def __init__(
        self,
        model: str,
        hook_points: Sequence[str],
        pretrained: bool = False,
        checkpoint: str | Path | None = None,
        image_size: int | None = None,
        config: dict[str, Any] | None = None,
        channels_last: bool | None = None,
        task: Task | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, hook_points, pretrained, checkpoint, image_size, config, channels_last, task, **kwargs)
        if (mean is None) != (std is None):
            raise MmsaeError("give mean and std together, one number per channel each.")
        self.mean, self.std = mean and list(mean), std and list(std)

    def describe(self) -> dict[str, Any]:
        """Name, weights, and what arrays are normalised with."""
        return {**super().describe(), **({"mean": self.mean, "std": self.std} if self.mean else {})}

    def load(self) -> nn.Module:
        """`timm.create_model`, the weights, and the model's own preprocessing."""
        timm = needs("timm", "Timm", "vision")
        name = f"local-dir:{self.name}" if Path(self.name).is_dir() else self.name
        if ":" not in name and not timm.is_model(name):
            raise MmsaeError(f"timm has no model {name!r}; nearest: {nearest(name, timm.list_models())}.")
        if self.checkpoint:
            existing_file(self.checkpoint)
        weights = not self.checkpoint and (self.pretrained or name.startswith("local-dir:"))
        if weights and not name.startswith("local-dir:"):
            hub_or_cache()
        try:
            model = timm.create_model(name, pretrained=weights, **self.config)
        except TypeError as error:
            raise MmsaeError(f"timm cannot build {name!r} with config {self.config} ({first_line(error)}).") from error
        except Exception as error:
            raise MmsaeError(
                f"cannot fetch the timm model {name!r} ({first_line(error)}); without a connection give "
                "checkpoint=/path/to/weights.safetensors."
            ) from error
        if self.checkpoint:
            self._load_checkpoint(timm, model)
        if self.image_size and hasattr(model, "set_input_size"):  # position embeddings and windows follow
            model.set_input_size(img_size=self.image_size)

        data = timm.data.resolve_model_data_config(model)
        built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
        height, width = (self.image_size,) * 2 if self.image_size else built_for or data["input_size"][1:]
        data["input_size"] = (data["input_size"][0], height, width)
        self.arrays = self._read_arrays(model, (height, width), data)
        if self.arrays.n_channels == 3:
            data |= {"mean": self.mean or data["mean"], "std": self.std or data["std"]}
        self.transform = timm.data.create_transform(**data, is_training=False)
        self.side = max(height, width)
        self.prefix = getattr(model, "num_prefix_tokens", 0) or 0
        registers = getattr(model, "reg_token", None)
        self.registers = 0 if registers is None else registers.shape[1]
        last = str(getattr(model, "output_fmt", "")) in ("NHWC", "Format.NHWC")
        self.channels_last = last if self.maps_last is None else self.maps_last
        return model

    def _read_arrays(self, model: nn.Module, size: tuple[int, int], data: dict[str, Any]) -> ArrayInput:
        n_channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        mean, std = self.mean or data["mean"], self.std or data["std"]
        if len(mean) != n_channels:
            raise MmsaeError(
                f"{self.name!r} reads {n_channels} channels but mean has {len(mean)} numbers; give mean and std."
            )
        return ArrayInput(size, mean, std)

    def _load_checkpoint(self, timm: Any, model: nn.Module) -> None:
        try:
            timm.models.load_checkpoint(model, str(existing_file(self.checkpoint or "")), weights_only=True)
        except Exception as error:  # any: a pickle, another model, a truncated file
            path, why = str(self.checkpoint), first_line(error)
            raise MmsaeError(f"the checkpoint {path!r} does not fit the timm model {self.name!r} ({why}).") from error


class Torchvision(_NamedModel):
    """A classifier of torchvision.

    Args:
        model: Name in `torchvision.models.list_models()`.
        hook_points: Where to read, for example `layer4` or `encoder.layers.*`.
        weights: "DEFAULT" or another entry of the model's weights, downloaded; None for random ones.
        checkpoint: Weight file to load instead.
        image_size: Side in pixels; by default the one the model was trained with.
        config: Further arguments of the model's builder.
        channels_last: Feature maps are `[B, H, W, C]`; by default for Swin only.
        task: "classification" measures logits against the label `class`.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    def __init__(
        self,
        model: str,
        hook_points: Sequence[str],
        weights: str | None = None,
        checkpoint: str | Path | None = None,
        image_size: int | None = None,
        config: dict[str, Any] | None = None,
        channels_last: bool | None = None,
        task: Task | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, hook_points, weights, checkpoint, image_size, config, channels_last, task, **kwargs)

    def load(self) -> nn.Module:
        """`torchvision.models.get_model`, the weights, and their preprocessing."""
        models = needs("torchvision.models", "Torchvision", "vision")
        if self.name not in models.list_models():
            close = nearest(self.name, models.list_models())
            raise MmsaeError(f"torchvision has no model {self.name!r}; nearest: {close}.")
        known = models.get_model_weights(self.name)
        if self.pretrained not in (None, "DEFAULT", *known.__members__):
            names = ", ".join(known.__members__)
            raise MmsaeError(f"torchvision has no weights {self.pretrained!r} for {self.name}; it has {names}.")
        trained = known[self.pretrained] if self.pretrained else known.DEFAULT
        try:
            model = models.get_model(self.name, weights=None if self.checkpoint else self.pretrained, **self.config)
        except OSError as error:
            raise MmsaeError(
                f"cannot fetch the weights {self.pretrained} of {self.name} ({first_line(error)}); without a "
                "connection give checkpoint=/path/to/weights.pth."
            ) from error
        except TypeError as error:
            why = first_line(error)
            raise MmsaeError(f"torchvision cannot build {self.name} with config {self.config} ({why}).") from error
        if self.checkpoint:
            load_weights(model, self.checkpoint)

        size = {"crop_size": self.image_size, "resize_size": self.image_size} if self.image_size else {}
        transform: Any = trained.transforms(**size)
        self.transform = transform
        side = self.image_size or trained.transforms.keywords["crop_size"]
        self.arrays = ArrayInput((side, side), transform.mean, transform.std)
        self.side = side
        self.prefix = 1 if hasattr(model, "class_token") else 0
        self.channels_last = type(model).__name__ == "SwinTransformer" if self.maps_last is None else self.maps_last
        return model

"""Image encoders of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.errors import MmsaeError, checked
from mmsae.hooks import parse
from mmsae.sources.arrays import ArrayInput, example_arrays
from mmsae.sources.image import ImageSource, Task
from mmsae.sources.items import example_images
from mmsae.sources.positions import ORDINARY, grid_places
from mmsae.sources.text import DType
from mmsae.sources.weights import fetched, first_line, located, needs

MAPS_LAST = ("edgetam", "sam", "sam2", "sam3", "sam_hq", "vitpose")
"""Families whose blocks give maps `[B, H, W, C]`; their necks give `[B, C, H, W]`."""
ENCODERS = ("vision_encoder", "vision_model")
"""Where models of more than one part keep their image encoder."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class VisionEncoder(ImageSource):
    """An image encoder of transformers: ViT, DINOv2 and v3, SAM, SAM 2 (Hiera), Swin, ConvNeXt …

    Of a model of several parts (SAM, SAM 2) it is the image encoder that is read, and hook points are named from there.

    Args:
        model: Local folder, id on the Hugging Face hub, or `miniature:NAME`.
        hook_points: Where to read, for example `layers.*` (ViT, BEiT, SAM), `encoder.layer.*` (DINOv2),
            `model.layer.*` (DINOv3), `backbone.blocks.*` (SAM 2), `encoder.layers.*` (Swin), `encoder.stages.*`
            (ConvNeXt). With a task they begin with the name of the encoder in the classifier: `vit.layers.3`.
        image_size: Side in pixels, to which the whole picture is then resized; by default the model's own
            preprocessing is used.
        config: Build this configuration with random weights, e.g. `{"model_type": "sam2"}`; `model` is then only the
            preprocessing, if it is a folder.
        mean: One number per channel, of pictures in 0..1; by default those of the preprocessing, or of ImageNet.
        std: One number per channel.
        channels_last: Feature maps are `[B, H, W, C]`; by default for the blocks of SAM and SAM 2, not for their neck.
        task: "classification" loads the classifier and measures logits against the label `class`.
        dtype: Of the weights; "auto" is what the checkpoint has.
        revision: Branch, tag or commit on the hub.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        image_size: int | None = None,
        config: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels_last: bool | None = None,
        task: Task | None = None,
        dtype: DType = "auto",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(hook_points, **kwargs)
        self.name = str(model)
        self.image_size = None if image_size is None else checked("image_size", image_size, 1)
        self.config = config
        if (mean is None) != (std is None):
            raise MmsaeError("give mean and std together, one number per channel each.")
        self.mean, self.std = mean and list(mean), std and list(std)
        self.maps_last = channels_last
        self.task = task
        self.dtype = dtype
        self.revision = revision
        self.size = (0, 0)
        self.ordered = True  # positions are in the order of the patches
        self._options: dict[str, bool] = {}

    def load(self) -> nn.Module:
        """The model, of several parts only the image encoder, and its preprocessing; refused if weights are missing."""
        transformers = needs("transformers", "VisionEncoder", "vision")
        config = self._configured(transformers)
        whole = self._whole(transformers, config)
        part = None if self.task else next((name for name in ENCODERS if hasattr(whole, name)), None)
        model = getattr(whole, part) if part else whole
        if part:
            self.hook_points = [point.removeprefix(f"{part}.") for point in self.hook_points]
        own = model.config
        if own.model_type == "vit_mae":
            raise MmsaeError(
                f"{self.name!r} mixes up its patches at random; read it with Timm, e.g. vit_base_patch16_224.mae."
            )
        self._choose_layout(own)
        self._choose_prefix(own, model)
        self._choose_input(transformers, own)
        resizable = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if resizable else {}
        return model

    def forward(self, batch: dict[str, Any]) -> Any:
        """The output of the encoder; with a task the logits `[B, n_classes]`."""
        weights = next(self.model.parameters())
        x = batch["input"].to(weights.device, weights.dtype)
        try:
            output = self.model(pixel_values=x, **self._options)
        except ValueError as error:  # a picture of another size than the encoder was made for
            size = " x ".join(map(str, x.shape[-2:]))
            raise MmsaeError(f"{self.name!r} cannot read pictures of {size} pixels ({first_line(error)}).") from error
        return output.logits if self.task else output

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Class tokens, registers, patches."""
        if not self.ordered:
            return torch.full((len(batch["sample_id"]), T), ORDINARY)
        return super().kinds(batch, T)

    def grid(self, batch: dict[str, Any], T: int) -> tuple[Tensor, Tensor]:
        """Row and column of every patch; none for Hiera of MAE, whose positions are not in the order of the patches."""
        return super().grid(batch, T) if self.ordered else grid_places(len(batch["sample_id"]), T, 0, 0, 0)

    def columns(self, batch: dict[str, Any], T: int) -> dict[str, Tensor]:
        """`label.mask`, where positions have a place."""
        return super().columns(batch, T) if self.ordered else {}

    def example_items(self) -> list[dict[str, Any]]:
        """Plain pictures, or arrays where the model reads other than three channels."""
        self.model  # noqa: B018, loading finds the size
        assert self.arrays is not None
        if self.arrays.n_channels != 3:
            return example_arrays(self.arrays.n_channels, self.size)
        return example_images(max(self.size))

    def describe(self) -> dict[str, Any]:
        """Name, revision, size, and what pictures are normalised with."""
        commit = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        given = {"config": self.config, "image_size": self.image_size, "mean": self.mean, "std": self.std}
        return {"model": self.name, "revision": commit or self.revision, **given, "task": self.task}

    def _configured(self, transformers: Any) -> Any:
        if self.config is None:
            return fetched(transformers.AutoConfig.from_pretrained, self.name, "model", self.revision)
        try:
            return transformers.AutoConfig.for_model(**self.config)
        except (ValueError, TypeError, KeyError) as error:
            raise MmsaeError(f"transformers cannot build {self.config} ({first_line(error)}).") from error

    def _whole(self, transformers: Any, config: Any) -> Any:
        if self.task:
            kind = transformers.AutoModelForImageClassification
        elif type(config) in transformers.MODEL_FOR_MASK_GENERATION_MAPPING:  # SAM 2 is published with its video parts
            kind = transformers.AutoModelForMaskGeneration
        else:
            kind = transformers.AutoModel
        if self.config is not None:
            try:
                return kind.from_config(config, **({} if self.dtype == "auto" else {"dtype": self.dtype}))
            except (ValueError, TypeError) as error:
                raise MmsaeError(f"transformers cannot build {self.config} ({first_line(error)}).") from error
        arguments = {"dtype": self.dtype, "output_loading_info": True}
        model, info = fetched(kind.from_pretrained, self.name, "model", self.revision, **arguments)
        missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
        if missing:  # transformers would go on with random ones
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise MmsaeError(f"the weights of {self.name!r} lack {missing[0]!r}{more}.")
        return model

    def _choose_layout(self, config: Any) -> None:
        """Channels first or last, one choice for all hook points."""
        family = config.model_type.removesuffix("_vision_model").removesuffix("_hiera_det_model").removesuffix("_video")
        if self.maps_last is not None or family not in MAPS_LAST:
            self.channels_last = bool(self.maps_last)
            return
        last = {"neck" not in parse(point).path.split(".") for point in self.hook_points}
        if len(last) > 1:
            raise MmsaeError(
                f"the neck of {self.name!r} gives maps [B, C, H, W], its blocks [B, H, W, C]; extract them separately."
            )
        self.channels_last = last.pop()

    def _choose_prefix(self, config: Any, model: nn.Module) -> None:
        """How many tokens stand before the patches."""
        self.ordered = config.model_type != "hiera"
        tokens = (name.split(".")[-1] for name, _ in model.named_parameters())
        has_class = any(name in ("cls_token", "class_token", "class_embedding") for name in tokens)
        self.registers = getattr(config, "num_register_tokens", 0) or 0
        self.prefix = int(has_class) + self.registers

    def _choose_input(self, transformers: Any, config: Any) -> None:
        """The preprocessing of the model; without a folder that has one, or with `image_size`, a plain one."""
        processor = None
        if self.config is None or Path(located(self.name)).is_dir():
            processor = fetched(
                transformers.AutoImageProcessor.from_pretrained, self.name, "preprocessing", self.revision
            )
        n_channels = getattr(config, "num_channels", None)
        n_channels = n_channels or getattr(getattr(config, "backbone_config", None), "num_channels", None) or 3
        mean, std = (self.mean or getattr(processor, "image_mean", None) or IMAGENET[0],
                     self.std or getattr(processor, "image_std", None) or IMAGENET[1])  # fmt: skip
        if len(mean) != n_channels:
            raise MmsaeError(
                f"{self.name!r} reads {n_channels} channels but mean has {len(mean)} numbers; give mean and std."
            )
        self.size = self._sides(processor, config)
        self.arrays = ArrayInput(self.size, mean, std)
        if processor is not None and self.image_size is None and self.mean is None:
            self.transform = partial(_processed, processor)
        else:
            self.transform = partial(_plain, self.arrays)

    def _sides(self, processor: Any, config: Any) -> tuple[int, int]:
        """Height and width that the model reads."""
        if self.image_size:
            return self.image_size, self.image_size
        if processor is not None:
            from PIL import Image

            height, width = _processed(processor, Image.new("RGB", (64, 64))).shape[-2:]
            return height, width
        backbone = getattr(config, "backbone_config", None)
        side: Any = getattr(config, "image_size", None) or getattr(backbone, "image_size", None) or 224
        return (side, side) if isinstance(side, int) else (side[0], side[1])


def _processed(processor: Any, image: Any) -> Tensor:
    """A picture through the preprocessing of transformers, `[C, H, W]`."""
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def _plain(arrays: ArrayInput, image: Any) -> Tensor:
    """A picture resized as a whole, `[C, H, W]`."""
    import numpy as np

    return arrays({"array": np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255})

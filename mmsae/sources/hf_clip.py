"""CLIP, SigLIP and SigLIP 2 of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmsae.errors import MmsaeError
from mmsae.sources.hugging_face_towers import HuggingFaceTowers
from mmsae.sources.image import ImageSource
from mmsae.sources.items import example_images, picture
from mmsae.sources.positions import ORDINARY, PADDING
from mmsae.sources.text import DType


class HFCLIP(HuggingFaceTowers, ImageSource):
    """One tower of a CLIP, SigLIP or SigLIP 2 model of transformers.

    A checkpoint of the vision tower alone does too; `vision_model.encoder.layers.3` then means `encoder.layers.3`.

    Args:
        model: Local folder, or id on the Hugging Face hub, such as `openai/clip-vit-base-patch16`.
        hook_points: Where to read: `vision_model.encoder.layers.*`, `vision_model.encoder.layers.*.mlp`,
            `visual_projection` (CLIP) or `vision_model.head` (SigLIP) for embeddings, `text_model.encoder.layers.*`,
            `text_projection` or `text_model.head`.
        tower: Which half reads the items: their `image` or their `text`.
        prompts: Name of a label to one text for each of its values, to measure zero-shot.
        config: Build this configuration with random weights, e.g. `{"model_type": "clip", "vision_config": {...}}`;
            `model` is then only the tokenizer and the preprocessing, if it is a folder.
        dtype: Of the weights; "auto" is what the checkpoint has.
        revision: Branch, tag or commit on the hub.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    extra = "text"
    auto_preprocessor = "AutoImageProcessor"
    wrappers = ("vision_model", "text_model")

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        tower: Literal["image", "text"] = "image",
        prompts: Mapping[str, Sequence[str]] | None = None,
        config: dict[str, Any] | None = None,
        dtype: DType = "auto",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, hook_points, tower, prompts, config, dtype, revision, **kwargs)

    def load(self) -> nn.Module:
        """The model, and what it does to pictures and texts."""
        model: Any = super().load()
        if self.tower == "text" and not hasattr(model, "get_text_features"):
            raise MmsaeError(f"{self.name!r} has no text tower: set tower=image.")
        family = model.config.model_type
        if family not in ("clip", "siglip", "siglip2") and not hasattr(model, "get_image_features"):
            known = family.startswith(("clip_vision", "siglip_vision", "siglip2_vision"))
            if not known:
                raise MmsaeError(f"{self.name!r} is a model of the type {family}; HFCLIP reads clip, siglip, siglip2.")
        if family.startswith("siglip"):
            self.pad_texts = "max_length"  # as it was trained, and its embedding is read at the last position
        self.prefix = int(any(name.endswith("class_embedding") for name, _ in model.named_parameters()))
        self.transform = self._transformed
        return model

    def scale(self) -> Tensor:
        """The learnt one; SigLIP's bias changes no choice among prompts."""
        return self.model.logit_scale.exp()  # type: ignore[operator, union-attr]

    def plain_preprocessor(self, transformers: Any, config: Any) -> Any:
        """The family's own, at the side of the configuration."""
        vision = getattr(config, "vision_config", config)
        if config.model_type.startswith("siglip2"):
            return transformers.Siglip2ImageProcessor(patch_size=vision.patch_size, max_num_patches=vision.num_patches)
        side = {"height": vision.image_size, "width": vision.image_size}
        if config.model_type.startswith("siglip"):
            return transformers.SiglipImageProcessor(size=side)
        return transformers.CLIPImageProcessor(size={"shortest_edge": vision.image_size}, crop_size=side)

    def contents(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`input` `[B, 3, H, W]`; of SigLIP 2 with pictures of any shape patches `[B, T, d]`, their mask and grids."""
        if not self._any_shape:
            return ImageSource.tensors(self, items)
        if any("mask" in item for item in items):
            raise MmsaeError("masks need a model that reads pictures of one size; this SigLIP 2 cuts them as they are.")
        found = self.preprocessor(images=[picture(item) for item in items], return_tensors="pt")
        names = {"pixel_values": "input", "pixel_attention_mask": "patch_mask", "spatial_shapes": "shapes"}
        return {ours: torch.as_tensor(found[theirs]) for theirs, ours in names.items()}

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Of pictures."""
        model: Any = self.model
        more = (
            {"pixel_attention_mask": batch["patch_mask"], "spatial_shapes": batch["shapes"]}
            if "shapes" in batch
            else {}
        )
        call = getattr(model, "get_image_features", model)
        return call(pixel_values=batch["input"], **more).pooler_output

    def embed_words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of texts."""
        model: Any = self.model
        # SigLIP was trained without a mask
        more = {} if model.config.model_type.startswith("siglip") else {"attention_mask": mask}
        return model.get_text_features(input_ids=ids, **more).pooler_output

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Class token and patches; or start, words, end; padding."""
        if "shapes" not in batch or batch["patch_mask"].shape[1] != T:
            return super().kinds(batch, T)
        return torch.where(batch["patch_mask"].cpu() > 0, ORDINARY, PADDING)

    def grid(self, batch: dict[str, Any], T: int) -> tuple[Tensor, Tensor]:
        """Row and column of every patch; words have none."""
        if "shapes" not in batch or batch["patch_mask"].shape[1] != T:
            return super().grid(batch, T)
        index, columns = torch.arange(T)[None], batch["shapes"].cpu()[:, 1:]
        known = batch["patch_mask"].cpu() > 0
        return torch.where(known, index // columns, -1), torch.where(known, index % columns, -1)

    def example_items(self) -> list[dict[str, Any]]:
        """Plain pictures with a caption."""
        config: Any = self.model.config
        return example_images(getattr(getattr(config, "vision_config", config), "image_size", 64))

    @property
    def _any_shape(self) -> bool:
        """Whether the preprocessing cuts pictures of any shape into patches."""
        return hasattr(self.preprocessor, "max_num_patches")

    def _transformed(self, image: Any) -> Tensor:
        return torch.as_tensor(self.preprocessor(images=image, return_tensors="pt")["pixel_values"])[0]

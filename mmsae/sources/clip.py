"""The two towers of a CLIP model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmsae.errors import MmsaeError, nearest
from mmsae.sources.image import ImageSource
from mmsae.sources.items import example_images, text_of
from mmsae.sources.positions import DELIMITER, PADDING, PREFIX, Positions, grid_places
from mmsae.sources.two_towers import TwoTowers
from mmsae.sources.weights import first_line, hub_or_cache, needs, without_logs

Tower = Literal["image", "text"]


class OpenCLIP(TwoTowers, ImageSource):
    """One tower of a CLIP model of open_clip.

    Args:
        model: Name in open_clip, `hf-hub:org/name`, or a local folder with `open_clip_config.json` and weights.
        hook_points: Where to read: `visual.transformer.resblocks.*`, `visual`, `transformer.resblocks.*`, `ln_final` …
        pretrained: Tag (downloaded) or path of a weight file, for a model named in open_clip; None for random weights.
        tower: Which half reads the items: their `image` or their `text`.
        config: Parts of the model's configuration to replace, such as `embed_dim` and `vision_cfg`.
        prompts: Name of a label to one text for each of its values, to measure zero-shot.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    def __init__(
        self,
        model: str,
        hook_points: Sequence[str],
        pretrained: str | None = None,
        tower: Tower = "image",
        config: dict[str, Any] | None = None,
        prompts: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.choose_tower(tower, prompts)
        super().__init__(hook_points, **kwargs)
        self.name = model
        self.pretrained = pretrained
        self.config = config or {}
        self.tokenizer: Any = None

    def load(self) -> nn.Module:
        """The model, its preprocessing, and its tokenizer if the text is read."""
        open_clip = needs("open_clip", "OpenCLIP", "clip")
        name = f"local-dir:{self.name}" if Path(self.name).is_dir() else self.name
        trained = self.pretrained is not None or ":" in name
        if ":" not in name:
            self._check_name(open_clip, name)
        local = name.startswith("local-dir:") or bool(self.pretrained and Path(self.pretrained).is_file())
        if trained and not local:
            hub_or_cache()
        try:
            with without_logs():
                model, _, self.transform = open_clip.create_model_and_transforms(
                    name,
                    self.pretrained,
                    pretrained_text=False,  # no weights but those asked for
                    require_pretrained=trained,  # else open_clip goes on with random weights when a download fails
                    weights_only=True,
                    **self.config,
                )
            if self.tower == "text":
                self.tokenizer = open_clip.get_tokenizer(name, context_length=model.context_length)
        except Exception as error:
            said = f"{self.name!r}" + (f" with pretrained={self.pretrained!r}" if self.pretrained else "")
            if local or not trained:
                raise MmsaeError(f"open_clip cannot load {said} ({first_line(error)}).") from error
            raise MmsaeError(
                f"cannot fetch {said} ({first_line(error)}); give a local path with "
                "pretrained=/path/to/weights.safetensors, or a local folder as model."
            ) from error
        trunk = getattr(model.visual, "trunk", None)  # of timm
        self.prefix = getattr(trunk, "num_prefix_tokens", int(hasattr(model.visual, "class_embedding")))
        return model

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`input`: pictures `[B, 3, H, W]` or ids `[B, T]`."""
        if self.tower == "image":
            return super().tensors(items)
        return {"input": self._ids([text_of(item) for item in items])}

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """The embedding `[B, embed_dim]`, not normalised."""
        model: Any = self.model
        encode = model.encode_image if self.tower == "image" else model.encode_text
        return encode(batch["input"].to(self.placed))

    def scale(self) -> Tensor:
        """The learnt one."""
        return self.model.logit_scale.exp()  # type: ignore[operator, union-attr]

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Of text: start, words, end, padding."""
        if self.tower == "image":
            return super().kinds(batch, T)
        ids = batch["input"]
        kinds = torch.zeros(len(ids), T, dtype=torch.int64, device=ids.device)
        if ids.shape[1] != T:  # a pooled vector
            return kinds
        start, end, pad = special_ids(self.tokenizer)
        index = torch.arange(T, device=ids.device)
        last = (
            index.expand_as(ids).masked_fill(ids == pad, 0).amax(1, keepdim=True)
        )  # id 0 is padding and also "!": only the tail is
        kinds[index.expand_as(ids) > last] = PADDING
        kinds[(ids == end) & (kinds != PADDING)] = DELIMITER
        kinds[:, 0][ids[:, 0] == start] = PREFIX
        return kinds

    def grid(self, batch: dict[str, Any], T: int) -> tuple[Tensor, Tensor]:
        """Row and column of every patch; words have none."""
        return super().grid(batch, T) if self.tower == "image" else grid_places(len(batch["input"]), T, 0, 0, 0)

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The picture and its caption, or the words as the tower reads them."""
        if self.tower == "image":
            return super().render(item)
        ids = self._ids([text_of(item)])
        kinds = self.kinds({"input": ids}, ids.shape[1])[0]
        return {"kind": "text", "tokens": [token_name(self.tokenizer, i) for i in ids[0][kinds != PADDING].tolist()]}

    def example_items(self) -> list[dict[str, Any]]:
        """Plain pictures with a caption."""
        side: Any = getattr(self.model.visual, "image_size", 224)
        return example_images(max(side) if isinstance(side, tuple | list) else side)

    def describe(self) -> dict[str, Any]:
        """Name, weights and tower."""
        given = {"pretrained": self.pretrained, "config": self.config, "tower": self.tower}
        return {"model": self.name, "revision": None, **given}

    def columns(self, batch: dict[str, Any], T: int) -> dict[str, Tensor]:
        """Of pictures with masks: `label.mask`."""
        return super().columns(batch, T) if self.tower == "image" else {}

    def _ids(self, texts: list[str]) -> Tensor:
        model: Any = self.model
        if self.tokenizer is None:  # the source reads pictures, but needs prompts
            open_clip = needs("open_clip", "OpenCLIP", "clip")
            name = f"local-dir:{self.name}" if Path(self.name).is_dir() else self.name
            try:
                self.tokenizer = open_clip.get_tokenizer(name, context_length=model.context_length)
            except Exception as error:
                raise MmsaeError(f"cannot fetch the tokenizer of {self.name!r} ({first_line(error)}).") from error
        return self.tokenizer(texts)

    def _check_name(self, open_clip: Any, name: str) -> None:
        if name not in open_clip.list_models():
            raise MmsaeError(f"open_clip has no model {name!r}; nearest: {nearest(name, open_clip.list_models())}.")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if self.pretrained and self.pretrained not in tags and not Path(self.pretrained).is_file():
            known = ", ".join(tags) or "none"
            raise MmsaeError(
                f"pretrained={self.pretrained!r} is neither a file nor a tag of {name}; its tags: {known}."
            )


class SceneCLIP(OpenCLIP):
    """The miniature CLIP that ships with the package and knows the scenes (`mmsae.miniatures.clip`).

    Args:
        hook_points: Where to read: `visual.transformer.resblocks.*`, `visual`, `transformer.resblocks.*` …
        tower: Which half reads the items: their `image` or their `text`.
        positions: Which positions become rows.
        drop_special: Leave out class, start and end tokens.
        drop_outliers: Leave out positions with more than this multiple of the median norm in the batch.
        device: "auto" takes the GPU if there is one.
    """

    def __init__(
        self,
        hook_points: Sequence[str],
        tower: Tower = "image",
        positions: Positions = "all",
        drop_special: bool = False,
        drop_outliers: float | None = None,
        device: str = "auto",
    ) -> None:
        from mmsae.miniatures.captions import FACTORS, zero_shot_prompts

        chosen: dict[str, Any] = {"positions": positions, "drop_special": drop_special, "drop_outliers": drop_outliers}
        prompts = {factor: zero_shot_prompts(factor) for factor in FACTORS}
        super().__init__("scene_clip", hook_points, tower=tower, prompts=prompts, device=device, **chosen)

    def load(self) -> nn.Module:
        """The weights in the package."""
        from mmsae.miniatures.clip import scene_clip

        model, self.transform, self.tokenizer = scene_clip()
        self.prefix = 1
        return model


def special_ids(tokenizer: Any) -> tuple[int | None, int | None, int]:
    """Ids of start, end and padding, for the tokenizers of open_clip and of the miniature."""
    if hasattr(tokenizer, "sot_token_id"):
        return tokenizer.sot_token_id, tokenizer.eot_token_id, 0
    if hasattr(tokenizer, "tokenizer"):
        inner = tokenizer.tokenizer
        return inner.bos_token_id, inner.eos_token_id, inner.pad_token_id or 0
    return tokenizer.start, tokenizer.end, tokenizer.pad


def token_name(tokenizer: Any, index: int) -> str:
    """A token as a reader wants to see it; a word carries the space behind it."""
    if hasattr(tokenizer, "names"):
        name = tokenizer.names[index]
        return name if name.startswith("<") else name + " "
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:
        return str(inner.convert_ids_to_tokens(index)).replace("▁", " ")
    return tokenizer.decode([index])

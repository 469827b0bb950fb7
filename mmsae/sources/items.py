"""Items of a data set: their ids, their labels and other numbers as columns, their pictures."""

from __future__ import annotations

import numbers
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmsae.errors import MmsaeError
from mmsae.sources.arrays import array_of, as_picture

if TYPE_CHECKING:
    from PIL import Image

RESERVED = ("acts", "grads", "columns", "position", "row", "column", "kind", "modality")


def sample_ids(items: list[dict[str, Any]]) -> Tensor:
    """`sample_id` of every item, int64 `[B]`; MmsaeError where one is missing."""
    if not items:
        raise MmsaeError("the batch has no items; give at least one.")
    for item in items:
        if "sample_id" not in item:
            raise MmsaeError(
                f"an item with the keys {', '.join(item)} has no 'sample_id'; number the items of the data."
            )
    return torch.tensor([int(item["sample_id"]) for item in items], dtype=torch.int64)


def columns_of(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Labels as `label.<name>` int64 `[B]`, other numbers under their own key (int64 or float32 `[B]`).

    Where an item lacks a value that another one has, it is -1 for whole numbers and NaN for others.
    """
    flat = []
    for item in items:
        row: dict[str, int | float] = {f"label.{k}": int(v) for k, v in item.get("labels", {}).items()}
        row |= {key: _number(value) for key, value in item.items() if key != "sample_id" and _is_number(value)}
        flat.append(row)
    columns: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for row in flat for key in row):
        if key in RESERVED:
            raise MmsaeError(
                f"an item has a number named {key!r}, which is a column of every batch; give it another name."
            )
        values = [row.get(key) for row in flat]
        whole = all(value is None or isinstance(value, int) for value in values)
        filled = [(-1 if whole else float("nan")) if value is None else value for value in values]
        columns[key] = torch.tensor(filled, dtype=torch.int64 if whole else torch.float32)
    return columns


def picture(item: dict[str, Any]) -> Image.Image:
    """The RGB image of an item: `item["image"]`, a PIL image or a path, or 1 or 3 channels in 0..1 as `item["array"]`.

    MmsaeError naming what cannot be read, or has more than 8 bits a channel.
    """
    from PIL import Image, UnidentifiedImageError

    image = item.get("image")
    if "array" in item and image is None:
        values = array_of(item)
        if len(values) not in (1, 3):
            raise MmsaeError(f"item {item.get('sample_id')} has {len(values)} channels, and a picture 1 or 3.")
        return as_picture(values)
    if isinstance(image, Image.Image):
        return _rgb(image, f"of item {item.get('sample_id')}")
    if not isinstance(image, str | Path):
        raise MmsaeError(
            f"item {item.get('sample_id')} has no picture: its 'image' is {type(image).__name__}, and should be a PIL "
            "image or a path."
        )
    try:
        with Image.open(image) as opened:
            return _rgb(opened, repr(str(image)))
    except FileNotFoundError as error:
        raise MmsaeError(f"there is no picture {str(image)!r} (item {item.get('sample_id')}).") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # PIL raises all of them
        raise MmsaeError(f"the picture {str(image)!r} cannot be read ({error}); replace it or leave it out.") from error


def text_of(item: dict[str, Any]) -> str:
    """The text of an item; MmsaeError naming an item that has none."""
    text = item.get("text")
    if not isinstance(text, str) or not text.strip():
        raise MmsaeError(f"item {item.get('sample_id')} has no text under 'text'; leave such items out of the data.")
    return text


def render_image(item: dict[str, Any]) -> dict[str, Any]:
    """The picture and caption of an item, for a reader; its mask and the names of its values, if it has one."""
    if "array" in item and "image" not in item:
        values = array_of(item)
        item = {**item, "array": values[: 3 if len(values) >= 3 else 1]}  # the eye takes no more
    image = picture(item)
    shown = {"kind": "image", "image": image, "text": str(item.get("text") or "")}
    if "mask" not in item:
        return shown
    from PIL import Image

    from mmsae.sources.masks import mask_of

    values = mask_of(item, image.size)
    mask = Image.fromarray(np.where(values < 0, 255, values).clip(0, 255).astype(np.uint8))
    return {**shown, "mask": mask, "labels": dict(enumerate(item.get("mask_names", ())))}


def example_images(side: int, n: int = 2) -> list[dict[str, Any]]:
    """Plain pictures of `side` by `side` pixels with a caption."""
    from PIL import Image

    return [
        {"image": Image.new("RGB", (side, side), (90 * i + 40, 100, 120)), "text": "a picture", "sample_id": i}
        for i in range(n)
    ]


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """In 8 bits a channel; what has more is refused, because PIL would cut it off at 255."""
    if image.mode.startswith(("I", "F")):
        raise MmsaeError(
            f"the picture {name} has more than 8 bits a channel (mode {image.mode}); read it with --data=ScienceImages."
        )
    return image.convert("RGB")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.dim() == 0)


def _number(value: Any) -> int | float:
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, numbers.Integral) else float(value)

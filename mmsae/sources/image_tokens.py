"""Where the tokens of a picture lie in it: how each family of multimodal models resizes, cuts, merges and orders them.

A picture becomes one or more tiles; a tile shows a part of it (its frame) and becomes a grid of patches; the language
model receives some of them, merged, cropped or with separators between the rows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.errors import MmsaeError

NOWHERE = -1.0
WHOLE_GRID = ("llava", "gemma3", "idefics3", "smolvlm")
ANYRES = ("llava_next", "llava_onevision")
DYNAMIC = ("qwen2_vl", "qwen2_5_vl")
FAMILIES = (*WHOLE_GRID, *ANYRES, *DYNAMIC)
"""Values of `model_type` whose image tokens are traced back to pixels; those of others have no place."""

Frame = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the original picture; may reach beyond it where a model pads."""


class Places(NamedTuple):
    """Where some tokens of a picture lie.

    Attributes:
        row: On the patch grid of their tile, int64 `[n]`; -1 for a token that is no patch.
        column: The same.
        tile: Which part of the picture: 0, 1 … in the order of the model, int64 `[n]`.
        box: Left, top, right, bottom in pixels of the original picture, float32 `[n, 4]`; -1 where there is no patch.
    """

    row: Tensor
    column: Tensor
    tile: Tensor
    box: Tensor

    @classmethod
    def joined(cls, parts: list[Places]) -> Places:
        """One after the other."""
        if not parts:
            return nothing(0)
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def at(self, index: Tensor) -> Places:
        """Some of them."""
        return Places(*(column[index] for column in self))


class Picture(NamedTuple):
    """What a processor made of a picture.

    Attributes:
        size: Width and height of the original, pixels.
        grid: Frames, time, rows and columns of patches, for families of any resolution.
        alone: Whether it is the only picture of its item (some models cut only those into tiles).
    """

    size: tuple[int, int]
    grid: tuple[int, int, int] | None = None
    alone: bool = True


class Tracer:
    """From the tokens of a model to places in a picture.

    Args:
        config: Of the model.
        processor: Of the model.
    """

    def __init__(self, config: Any, processor: Any) -> None:
        self.config, self.processor = config, processor
        self.images = processor.image_processor
        self.family = config.model_type
        if getattr(self.images, "do_pan_and_scan", False):
            raise MmsaeError("pictures cut by pan and scan cannot be traced back: set do_pan_and_scan to false.")

    @property
    def known(self) -> bool:
        """Whether the family is one whose tokens can be traced."""
        return self.family in FAMILIES

    def language(self, picture: Picture) -> Places:
        """The tokens that the language model receives of a picture, in its order."""
        if self.family in DYNAMIC:
            assert picture.grid is not None
            time, rows, columns = picture.grid
            merge = self.config.vision_config.spatial_merge_size
            return Places.joined([grid(rows // merge, columns // merge, whole(picture), picture)] * time)
        if self.family in ANYRES:
            return self._anyres(picture)
        side = self._side() // (self.config.scale_factor if self.family in ("idefics3", "smolvlm") else 1)
        if self.family == "gemma3":
            side = math.isqrt(self.config.mm_tokens_per_image)
        tiles = [grid(side, side, frame, picture, i) for i, frame in enumerate(self.frames(picture))]
        if getattr(self.config, "vision_feature_select_strategy", "default") == "full" and self._class_token():
            tiles = [Places.joined([nothing(1, i), tile]) for i, tile in enumerate(tiles)]
        return Places.joined(tiles)

    def tower(self, picture: Picture, tokens: int, windows: bool = True) -> Places:
        """The positions inside the vision tower or the projector, tile after tile.

        Args:
            picture: As the processor made it.
            tokens: Positions of a tile; for families of any resolution, those of the picture.
            windows: Whether the patches stand in the order of attention windows by then (Qwen2.5-VL).
        """
        if self.family in DYNAMIC:
            return self._dynamic_tower(picture, tokens, windows)
        side = math.isqrt(tokens)
        first = tokens - side * side if side * side != tokens else 0
        if first > 1 and math.isqrt(tokens - 1) ** 2 != tokens - 1:  # neither a square nor a square and a class token
            return Places.joined([nothing(tokens, i) for i in range(len(self.frames(picture)))])
        tiles = [grid(side, side, frame, picture, i) for i, frame in enumerate(self.frames(picture))]
        return Places.joined([Places.joined([nothing(first, i), tile]) for i, tile in enumerate(tiles)])

    def frames(self, picture: Picture) -> list[Frame]:
        """What each tile shows, in the order in which the vision tower gets them."""
        width, height = picture.size
        everything = whole(picture)
        if self.family in ("idefics3", "smolvlm"):
            rows, columns = 0, 0
            if getattr(self.images, "do_image_splitting", True):
                _, rows, columns = self.images.get_number_of_image_patches(height, width, {})
            across, down = width / max(columns, 1), height / max(rows, 1)
            parts = [
                (c * across, r * down, (c + 1) * across, (r + 1) * down) for r in range(rows) for c in range(columns)
            ]
            return [*parts, everything]
        if self.family in ANYRES:
            side = self.config.vision_config.image_size
            canvas, (rows, columns) = self._canvas(picture)
            if not rows:
                return [everything]
            return [
                everything,
                *(part(canvas, c * side, r * side, side, side) for r in range(rows) for c in range(columns)),
            ]
        if self.family == "gemma3":
            return [everything]
        return [cropped(self.images, width, height)]

    def _side(self) -> int:
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def _class_token(self) -> bool:
        return self.config.vision_config.model_type.startswith("clip")

    def _canvas(self, picture: Picture) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
        """Of the padded picture that is cut into tiles: offset and pixels of the original per pixel; its tiles."""
        from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

        width, height = picture.size
        if self.family == "llava_onevision" and not picture.alone:
            return (0, 0, 1, 1), (0, 0)
        best = select_best_resolution((height, width), self.config.image_grid_pinpoints)
        blank = torch.empty(3, height, width, device="meta")
        new_height, new_width = get_patch_output_size(blank, best, "channels_first")
        left, top = (best[1] - new_width) // 2, (best[0] - new_height) // 2
        side = self.config.vision_config.image_size
        return (left, top, width / new_width, height / new_height), (best[0] // side, best[1] // side)

    def _anyres(self, picture: Picture) -> Places:
        """First the whole picture; then the tiles as one grid, padding cut off, a separator behind every row."""
        side, patch = self._side(), self.config.vision_config.patch_size
        canvas, (rows, columns) = self._canvas(picture)
        base = grid(side, side, whole(picture), picture)
        if not rows:
            return Places.joined([base, nothing(1)])
        rows, columns = rows * side, columns * side
        (width, height), top, left = picture.size, 0, 0
        if width / height > columns / rows:  # as the models cut it: in whole patches, rounded
            top = (rows - int(round(height * columns / width, 7))) // 2
        else:
            left = (columns - int(round(width * rows / height, 7))) // 2
        shown = part(canvas, left * patch, top * patch, (columns - 2 * left) * patch, (rows - 2 * top) * patch)
        rows, columns = rows - 2 * top, columns - 2 * left
        if self.family == "llava_onevision":
            most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
            ratio = math.sqrt(rows * columns / (most * side**2))
            if ratio > 1.1:  # shrunk by interpolation
                rows, columns = int(rows // ratio), int(columns // ratio)
        found = grid(rows, columns, shown, picture, 1)
        split = [Places(*(column.view(rows, columns, *column.shape[1:])[r] for column in found)) for r in range(rows)]
        return Places.joined([base, *(piece for row in split for piece in (row, nothing(1, 1)))])

    def _dynamic_tower(self, picture: Picture, tokens: int, windows: bool) -> Places:
        """Patches come block by block of those that are merged; Qwen2.5-VL orders the blocks by windows besides."""
        assert picture.grid is not None
        time, rows, columns = picture.grid
        merge = self.config.vision_config.spatial_merge_size
        merged = tokens * merge**2 == time * rows * columns
        if merged:
            found = Places.joined([grid(rows // merge, columns // merge, whole(picture), picture)] * time)
        else:
            one = grid(rows, columns, whole(picture), picture)
            blocks = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
            found = Places.joined([one.at(blocks.transpose(1, 2).flatten())] * time)
        if self.family != "qwen2_5_vl" or not windows:
            return found
        from transformers.vision_utils import get_vision_window_index

        vision = self.config.vision_config
        order, _ = get_vision_window_index(
            torch.tensor([picture.grid]),
            spatial_merge_size=merge,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        size = 1 if merged else merge**2
        return found.at((order[:, None] * size + torch.arange(size)).flatten())


def whole(picture: Picture) -> Frame:
    """The frame that is the picture."""
    return 0.0, 0.0, float(picture.size[0]), float(picture.size[1])


def part(canvas: tuple[float, float, float, float], x: float, y: float, width: float, height: float) -> Frame:
    """A piece of a canvas on which the picture lies, resized; in pixels of the picture."""
    left, top, across, down = canvas
    return (x - left) * across, (y - top) * down, (x + width - left) * across, (y + height - top) * down


def grid(rows: int, columns: int, frame: Frame, picture: Picture, tile: int = 0) -> Places:
    """A grid of patches over a frame, row by row; a box is what of its patch lies in the picture."""
    return _grid(rows, columns, frame, picture.size, tile)


@lru_cache(maxsize=4096)  # data sets have few sizes of pictures, and every batch asks again
def _grid(rows: int, columns: int, frame: Frame, size: tuple[int, int], tile: int) -> Places:
    left, top, right, bottom = frame
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    across, down = (right - left) / max(columns, 1), (bottom - top) / max(rows, 1)
    x, y = left + column * across, top + row * down
    box = torch.stack([x, y, x + across, y + down], 1)
    width, height = size
    box[:, 0::2] = box[:, 0::2].clamp(0, width)
    box[:, 1::2] = box[:, 1::2].clamp(0, height)
    return Places(row, column, torch.full_like(row, tile), box.float())


def nothing(n: int, tile: int = 0) -> Places:
    """Tokens that are no patches: class tokens, separators."""
    return Places(torch.full((n,), -1), torch.full((n,), -1), torch.full((n,), tile), torch.full((n, 4), NOWHERE))


def cropped(images: Any, width: int, height: int) -> Frame:
    """What a processor that resizes and crops to the centre shows of a picture of this size."""
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    if getattr(images, "do_pad", False) and type(images).__name__.startswith("Llava"):  # to a square, centred
        side = max(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        right, bottom = left + side, top + side
    wide, high = right - left, bottom - top
    if getattr(images, "do_resize", True) and (short := _edge(images.size, "shortest_edge")):
        longer = int(short * max(wide, high) / min(wide, high))
        new_width, new_height = (short, longer) if wide <= high else (longer, short)
    elif getattr(images, "do_resize", True):
        new_width, new_height = _edge(images.size, "width") or wide, _edge(images.size, "height") or high
    else:
        new_width, new_height = wide, high
    if not getattr(images, "do_center_crop", False):
        return left, top, right, bottom
    crop_width, crop_height = _edge(images.crop_size, "width"), _edge(images.crop_size, "height")
    x, y = int((new_width - crop_width) / 2), int((new_height - crop_height) / 2)
    across, down = wide / new_width, high / new_height
    return left + x * across, top + y * down, left + (x + crop_width) * across, top + (y + crop_height) * down


def _edge(size: Any, name: str) -> Any:
    return size.get(name) if isinstance(size, dict) else getattr(size, name, None)

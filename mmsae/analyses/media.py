"""Examples made small enough for one page: pictures, masks, sound, signals and texts as plain data."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmsae.analyses.encoded import picture_of
from mmsae.analyses.recordings import audio, excerpt, length_of, trace

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
"""Of the values of a mask (Okabe and Ito's, told apart by the colour-blind)."""


class Media:
    """The media of a page: each example packed once, and no more than a limit in all.

    Args:
        render: From a sample id, and a stream if one is asked for, to what the datamodule's `render` says of it.
        thumbnail: Longest side of a picture, pixels.
        seconds: Longest excerpt of a sound or a signal.
        limit: Bytes in all; what comes later is kept as its text, and sound as its spectrogram.
    """

    def __init__(self, render: Callable[..., dict[str, Any]], thumbnail: int, seconds: float, limit: float) -> None:
        self.render, self.thumbnail, self.seconds, self.limit = render, thumbnail, seconds, limit
        self.packed: list[dict[str, Any]] = []
        self.cut_short = 0
        self._bytes = 0
        self._total: dict[tuple[int, str], float | None] = {}  # length of each sample seen, seconds; None: not in time
        self._place: dict[tuple[int, str, int], int] = {}

    def add(self, sample: int, window: tuple[float, float] | None = None, stream: str = "") -> int:
        """Pack a sample, if it is not there, and return its place in `packed`.

        Args:
            sample: Its id.
            window: Begin and length, in seconds, of what must be in the excerpt.
            stream: What of it is shown, where a sample is a pair.
        """
        rendered, own, asked = None, (sample, stream), (sample, *filter(None, [stream]))
        if own not in self._total:
            rendered = self.render(*asked)
            self._total[own] = length_of(rendered)
        start = excerpt(self._total[own], self.seconds, window)
        key = (sample, stream, round(1000 * start))
        if key not in self._place:
            medium, size = self._fitting(self._pack(rendered or self.render(*asked), start))
            self._bytes += size
            self._place[key] = len(self.packed)
            self.packed.append(medium)
        return self._place[key]

    def _fitting(self, medium: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The medium, or as much of it as there is still room for, and its bytes; the last fifth is not for sound."""
        share = 0.8 if medium["kind"] == "audio" else 1.0
        for form, room in ((medium, share), (_without_sound(medium), 1.0), (_text(medium), float("inf"))):
            size = len(json.dumps(form))
            if self._bytes + size <= room * self.limit:
                self.cut_short += form is not medium
                break
        return form, size

    def _pack(self, medium: dict[str, Any], start: float) -> dict[str, Any]:
        if medium["kind"] == "audio":
            return audio(medium, start, self.seconds)
        if medium["kind"] == "signal":
            return trace(medium, start, self.seconds)
        packed = {name: v.tolist() if isinstance(v, Tensor | np.ndarray) else v for name, v in medium.items()}
        if "image" not in medium:
            return packed
        for name in ("image", "mask", "labels"):
            packed.pop(name, None)
        if medium["image"] is not None:
            small = medium["image"].convert("RGB")
            packed["size"] = list(small.size)
            small.thumbnail((self.thumbnail, self.thumbnail))
            packed["data"] = picture_of(small)
        if medium.get("mask") is not None:
            packed |= _mask(medium["mask"], medium.get("labels") or {}, 2 * self.thumbnail)
        return packed


def _without_sound(medium: dict[str, Any]) -> dict[str, Any]:
    return {**medium, "pcm": ""} if medium["kind"] == "audio" else medium


def _text(medium: dict[str, Any]) -> dict[str, Any]:
    text = medium.get("text") or "".join(medium.get("tokens", ()))[:200]
    return {"kind": "other", "text": f"{text} (not stored: the page is full)".strip()}


def _mask(mask: Image.Image, names: dict[Any, str], side: int) -> dict[str, Any]:
    """A mask as a picture whose palette indices are its values, and what they are called."""
    values = np.asarray(mask.convert("L") if mask.mode not in "LP" else mask)
    small = Image.fromarray(values)
    small.thumbnail((side, side), Image.Resampling.NEAREST)
    named = {int(value): str(name) for value, name in names.items()}
    counts = np.bincount(values.ravel(), minlength=256)
    palette, opacity = [0] * 768, [0] * 256
    legend: list[dict[str, Any]] = []
    for value in np.flatnonzero(counts).tolist():
        colour = COLOURS[sum(entry["value"] > 0 for entry in legend) % len(COLOURS)] if value else ""
        if colour:
            palette[3 * value : 3 * value + 3] = bytes.fromhex(colour[1:])
            opacity[value] = 255
        share = float(counts[value] / values.size)
        legend.append({"value": value, "name": named.get(value, f"value {value}"), "colour": colour, "share": share})
    small.putpalette(palette)
    file = io.BytesIO()
    small.save(file, "PNG", transparency=bytes(opacity), optimize=True)
    return {"mask": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), "legend": legend}


def mask_shares(medium: dict[str, Any], heat: np.ndarray, whole: bool = False) -> list[float] | None:
    """Share of a heat map's activation inside each value of the medium's `legend`; None without mask or activation.

    Args:
        medium: A packed picture.
        heat: `[rows, columns]`, over the middle square of the picture if it is square itself, else over all of it.
        whole: It lies over all of the picture in any case.
    """
    weight = np.abs(heat)
    if "mask" not in medium or not weight.sum():
        return None
    with Image.open(io.BytesIO(base64.b64decode(medium["mask"].partition(",")[2]))) as stored:
        values = np.asarray(stored)
    if heat.shape[0] == heat.shape[1] and not whole:
        side = min(values.shape)
        top, left = (values.shape[0] - side) // 2, (values.shape[1] - side) // 2
        values = values[top : top + side, left : left + side]
    y, x = (np.arange(n) * cells // n for n, cells in zip(values.shape, heat.shape, strict=True))
    cell = (y[:, None] * heat.shape[1] + x).ravel()
    pixels = np.bincount(cell, minlength=heat.size)
    each = weight.ravel()[cell] / pixels[cell]
    inside = np.bincount(values.ravel(), weights=each, minlength=256) / each.sum()
    return [float(inside[entry["value"]]) for entry in medium["legend"]]

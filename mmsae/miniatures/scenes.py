"""Captioned scenes with known factors: a handwritten digit in some ink, somewhere, on some background.

Digits and photographs come with scikit-learn, so nothing is downloaded. Every scene is drawn when it is asked for.
"""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from mmsae.errors import MmsaeError, checked
from mmsae.miniatures.captions import FACTORS, GROUNDS, OPENINGS, PLACES, caption_for, compose, zero_shot_prompts
from mmsae.miniatures.captions import mentions as mentions

__all__ = ["FACTORS", "SIDE", "Scenes", "caption_for", "mentions", "zero_shot_prompts"]

SIDE = 64  # pixels
GLYPH = 48  # pixels of an upsampled digit, an empty margin of a sixth on every side included
BOX = {"small": 18.0, "large": 27.0}  # pixels that the eight rows of a digit fill
INK = {
    "red": (232, 40, 45), "orange": (255, 140, 15), "yellow": (252, 236, 60), "green": (50, 205, 60),
    "cyan": (60, 225, 235), "blue": (60, 105, 255), "magenta": (245, 65, 215), "white": (248, 248, 248),
}  # fmt: skip
SPLITS = {"train": slice(0, 1250), "val": slice(1250, 1450), "test": slice(1450, 1797)}
SINGLES = ("digit", "digit", "colour", "position", "size", "background")  # the digit is the hardest to see

# One column of random numbers for each name; append only, or every scene changes.
DRAWS = (
    *FACTORS, "exemplar", "x", "y", "angle", "scale", "weight", "red", "green", "blue",
    "hue", "grey", "value", "hue 2", "contrast", "direction", "period", "phase", "phase 2", "zoom", "flip",
    "short", "single", *(f"say {factor}" for factor in FACTORS), "opening", "place", "ground",
)  # fmt: skip


class Scenes(Dataset):
    """Pictures of 64x64 pixels with a caption and the value of every factor; a pure function of split, seed and index.

    The three splits use different handwritten digits, so a digit of the test scenes was never seen in training.

    Args:
        split: Which digits to draw from.
        n: Number of scenes.
        seed: Another seed gives other scenes of the same digits.
    """

    def __init__(self, split: Literal["train", "val", "test"], n: int, seed: int = 0) -> None:
        if split not in SPLITS:
            raise MmsaeError(f"The scenes have no split {split!r}; they have {', '.join(SPLITS)}.")
        self.split = split
        self.n = checked("n", n, 1)
        self.seed = checked("seed", seed, 0)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        draws, labels = self._scene(index)
        return {
            "image": Image.fromarray(_draw(self.split, draws, labels)),
            "text": _caption(draws, labels),
            "sample_id": int(index) % self.n,
            "labels": labels,
        }

    def pixels(self, index: int) -> np.ndarray:
        """The picture alone: uint8 [64, 64, 3]."""
        return _draw(self.split, *self._scene(index))

    def captions(self) -> list[str]:
        """The captions of all scenes, without drawing them."""
        return [_caption(*self._scene(i)) for i in range(self.n)]

    def labels(self) -> dict[str, np.ndarray]:
        """The factors of all scenes, without drawing them: name to int64 [n], indices into `FACTORS[name]`."""
        draws = _random(self.split, self.seed, np.arange(self.n))
        return {f: _choice(draws[:, i], len(values)) for i, (f, values) in enumerate(FACTORS.items())}

    def _scene(self, index: int) -> tuple[dict[str, float], dict[str, int]]:
        if not -self.n <= index < self.n:
            raise IndexError(f"There are {self.n} scenes, so there is none of index {index}.")
        row = _random(self.split, self.seed, np.array([index % self.n]))[0].tolist()
        draws = dict(zip(DRAWS, row, strict=True))
        return draws, {f: int(draws[f] * len(values)) for f, values in FACTORS.items()}


def _random(split: str, seed: int, index: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) of each scene, float64 [n, len(DRAWS)].

    They are a hash of their coordinates (splitmix64) and not the stream of a generator: a scene does not depend on
    the order of access, and the labels of a million scenes come without a million generators.
    """
    key = np.array([[seed]], dtype=np.uint64)
    for part in (np.array([[list(SPLITS).index(split)]], dtype=np.uint64), index.astype(np.uint64)[:, None], _COLUMNS):
        key = _mix(key + np.uint64(0x9E3779B97F4A7C15) * (part + np.uint64(1)))
    return (key >> np.uint64(11)) * 2.0**-53


_COLUMNS = np.arange(len(DRAWS), dtype=np.uint64)[None]


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _choice(uniform: np.ndarray, n: int) -> np.ndarray:
    return (uniform * n).astype(np.int64)


def _pick(uniform: float, options: Any) -> Any:
    return options[int(uniform * len(options))]


def _caption(draws: dict[str, float], labels: dict[str, int]) -> str:
    """About half the captions state one fact, the others a random subset of them."""
    if draws["short"] < 0.45:
        said = [_pick(draws["single"], SINGLES)]
    else:
        said = [f for f in FACTORS if draws[f"say {f}"] < 0.6] or ["digit"]
    return compose(
        {f: labels[f] for f in said},
        opening=int(draws["opening"] * len(OPENINGS)),
        place=int(draws["place"] * len(PLACES)),
        ground=int(draws["ground"] * len(GROUNDS["plain"])),
    )


def _draw(split: str, draws: dict[str, float], labels: dict[str, int]) -> np.ndarray:
    value = {f: FACTORS[f][i] for f, i in labels.items()}
    picture = _background(value["background"], draws)

    box = BOX[value["size"]] * (0.94 + 0.12 * draws["scale"])
    row, column = divmod(labels["position"], 3)
    # Cells lie 16 pixels apart: a vision transformer of patch 8 then sees the same patches in all nine.
    centre = [16 + 16 * cell + 4 * (draws[axis] - 0.5) for cell, axis in ((row, "y"), (column, "x"))]
    centre = [min(max(c, box / 2 + 1), SIDE - box / 2 - 1) for c in centre]  # all strokes stay inside the picture
    glyph = _pick(draws["exemplar"], _digits(split)[labels["digit"]])
    (top, left), cover = _stamp(glyph, centre, box, angle=0.28 * (draws["angle"] - 0.5))
    cover = np.clip((cover - 0.58 + 0.14 * draws["weight"]) * 4 + 0.5, 0, 1)[..., None]  # thin to bold strokes
    tint = [20 * (draws[channel] - 0.5) for channel in ("red", "green", "blue")]
    ink = np.add(INK[value["colour"]], tint, dtype=np.float32)

    window = picture[top : top + len(cover), left : left + cover.shape[1]]
    window += cover * (ink - window)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _stamp(glyph: np.ndarray, centre: list[float], box: float, angle: float) -> tuple[list[int], np.ndarray]:
    """The digit scaled, turned and moved to `centre`, as (corner of a window, ink cover in that window)."""
    reach = box / 2 + 3
    low = [max(0, math.floor(c - reach)) for c in centre]
    high = [min(SIDE, math.ceil(c + reach)) for c in centre]
    y = np.arange(low[0], high[0], dtype=np.float32)[:, None] + (0.5 - centre[0])
    x = np.arange(low[1], high[1], dtype=np.float32)[None] + (0.5 - centre[1])
    zoom = GLYPH * 2 / 3 / box
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    # Where each pixel of the window falls in the glyph; the glyph's margin is empty, so clipping finds no ink.
    v = np.clip(cos * y - sin * x + (GLYPH - 1) / 2, 0, GLYPH - 1.001)
    u = np.clip(sin * y + cos * x + (GLYPH - 1) / 2, 0, GLYPH - 1.001)
    i, j = v.astype(np.intp), u.astype(np.intp)
    v, u = v - i, u - j
    corner = i * GLYPH + j
    flat = glyph.ravel()
    upper = flat[corner] * (1 - u) + flat[corner + 1] * u
    lower = flat[corner + GLYPH] * (1 - u) + flat[corner + GLYPH + 1] * u
    return low, upper * (1 - v) + lower * v


def _background(name: str, draws: dict[str, float]) -> np.ndarray:
    """A muted, rather dark picture, float32 [64, 64, 3] in 0..255, on which every ink can be seen."""
    if name in ("flower", "building"):
        photo = _pick(draws["zoom"], _photos()[name])
        top = int(draws["phase"] * (photo.shape[0] - SIDE))
        left = int(draws["phase 2"] * 0.4 * (photo.shape[1] - SIDE))  # both subjects are left of the middle
        crop = photo[top : top + SIDE, left : left + SIDE]
        return (crop[:, ::-1] if draws["flip"] < 0.5 else crop).copy()

    value = 0.20 + 0.20 * draws["value"]
    first = _muted(draws["hue"], draws["grey"], value)
    if name == "plain":
        return np.tile(first, (SIDE, SIDE, 1))
    second = _muted(draws["hue 2"], draws["grey"], value + 0.14 + 0.08 * draws["contrast"])
    period = 2 * math.pi / (9 + 5 * draws["period"])  # pixels
    x = np.arange(SIDE, dtype=np.float32) * period
    shift, shift_2 = 2 * math.pi * draws["phase"], 2 * math.pi * draws["phase 2"]
    if name == "striped":
        dx, dy = _pick(draws["direction"], ((1, 0), (0, 1), (0.7, 0.7), (0.7, -0.7)))
        wave = np.sin(dx * x[None] + dy * x[:, None] + shift)
    else:
        wave = np.sin(x[None] + shift) * np.sin(x[:, None] + shift_2)
    mix = np.clip(0.5 + 3 * wave, 0, 1)[..., None]
    return first + mix * (second - first)


def _muted(hue: float, grey: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue, 0.15 + 0.25 * grey, value), dtype=np.float32) * 255


@lru_cache
def _digits(split: str) -> tuple[np.ndarray, ...]:
    """For each of the ten digits the split's exemplars, float32 [n, 48, 48] in 0..1."""
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = np.random.RandomState(0).permutation(len(data.target))[SPLITS[split]]  # RandomState: frozen for good
    padded = np.pad(data.images[chosen] / 16, ((0, 0), (2, 2), (2, 2)))
    smooth = zoom(padded, (1, GLYPH // 12, GLYPH // 12), order=3, grid_mode=True, mode="grid-constant")
    smooth = np.clip(smooth, 0, 1).astype(np.float32)
    smooth[:, [0, -1]] = smooth[:, :, [0, -1]] = 0
    return tuple(smooth[data.target[chosen] == digit] for digit in range(10))


@lru_cache
def _photos() -> dict[str, list[np.ndarray]]:
    """The two photographs at three sizes, muted, float32 [height, width, 3] in 0..255."""
    from sklearn.datasets import load_sample_images

    building, flower = load_sample_images().images  # china.jpg, flower.jpg
    photos = {"flower": flower, "building": building}
    return {name: [_mute(photo, height) for height in (84, 100, 120)] for name, photo in photos.items()}


def _mute(photo: np.ndarray, height: int) -> np.ndarray:
    width = round(height * photo.shape[1] / photo.shape[0])
    small = np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    grey = small.mean(axis=2, keepdims=True)
    return 12 + 0.5 * (0.5 * small + 0.5 * grey)

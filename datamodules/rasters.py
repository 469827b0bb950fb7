"""What readers of scientific pictures have in common: pictures in files, and windows of them without the rest."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from mmsae.errors import MmsaeError
from mmsae.sources.weights import first_line

METRES = {"m": 1.0, "mm": 1e-3, "cm": 1e-2, "µm": 1e-6, "μm": 1e-6, "um": 1e-6, "micron": 1e-6, "nm": 1e-9}
RGB = ("red", "green", "blue")
ACROSS = {"axial": "SI", "coronal": "AP", "sagittal": "LR"}
"""Directions that slices are counted along."""


@dataclass(frozen=True)
class Plane:
    """One picture in a file; nothing of it is in memory.

    Attributes:
        path: The file.
        index: Which of its pictures: page, slice, frame, entry.
        height: Pixels.
        width: Pixels.
        channels: Names.
        image: What is one picture to the eye and has one contrast: the file, or an entry of a stack of pictures.
        subject: Whom it shows, where the file says so: patient, series.
        pixel_size: Metres along a row; NaN where the file does not say.
        largest: Largest value that whole numbers of its type have; None where values are of another kind.
        window: Lowest and highest value that the file recommends to show.
        inverted: Large values are dark.
        about: What else the file says of it.
    """

    path: str
    index: int
    height: int
    width: int
    channels: tuple[str, ...]
    image: str
    subject: str | None = None
    pixel_size: float = math.nan
    largest: float | None = None
    window: tuple[float, float] | None = None
    inverted: bool = False
    about: dict[str, str] = field(default_factory=dict)


class Reader(ABC):
    """A file format.

    Args:
        axes: What the axes of arrays mean, one letter each: Y row, X column, C channel, any other counts pictures.
        array: Which array of an .npz.
        plane: How volumes are sliced: axial, coronal or sagittal.
        as_mask: Palettes are read as numbers, not as colours.
    """

    def __init__(
        self, axes: str | None = None, array: str | None = None, plane: str = "axial", as_mask: bool = False
    ) -> None:
        if plane not in ACROSS:
            raise MmsaeError(f"{plane!r} is no anatomical plane; choose {', '.join(ACROSS)}.")
        self.axes, self.array, self.across, self.as_mask = axes, array, ACROSS[plane], as_mask

    @abstractmethod
    def planes(self, path: str) -> list[Plane]:
        """The pictures of a file, from its header."""

    @abstractmethod
    def read(self, plane: Plane, rows: slice, columns: slice) -> np.ndarray:
        """A window `[C, h, w]` of a picture in the type of the file, or in its physical values."""


@contextmanager
def told(path: str, kind: str) -> Iterator[None]:
    """Whatever a library says of a damaged file, as one sentence with its name."""
    try:
        yield
    except MmsaeError:
        raise
    except FileNotFoundError as error:
        raise MmsaeError(f"there is no file {path!r}.") from error
    except Exception as error:  # the libraries agree on no type
        why = first_line(error)
        raise MmsaeError(f"{path!r} cannot be read as {kind} ({why}); replace it or leave it out.") from error


def largest_of(dtype: np.dtype) -> float | None:
    """The largest value of a type of whole numbers."""
    if dtype.kind == "b":
        return 1.0
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else None


class Layout:
    """How an array of named axes falls into pictures of channels, without copying it.

    Args:
        axes: One letter per axis, Y and X among them; C and S are channels, all others count pictures.
        shape: Of the array.
        path: For errors.
    """

    def __init__(self, axes: str, shape: Sequence[int], path: str) -> None:
        axes = axes.upper()
        if len(axes) != len(shape) or axes.count("Y") != 1 or axes.count("X") != 1:
            raise MmsaeError(
                f"{path!r} holds an array of shape {tuple(shape)}, which axes={axes!r} does not describe; give one "
                "letter per axis, with Y and X, and C for channels."
            )
        self.counted = [i for i, letter in enumerate(axes) if letter not in "YXCS"]
        channels = [i for i, letter in enumerate(axes) if letter in "CS"]
        self.order = [*self.counted, *channels, axes.index("Y"), axes.index("X")]
        self.lengths = tuple(shape[i] for i in self.counted)
        self.n_planes = math.prod(self.lengths)
        self.n_channels = math.prod(shape[i] for i in channels)
        self.height, self.width = shape[axes.index("Y")], shape[axes.index("X")]

    def window(self, array: np.ndarray, index: int, rows: slice, columns: slice) -> np.ndarray:
        """`[C, h, w]` of one picture."""
        plane = array.transpose(self.order)[np.unravel_index(index, self.lengths)] if self.lengths else \
            array.transpose(self.order)  # fmt: skip
        window = np.asarray(plane[..., rows, columns])
        return window.reshape(self.n_channels, *window.shape[-2:])


def named(names: Sequence[str], n: int) -> tuple[str, ...]:
    """As many names as channels: those that are given, colours, or numbers."""
    if len(names) == n:
        return tuple(names)
    return RGB if n == 3 else tuple(str(i) for i in range(n))


def belonging(reader: Reader, path: str, plane: Plane) -> Plane:
    """The picture of a mask file that belongs to a plane."""
    planes = _planes_of(reader, path)
    if len(planes) > 1 and plane.index >= len(planes):
        raise MmsaeError(f"the mask {path!r} has {len(planes)} pictures, too few for those of {plane.path!r}.")
    shown = planes[plane.index if len(planes) > 1 else 0]
    if (shown.height, shown.width) != (plane.height, plane.width):
        size, own = f"{shown.width}x{shown.height}", f"{plane.width}x{plane.height}"
        raise MmsaeError(f"the mask {path!r} has {size} pixels but its picture {plane.path!r} {own}.")
    return shown


@lru_cache(maxsize=256)
def _planes_of(reader: Reader, path: str) -> list[Plane]:
    return reader.planes(path)

"""DICOM, NIfTI, PNG and arrays of numpy, read in windows; and which reader a file needs."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.rasters import METRES, RGB, Layout, Plane, Reader, largest_of, named, told
from datamodules.tiff_files import GeoTiff, Tiff
from mmsae.errors import MmsaeError
from mmsae.sources.weights import needs


class Dicom(Reader):
    """DICOM (pydicom): values after rescaling, frames as pictures; the patient, else the series, is the subject."""

    def planes(self, path: str) -> list[Plane]:
        """Frames; refused without pixels."""
        pydicom = needs("pydicom", "ScienceImages", "science")
        with told(path, "DICOM"):
            data = pydicom.dcmread(path, defer_size="1 KB")
            if not any(name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
                raise MmsaeError(f"the DICOM file {path!r} has no pixels; leave it out.")
            kind = str(data.get("PhotometricInterpretation", ""))
            if kind == "PALETTE COLOR":
                raise MmsaeError(f"the DICOM file {path!r} has a palette of colours, which is not read; leave it out.")
            n_channels = int(data.get("SamplesPerPixel", 1))
            channels = RGB if n_channels == 3 else named((), n_channels)
            spacing = data.get("PixelSpacing") or data.get("ImagerPixelSpacing")
            size = float(spacing[1]) * 1e-3 if spacing else math.nan
            subject = str(data.get("PatientID") or data.get("SeriesInstanceUID") or "") or None
            series = str(data.get("SeriesInstanceUID") or path)
            centre, width = (_first(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
            window = None if centre is None or width is None else (centre - width / 2, centre + width / 2)
            about = {key: str(data.get(name)) for key, name in
                     (("modality_code", "Modality"), ("series", "SeriesInstanceUID")) if data.get(name)}  # fmt: skip
            largest = largest_of(np.dtype(f"u{max(int(data.BitsAllocated) // 8, 1)}")) if n_channels == 3 else None
            return [
                Plane(path, i, int(data.Rows), int(data.Columns), channels, series, subject, size, largest, window,
                      kind == "MONOCHROME1", about)
                for i in range(int(data.get("NumberOfFrames") or 1))
            ]  # fmt: skip

    def read(self, plane: Plane, rows: slice, columns: slice) -> np.ndarray:
        """A window of a frame; the frame is decoded as a whole."""
        pydicom = needs("pydicom", "ScienceImages", "science")
        pixels = needs("pydicom.pixels", "ScienceImages", "science")
        with told(plane.path, "DICOM"):
            values = pixels.pixel_array(plane.path, index=plane.index)
            values = pixels.apply_modality_lut(values, pydicom.dcmread(plane.path, stop_before_pixels=True))
            return (values[None] if values.ndim == 2 else values.transpose(2, 0, 1))[:, rows, columns]


class Nifti(Reader):
    """NIfTI (nibabel): slices of volumes as radiologists see them, values after scaling.

    Rows run from front to back or from top to bottom, columns from the patient's right to the left, or from front to
    back. A fourth axis counts volumes, unless axes="XYZC" makes it channels. The subject is `sub-…` in the path, else
    the file.
    """

    def planes(self, path: str) -> list[Plane]:
        """Slices of every volume."""
        with told(path, "NIfTI"):
            image = _nifti(path)
            shape = image.shape
            if len(shape) < 3 or len(shape) > 4 or 0 in shape:
                raise MmsaeError(
                    f"the NIfTI file {path!r} has shape {shape}; volumes [x, y, z] or [x, y, z, t] are read."
                )
            if not path.endswith(".gz"):
                needed = image.dataobj.offset + math.prod(shape) * image.get_data_dtype().itemsize
                if (has := Path(path).stat().st_size) < needed:
                    raise MmsaeError(f"{path!r} is cut off: its header asks for {needed} bytes, but it has {has}.")
            slices, rows, columns, _ = self._oriented(image)
            as_channels = len(shape) == 4 and (self.axes or "XYZT")[-1].upper() == "C"
            n_channels, n_volumes = (shape[3], 1) if as_channels else (1, shape[3] if len(shape) == 4 else 1)
            zooms, unit = image.header.get_zooms(), image.header.get_xyzt_units()[0]
            size = float(zooms[columns]) * METRES.get({"meter": "m", "micron": "um"}.get(unit, "mm"), 1e-3)
            subject = next(iter(re.findall(r"sub-[A-Za-z0-9]+", path)), None)
            about = {"thickness_mm": f"{float(zooms[slices]):g}"}
            return [
                Plane(path, i, shape[rows], shape[columns], named((), n_channels), path, subject, size, about=about)
                for i in range(n_volumes * shape[slices])
            ]

    def read(self, plane: Plane, rows: slice, columns: slice) -> np.ndarray:
        """A window of a slice; the slice is read as a whole."""
        with told(plane.path, "NIfTI"):
            image = _nifti(plane.path)
            slices, row, column, flips = self._oriented(image)
            volume, at = divmod(plane.index, image.shape[slices])
            chosen: list[Any] = [slice(None)] * 3
            chosen[slices] = at
            if len(image.shape) == 4:
                chosen.append(slice(None) if len(plane.channels) > 1 else volume)
            values = np.asarray(image.dataobj[tuple(chosen)])
            values = values if row < column else values.swapaxes(0, 1)
            values = values[:: flips[0], :: flips[1]]
            return (values[None] if values.ndim == 2 else values.transpose(2, 0, 1))[:, rows, columns]

    def _oriented(self, image: Any) -> tuple[int, int, int, tuple[int, int]]:
        """The axes that count slices, run along rows' order and along columns', and the direction of the last two."""
        codes = needs("nibabel", "ScienceImages", "science").aff2axcodes(image.affine)
        if None in codes:
            raise MmsaeError(f"the NIfTI file {image.get_filename()!r} has a header without directions.")
        slices = next(i for i, code in enumerate(codes) if code in self.across)
        down, along = {"SI": ("AP", "RL"), "AP": ("SI", "RL"), "LR": ("SI", "AP")}[self.across]
        row, column = (next(i for i, code in enumerate(codes) if code in pair) for pair in (down, along))
        # A code says where values grow to; rows are to end at the second letter of their pair.
        return slices, row, column, (1 if codes[row] == down[1] else -1, 1 if codes[column] == along[1] else -1)


class Picture(Reader):
    """PNG, JPEG, BMP (Pillow), 16 bits too; colours of 16 bits through GDAL, because Pillow would halve them."""

    def planes(self, path: str) -> list[Plane]:
        """One picture."""
        from PIL import Image

        if _deep_colour(path):
            return GeoTiff().planes(path)
        with told(path, "a picture"), Image.open(path) as image:
            channels = ("gray",) if len(image.getbands()) < 3 and (self.as_mask or image.mode != "P") else RGB
            largest = {"I": 65535.0, "I;16": 65535.0, "I;16B": 65535.0, "1": 1.0, "F": None}.get(image.mode, 255.0)
            return [Plane(path, 0, image.height, image.width, channels, path, largest=largest)]

    def read(self, plane: Plane, rows: slice, columns: slice) -> np.ndarray:
        """A window; the picture is decoded as a whole."""
        from PIL import Image

        if _deep_colour(plane.path):
            return GeoTiff().read(plane, rows, columns)
        with told(plane.path, "a picture"), Image.open(plane.path) as image:
            gray = len(plane.channels) == 1
            values = np.asarray(image if gray and image.mode != "LA" else image.convert("L" if gray else "RGB"))
            return (values[None] if gray else values.transpose(2, 0, 1))[:, rows, columns]


class Arrays(Reader):
    """.npy (mapped) and .npz (the chosen array unpacked as a whole); every entry of a stack is a picture of its own.

    Without `axes`, `[H, W]`, `[N, H, W]` and `[N, H, W, C]` are meant.
    """

    def planes(self, path: str) -> list[Plane]:
        """Entries of the stack."""
        with told(path, "arrays of numpy"):
            array = _array(path, self.array)
            layout = self._layout(array, path)
            channels, largest = named((), layout.n_channels), largest_of(array.dtype)
            return [
                Plane(path, i, layout.height, layout.width, channels, f"{path}#{i}" if layout.n_planes > 1 else path,
                      largest=largest)
                for i in range(layout.n_planes)
            ]  # fmt: skip

    def read(self, plane: Plane, rows: slice, columns: slice) -> np.ndarray:
        """A window of an entry."""
        with told(plane.path, "arrays of numpy"):
            array = _array(plane.path, self.array)
            return self._layout(array, plane.path).window(array, plane.index, rows, columns)

    def _layout(self, array: np.ndarray, path: str) -> Layout:
        axes = self.axes or {2: "YX", 3: "NYX", 4: "NYXC"}.get(array.ndim, "")
        if array.dtype.kind not in "biuf":
            raise MmsaeError(f"{path!r} holds {array.dtype}, not numbers; choose another with array=.")
        return Layout(axes, array.shape, path)


SUFFIXES: dict[str, type[Reader]] = {
    **dict.fromkeys((".tif", ".tiff"), Tiff), **dict.fromkeys((".dcm", ".dicom"), Dicom),
    **dict.fromkeys((".nii", ".nii.gz"), Nifti), **dict.fromkeys((".npy", ".npz"), Arrays),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp"), Picture),
}  # fmt: skip


def suffix_of(path: str | Path) -> str | None:
    """The ending of a file that is read, `.nii.gz` as one; a file without an ending may be DICOM."""
    name = Path(path).name.lower()
    if name.endswith(".nii.gz"):
        return ".nii.gz"
    suffix = Path(name).suffix
    if suffix in SUFFIXES:
        return suffix
    if not suffix or suffix[1:].isdigit():  # scanners number their files
        with open(path, "rb") as file:
            file.seek(128)
            return ".dcm" if file.read(4) == b"DICM" else None
    return None


@lru_cache(maxsize=2)
def _array(path: str, name: str | None) -> np.ndarray:
    """An array of a file; the last two stay in memory, a picture's and its mask's."""
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)  # a pickle could run code
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        if name is None and len(loaded.files) == 1:
            name = loaded.files[0]
        if name not in loaded.files:
            raise MmsaeError(f"{path!r} holds the arrays {', '.join(loaded.files)}; choose one with array=.")
        return loaded[name]


@lru_cache(maxsize=2)
def _nifti(path: str) -> Any:
    """An opened volume: its header, and slices when they are asked for."""
    return needs("nibabel", "ScienceImages", "science").load(path, keep_file_open=True)


def _first(value: Any) -> float | None:
    """The first number of a DICOM value that may have several."""
    if value is None or value == "":
        return None
    return float(value) if isinstance(value, int | float | str) else float(value[0])


def _deep_colour(path: str) -> bool:
    """A PNG with 16 bits a channel and colours."""
    with told(path, "a picture"), open(path, "rb") as file:
        head = file.read(26)
    return head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 26 and head[24] == 16 and head[25] in (2, 6)

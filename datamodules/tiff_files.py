"""TIFF in its many kinds, read in windows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.rasters import METRES, Layout, Plane, Reader, largest_of, named, told
from mmsae.errors import MmsaeError
from mmsae.sources.weights import needs


class Tiff(Reader):
    """TIFF, OME-TIFF and the TIFF of ImageJ (tifffile); GeoTIFF is handed to `GeoTiff`.

    The first series of a file is read, at full resolution. Only the strips or tiles of a window are decoded.
    """

    def planes(self, path: str) -> list[Plane]:
        """Pages, z-planes, time points."""
        tifffile = needs("tifffile", "ScienceImages", "science")
        with told(path, "TIFF"), tifffile.TiffFile(path) as file:
            if file.pages.first.is_geotiff:
                return GeoTiff(self.axes, self.array).planes(path)
            series = file.series[0]
            layout = Layout(self.axes or series.axes, series.shape, path)
            ends = Path(path).stat().st_size
            if series.dataoffset is not None and series.dataoffset + series.nbytes > ends:
                raise MmsaeError(
                    f"{path!r} is cut off: its pixels need {series.nbytes} bytes; replace it or leave it out."
                )
            names, size = _ome(tifffile, file) if file.is_ome else ((), _resolution(file))
            channels = named(names, layout.n_channels)
            largest = largest_of(np.dtype(series.dtype))
            return [
                Plane(path, i, layout.height, layout.width, channels, path, None, size, largest)
                for i in range(layout.n_planes)
            ]

    def read(self, plane: Plane, rows: slice, columns: slice) -> np.ndarray:
        """The window, mapped from the file where it is not compressed."""
        if "crs" in plane.about:
            return GeoTiff().read(plane, rows, columns)
        tifffile = needs("tifffile", "ScienceImages", "science")
        with told(plane.path, "TIFF"), tifffile.TiffFile(plane.path) as file:
            series = file.series[0]
            axes = (self.axes or series.axes).upper()
            layout = Layout(axes, series.shape, plane.path)
            if series.dataoffset is not None and series.dtype.kind in "iuf":
                mapped = tifffile.memmap(plane.path, series=0, mode="r")
                return layout.window(mapped.reshape(series.shape), plane.index, rows, columns).copy()
            within = series.keyframe.ndim  # axes of a page; those before it count pages
            before = len(series.shape) - within
            counts = np.arange(math.prod(series.shape[:before])).reshape(series.shape[:before])
            # Which pages: those of this picture, one per channel if channels are pages.
            where = dict(zip(layout.counted, np.unravel_index(plane.index, layout.lengths or (1,)), strict=False))
            if any(i >= before for i in where):  # pictures inside a page, as axes= may say
                return layout.window(series.asarray(), plane.index, rows, columns)
            pages = counts[tuple(where.get(i, slice(None)) for i in range(before))].reshape(-1)
            inside = Layout(axes[before:], series.shape[before:], plane.path)
            found = [_segments(plane.path, series.pages[int(i)].aspage(), rows, columns) for i in pages]
            stacked = np.concatenate([window.transpose(2, 0, 1) for window in found])
            if inside.n_channels != len(stacked) // len(pages):
                raise MmsaeError(f"{plane.path!r} has pages of {axes[before:]}, which are not read; save it otherwise.")
            return stacked


class GeoTiff(Reader):
    """Whatever GDAL reads as a raster (rasterio); pixels that have no data in any band are NaN."""

    def planes(self, path: str) -> list[Plane]:
        """One picture, its bands as channels; coordinate system and affine map are kept."""
        rasterio = needs("rasterio", "ScienceImages", "science")
        with told(path, "GeoTIFF"), _quiet(rasterio), rasterio.open(path) as file:
            size, crs = math.nan, ""
            if file.crs is not None:
                crs = file.crs.to_string()
                if file.crs.is_projected:
                    size = math.hypot(file.transform.a, file.transform.d) * file.crs.linear_units_factor[1]
            described = [name for name in file.descriptions if name]
            names = described if len(described) == file.count else [c.name for c in file.colorinterp]
            channels = named(names if len(set(names)) == file.count else (), file.count)
            about = {"crs": crs, "affine": " ".join(f"{x!r}" for x in file.transform[:6])}
            largest = largest_of(np.dtype(file.dtypes[0]))
            return [Plane(path, 0, file.height, file.width, channels, path, None, size, largest, about=about)]

    def read(self, plane: Plane, rows: slice, columns: slice) -> np.ndarray:
        """The window; GDAL decodes its blocks only."""
        rasterio = needs("rasterio", "ScienceImages", "science")
        with told(plane.path, "GeoTIFF"), _quiet(rasterio), rasterio.open(plane.path) as file:
            window = rasterio.windows.Window.from_slices(rows, columns, height=plane.height, width=plane.width)
            values = file.read(window=window)
            there = file.read_masks(window=window).any(0)  # one band alone may well hold that value
            return values if there.all() else np.where(there, values.astype(np.float32), np.nan)


@contextmanager
def _quiet(rasterio: Any) -> Iterator[None]:
    """Pictures without a place on earth are no reason to warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def _segments(path: str, page: Any, rows: slice, columns: slice) -> np.ndarray:
    """A window `[h, w, samples]` of a page, from the strips or tiles that it touches."""
    height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
    n_down, n_across = -(-height // tall), -(-width // wide)
    apart = samples if page.planarconfig == 2 else 1  # each sample has segments of its own
    window = np.zeros((rows.stop - rows.start, columns.stop - columns.start, samples), page.dtype)
    for sample in range(apart):
        for i in range(rows.start // tall, -(-rows.stop // tall)):
            for j in range(columns.start // wide, -(-columns.stop // wide)):
                at = (sample * n_down + i) * n_across + j
                if not page.databytecounts[at]:  # left out of the file: zeros
                    continue
                page.parent.filehandle.seek(page.dataoffsets[at])
                raw = page.parent.filehandle.read(page.databytecounts[at])
                if len(raw) < page.databytecounts[at]:
                    raise MmsaeError(f"{path!r} is cut off in the middle of its pixels; replace it or leave it out.")
                try:
                    values = page.decode(raw, at, jpegtables=page.jpegtables)[0][0]  # [h, w, samples], padded
                except ValueError as error:
                    if "imagecodecs" not in str(error):
                        raise
                    raise MmsaeError(
                        f"{path!r} is packed by {page.compression.name}: pip install imagecodecs."
                    ) from error
                top, left = max(rows.start, i * tall), max(columns.start, j * wide)
                below, right = min(rows.stop, i * tall + tall), min(columns.stop, j * wide + wide)
                part = values[top - i * tall : below - i * tall, left - j * wide : right - j * wide]
                put = window[top - rows.start : below - rows.start, left - columns.start : right - columns.start]
                put[..., sample : sample + 1 if apart > 1 else None] = part
    return window


def _ome(tifffile: Any, file: Any) -> tuple[tuple[str, ...], float]:
    """Names of the channels, and metres per pixel, from the description of an OME-TIFF."""
    image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
    pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
    channels = pixels.get("Channel", [])
    channels = channels if isinstance(channels, list) else [channels]
    names = tuple(str(c.get("Name") or "") for c in channels)
    size = pixels.get("PhysicalSizeX")
    metres = math.nan if size is None else float(size) * METRES.get(pixels.get("PhysicalSizeXUnit", "µm"), math.nan)
    return (names if all(names) else ()), metres


def _resolution(file: Any) -> float:
    """Metres per pixel from the tags; a resolution in inches is that of a printer and says nothing."""
    page = file.pages.first
    across = page.tags.get("XResolution")
    if across is None or not across.value[0]:
        return math.nan
    if file.is_imagej:
        unit = str((file.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ")
    else:
        unit = {3: "cm"}.get(int(getattr(page.tags.get("ResolutionUnit"), "value", 1) or 1), "")
    return across.value[1] / across.value[0] * METRES.get(unit, math.nan)

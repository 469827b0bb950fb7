"""Pictures of microscopes, scanners and satellites, with a table of labels and masks."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from datamodules.base import SPLITS, ActivationDataModule, Split
from datamodules.raster_files import SUFFIXES, suffix_of
from datamodules.rasters import Plane, Reader, belonging
from datamodules.splits import Items
from datamodules.tables import cut_groups
from mmsae.errors import MmsaeError, checked, nearest
from mmsae.sources.weights import needs

Stretch = Literal["type", "image", "data", "window"]
SAMPLED = 2**18
"""Pixels of an image that its percentiles are taken from."""


class ScienceImages(ActivationDataModule):
    """TIFF, OME-TIFF, GeoTIFF, DICOM, NIfTI, .npy, .npz and PNG of any number of channels and bits, read in windows.

    Items hold `array`, float32 [channels, height, width], the names of its `channels`, `pixel_size` (metres, NaN where
    the file does not say), `plane` (page, slice, frame), `tile_row` and `tile_column` (of the first pixel), `image_id`
    and `subject_id` (numbers over all splits). Nothing of one subject is in two splits: that is the group of the table,
    else the patient or series of DICOM, `sub-…` in the path of NIfTI, else the image with all its pages and tiles.

    Args:
        root: A folder, or one file.
        table: .csv or .parquet with a row per file; others are left out.
        file_column: Column of the table with paths, relative to `root`.
        labels: Columns of the table that are labels, each a factor.
        group_column: Column of the table with what must not be on two sides of a split.
        split_column: Column of the table with train, val or test, instead of cutting.
        plane_column: Column of the table with the number of the page, slice or entry that a row is about.
        masks: Folder of pictures with whole numbers, named and shaped like those of `root`; or a column of the table
            with such paths; or, for .npz, the array with the masks.
        mask_values: Values of the masks to names, e.g. {"0": background, "1-": nucleus}; others are unknown.
        channels: Numbers or names, in this order and also repeatedly: [0, 0, 0] makes a gray picture for a model that
            reads colours. "each" makes every channel a gray picture of its own, with its name as the label `channel`.
        copies: How often "each" repeats a channel.
        stretch: What becomes 0..1: the whole range of the "type" (other than whole numbers stay as they are),
            percentiles of each "image" (file, series, entry of a stack) and channel, of the training "data", or the
            "window" that a DICOM file recommends.
        percentiles: Lowest and highest percentile that are told apart.
        limits: Lowest and highest value per channel, or one pair for all, instead of `stretch`.
        tile: Side in pixels of the squares that images are cut into.
        stride: From one tile to the next; `tile` if not given. The last ones end at the border.
        every: Of each file take every so manieth page, slice, frame or entry.
        anatomical_plane: How volumes of NIfTI are sliced: axial, coronal or sagittal.
        axes: What the axes of .npy, .npz and plain TIFF mean, one letter each: Y, X, C for channels, any other counts
            pictures; "XYZC" makes the volumes of a NIfTI file channels.
        array: Which array of .npz files.
        val_share: Share of subjects to choose latents on.
        test_share: Share of subjects to measure on.
        split_seed: Of the cut into splits.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self,
        root: str,
        table: str | None = None,
        file_column: str = "file",
        labels: list[str] | None = None,
        group_column: str | None = None,
        split_column: str | None = None,
        plane_column: str | None = None,
        masks: str | None = None,
        mask_values: dict[str, str] | None = None,
        channels: list[int | str] | Literal["each"] | None = None,
        copies: int = 3,
        stretch: Stretch = "image",
        percentiles: tuple[float, float] = (0.5, 99.5),
        limits: list[list[float]] | None = None,
        tile: int | None = None,
        stride: int | None = None,
        every: int = 1,
        anatomical_plane: Literal["axial", "coronal", "sagittal"] = "axial",
        axes: str | None = None,
        array: str | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.table, self.file_column, self.labels = root, table, file_column, list(labels or [])
        self.group_column, self.split_column, self.plane_column = group_column, split_column, plane_column
        self.masks, self.mask_values = masks, {str(k): str(v) for k, v in (mask_values or {}).items()}
        self.channels, self.copies = channels, checked("copies", copies, 1)
        self.stretch: Stretch = stretch
        self.percentiles, self.limits = [float(percentile) for percentile in percentiles], limits
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise MmsaeError(f"percentiles={self.percentiles} are out of order: give two between 0 and 100.")
        if limits is not None and any(len(pair) != 2 or not pair[0] < pair[1] for pair in limits):
            raise MmsaeError(f"limits={limits} should be pairs of a lower and a higher value, one or one per channel.")
        self.tile = None if tile is None else checked("tile", tile, 1)
        self.stride = None if stride is None else checked("stride", stride, 1)
        self.every = checked("every", every, 1)
        self.anatomical_plane, self.axes, self.array = anatomical_plane, axes, array
        self.val_share, self.test_share, self.split_seed = val_share, test_share, split_seed
        _ = self._files, self._by_row, self._mask_ranges  # what is wrong must be told before any model is loaded

    # ---- what there is

    @cached_property
    def _folder(self) -> Path:
        return Path(self.root).parent if Path(self.root).is_file() else Path(self.root)

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the table; empty without one."""
        if self.table is None:
            used = {"labels": self.labels, "group_column": self.group_column, "split_column": self.split_column}
            if asked := [name for name, value in used.items() if value]:
                raise MmsaeError(f"data.{asked[0]} names columns, but there is no data.table.")
            return []
        rows = _table(self.table)
        wanted = [self.file_column, *self.labels, self.group_column, self.split_column, self.plane_column]
        for column in wanted:
            if column is not None and column not in rows[0]:
                close = nearest(column, rows[0])
                raise MmsaeError(f"the table {self.table!r} has no column {column!r}; nearest: {close}.")
        return rows

    @cached_property
    def _files(self) -> list[str]:
        """The files to read, in a fixed order."""
        root = Path(self.root)
        if not root.exists():
            raise MmsaeError(f"data.root={self.root} does not exist: give a folder of pictures, or one file.")
        if self._rows:
            named = dict.fromkeys(str(self._folder / str(row[self.file_column])) for row in self._rows)
            for path in named:
                if not Path(path).is_file():
                    raise MmsaeError(_missing(self.table, path, self.file_column))
            return list(named)
        aside = Path(self.masks) if self.masks and Path(self.masks).is_dir() else None
        found = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        files = [str(p) for p in found if suffix_of(p) and not (aside and aside in p.parents)]
        if not files:
            raise MmsaeError(f"data.root={self.root} holds no pictures ({', '.join(sorted(SUFFIXES))}, DICOM).")
        return files

    @cached_property
    def _by_row(self) -> dict[tuple[str, int | None], dict[str, Any]]:
        """Rows of the table by file and, if the table says so, plane."""
        found: dict[tuple[str, int | None], dict[str, Any]] = {}
        for row in self._rows:
            path, number = str(self._folder / str(row[self.file_column])), None
            if self.plane_column is not None:
                try:
                    number = int(row[self.plane_column])
                except (TypeError, ValueError) as error:
                    said = f"column {self.plane_column!r} of {self.table!r} holds {row[self.plane_column]!r}"
                    raise MmsaeError(f"{said}; pages and slices are whole numbers.") from error
            if (path, number) in found:
                raise MmsaeError(f"the table {self.table!r} has two rows about {path!r}; tell them by plane_column.")
            found[path, number] = row
        return found

    def _row(self, plane: Plane) -> dict[str, Any]:
        """What the table says of a plane."""
        return self._by_row.get((plane.path, plane.index if self.plane_column else None), {})

    @cached_property
    def _planes(self) -> list[Plane]:
        """All pictures, from the headers of the files."""
        planes = []
        for path in self._files:
            found = self._reader(path).planes(path)[:: self.every]
            planes += found if not self._rows else [plane for plane in found if self._row(plane)]
        if not planes:
            raise MmsaeError(f"no picture below {self.root} is one that column {self.plane_column!r} counts.")
        return planes

    @cached_property
    def _subjects(self) -> list[str]:
        """Of every picture what must not be on two sides of a split."""
        column = self.group_column
        return [str(self._row(p)[column]) if column else p.subject or p.image for p in self._planes]

    @cached_property
    def _split_of(self) -> list[Split]:
        """The split of every picture."""
        if self.split_column is not None:
            told = [str(self._row(plane)[self.split_column]) for plane in self._planes]
            if unknown := sorted(set(told) - set(SPLITS)):
                raise MmsaeError(f"column {self.split_column!r} holds {unknown[0]!r}; splits are train, val and test.")
            whose = dict(zip(self._subjects, told, strict=True))
            for subject, split in zip(self._subjects, told, strict=True):
                if whose[subject] != split:
                    raise MmsaeError(
                        f"column {self.split_column!r} puts {subject!r} into {whose[subject]} and {split}."
                    )
            return told  # type: ignore[return-value]
        dealt: dict[int, Split] = {}
        for part in SPLITS:
            chosen = cut_groups(self._subjects, part, self.val_share, self.test_share, self.split_seed)
            dealt |= dict.fromkeys(chosen, part)
        return [dealt[i] for i in range(len(self._planes))]

    @cached_property
    def _sets(self) -> list[tuple[str, ...]]:
        """The sets of channels that occur."""
        return sorted({plane.channels for plane in self._planes})

    @cached_property
    def factors(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """Labels of the table, names of mask values, channels or sets of channels."""
        found = {
            column: tuple(sorted({str(self._row(p)[column]) for p in self._planes} - {"", "None", "nan"}))
            for column in self.labels
        }
        if self.mask_values:
            found["mask"] = tuple(dict.fromkeys(self.mask_values.values()))
        if self.channels == "each":
            found["channel"] = tuple(sorted({name for names in self._sets for name in names}))
        elif len(self._sets) > 1:
            found["channel_set"] = tuple("+".join(names) for names in self._sets)
        return found

    # ---- items

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Tiles, read when they are asked for."""
        found = [np.empty((0, 4), np.int32)]
        for number, (plane, of) in enumerate(zip(self._planes, self._split_of, strict=True)):
            if of == split:
                alone = range(len(plane.channels)) if self.channels == "each" else [-1]
                places = np.meshgrid(
                    [number], self._starts(plane.height), self._starts(plane.width), alone, indexing="ij"
                )
                found.append(np.stack(places, -1).reshape(-1, 4).astype(np.int32))
        rows: Any = np.concatenate(found)  # 16 bytes per tile
        return Items(rows, self._item)

    def identity(self, split: Split) -> dict[str, Any]:
        """Also the limits that were measured on the data, and the channels that were read."""
        found = super().identity(split)
        measured = self._data_limits.tolist() if self.stretch == "data" and self.limits is None else None
        return {**found, "measured_limits": measured, "channel_sets": [list(names) for names in self._sets]}

    def _starts(self, length: int) -> list[int]:
        """Where tiles begin along an axis."""
        if self.tile is None or length <= self.tile:
            return [0]
        starts = list(range(0, length - self.tile + 1, self.stride or self.tile))
        return starts if starts[-1] == length - self.tile else [*starts, length - self.tile]

    def _item(self, thing: Sequence[int], sample_id: int) -> dict[str, Any]:
        number, top, left, channel = (int(x) for x in thing)
        plane = self._planes[number]
        side = self.tile or max(plane.height, plane.width)
        rows, columns = slice(top, min(top + side, plane.height)), slice(left, min(left + side, plane.width))
        chosen = [channel] * self.copies if channel >= 0 else self._chosen(plane)
        values = self._reader(plane.path).read(plane, rows, columns)[chosen].astype(np.float32)
        names = tuple(plane.channels[i] for i in chosen)

        row, labels = self._row(plane), {}
        for column in self.labels:
            values_of, value = self.factors[column], str(row[column])
            labels[column] = values_of.index(value) if value in values_of else -1
        if channel >= 0:
            labels["channel"] = self.factors["channel"].index(plane.channels[channel])
        elif "channel_set" in self.factors:
            labels["channel_set"] = self._sets.index(plane.channels)
        caption = f"{Path(plane.path).name} · {plane.index} · {top}, {left} · {', '.join(dict.fromkeys(names))}"
        item = {
            "array": self._stretched(values, plane, chosen), "channels": names, "text": caption, "file": plane.path,
            "sample_id": sample_id, "labels": labels, "pixel_size": plane.pixel_size, "plane": plane.index,
            "tile_row": top, "tile_column": left, "image_id": self._numbers[0][plane.image],
            "subject_id": self._numbers[1][self._subjects[number]], **plane.about,
        }  # fmt: skip
        mask = self._mask(plane, rows, columns)
        return item if mask is None else {**item, "mask": mask, "mask_names": self.factors.get("mask", ())}

    @cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        """Numbers of images and of subjects."""
        images, subjects = sorted({plane.image for plane in self._planes}), sorted(set(self._subjects))
        return {name: i for i, name in enumerate(images)}, {name: i for i, name in enumerate(subjects)}

    def _chosen(self, plane: Plane) -> list[int]:
        """Which channels of a picture are read."""
        if self.channels is None or self.channels == "each":
            return list(range(len(plane.channels)))
        chosen = []
        for channel in self.channels:
            if isinstance(channel, str) and channel in plane.channels:
                chosen.append(plane.channels.index(channel))
            elif isinstance(channel, int) and 0 <= channel < len(plane.channels):
                chosen.append(channel)
            else:
                has = ", ".join(f"{i} ({name})" for i, name in enumerate(plane.channels))
                raise MmsaeError(f"{plane.path!r} has no channel {channel!r}; it has {has}.")
        return chosen

    def _reader(self, path: str, mask_of: str | None = None) -> Reader:
        """The reader of a file, or of the mask of another file."""
        suffix = suffix_of(path)
        if suffix is None:
            raise MmsaeError(f"{path!r} is of no known format ({', '.join(sorted(SUFFIXES))}, DICOM).")
        if mask_of is None:
            return _reader(suffix, self.axes, self.array, self.anatomical_plane, False)
        axes = self.axes.upper().replace("C", "") if self.axes else None
        array = self.masks if mask_of == path else None
        return _reader(suffix, axes, array, self.anatomical_plane, True)

    # ---- values

    def _stretched(self, values: np.ndarray, plane: Plane, chosen: list[int]) -> np.ndarray:
        """Values brought to 0..1; pixels without data become 0."""
        if self.limits is not None:
            if len(self.limits) not in (1, len(chosen)):
                raise MmsaeError(
                    f"limits has {len(self.limits)} pairs for {len(chosen)} channels; give one, or as many."
                )
            limits = np.broadcast_to(np.array(self.limits, np.float32), (len(chosen), 2))
        elif self.stretch == "type":
            if plane.largest is None:
                return np.nan_to_num(values)
            limits = np.tile(np.array([0, plane.largest], np.float32), (len(chosen), 1))
        elif self.stretch == "window":
            if plane.window is None:
                raise MmsaeError(f"{plane.path!r} recommends no window; give limits, or another stretch.")
            limits = np.tile(np.array(plane.window, np.float32), (len(chosen), 1))
        elif self.stretch == "data":
            if len(plane.channels) != len(self._data_limits):
                raise MmsaeError(f"{plane.path!r} has other channels than the rest; give limits, or stretch=image.")
            limits = self._data_limits[chosen]
        else:
            limits = self._image_limits(plane.image)[chosen]
        low, high = limits[:, 0, None, None], limits[:, 1, None, None]
        scaled = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
        return np.nan_to_num(1 - scaled if plane.inverted else scaled)

    @cached_property
    def _of_image(self) -> dict[str, list[Plane]]:
        """The planes of every image."""
        found: dict[str, list[Plane]] = {}
        for plane in self._planes:
            found.setdefault(plane.image, []).append(plane)
        return found

    @cached_property
    def _limits_found(self) -> dict[str, np.ndarray]:
        return {}

    def _image_limits(self, image: str) -> np.ndarray:
        """Percentiles of an image, [channels, 2], measured once."""
        if image not in self._limits_found:
            self._limits_found[image] = np.nanpercentile(self._sample(image), self.percentiles, axis=1).T
        return self._limits_found[image].astype(np.float32)

    @cached_property
    def _data_limits(self) -> np.ndarray:
        """Percentiles of at most 64 training images, [channels, 2]."""
        trained = {p.image for p, split in zip(self._planes, self._split_of, strict=True) if split == "train"}
        names = sorted(trained)
        chosen = names[:: -(-len(names) // 64)]
        samples = [self._sample(image) for image in chosen]
        if len({len(sample) for sample in samples}) > 1:
            raise MmsaeError("stretch=data needs pictures of equal channels; give limits, or stretch=image.")
        return np.nanpercentile(np.concatenate(samples, axis=1), self.percentiles, axis=1).T.astype(np.float32)

    def _sample(self, image: str) -> np.ndarray:
        """Pixels [channels, n] all over an image, read in bands so that it is never in memory as a whole."""
        planes = self._of_image[image]
        planes = planes[:: -(-len(planes) // 16)]
        found = []
        for plane in planes:
            step = max(round((plane.height * plane.width * len(planes) / SAMPLED) ** 0.5), 1)
            band = max(2**22 // (plane.width * step), 1) * step
            for top in range(0, plane.height, band):
                rows = slice(top, min(top + band, plane.height))
                part = self._reader(plane.path).read(plane, rows, slice(0, plane.width))[:, ::step, ::step]
                found.append(part.reshape(len(part), -1).astype(np.float32))
        sample = np.concatenate(found, axis=1)
        return np.where(np.isnan(sample).all(1, keepdims=True), 0, sample)  # a channel without any data

    # ---- masks

    @cached_property
    def _mask_ranges(self) -> list[tuple[int, float, int]]:
        """Lowest and highest value and index of its name."""
        names = list(dict.fromkeys(self.mask_values.values()))
        found = []
        for text, name in self.mask_values.items():
            low, dash, high = text.strip().partition("-")
            try:
                top = float(int(low)) if not dash else float(int(high)) if high else float("inf")
                found.append((int(low), top, names.index(name)))
            except ValueError as error:
                raise MmsaeError(
                    f"mask_values has {text!r}; give a whole number, a range 1-9, or 1- and above."
                ) from error
        return found

    @cached_property
    def _mask_files(self) -> dict[str, str]:
        """The mask of a picture by its path."""
        if self.masks is None:
            return {}
        if self._rows and self.masks in self._rows[0]:
            found = {}
            for row in self._rows:
                if row[self.masks]:
                    path = str(self._folder / str(row[self.masks]))
                    if not Path(path).is_file():
                        raise MmsaeError(_missing(self.table, path, self.masks))
                    found[str(self._folder / str(row[self.file_column]))] = path
            return found
        folder = Path(self.masks)
        if not folder.is_dir():
            if all(suffix_of(path) == ".npz" for path in self._files):
                return {path: path for path in self._files}
            raise MmsaeError(f"data.masks={self.masks} is neither a folder nor a column of the table.")
        named = {_stem(p, folder): str(p) for p in sorted(folder.rglob("*")) if p.is_file() and suffix_of(p)}
        found = {path: named[key] for path in self._files if (key := _stem(Path(path), self._folder)) in named}
        if not found:
            raise MmsaeError(f"no file in data.masks={self.masks} is named like one of {self.root}.")
        return found

    def _mask(self, plane: Plane, rows: slice, columns: slice) -> np.ndarray | None:
        """Indices of names, or the values where they have none, int64 [h, w]; None where there is no mask."""
        path = self._mask_files.get(plane.path)
        if path is None:
            return None
        reader = self._reader(path, plane.path)
        values = reader.read(belonging(reader, path, plane), rows, columns)
        if len(values) != 1 or not np.array_equal(values, values.round()):
            raise MmsaeError(
                f"the mask {path!r} has {len(values)} channels or fractions; give one whole number a pixel."
            )
        values = values[0].astype(np.int64)
        if not self._mask_ranges:
            return values
        mask = np.full_like(values, -1)
        for low, high, index in self._mask_ranges:
            mask[(values >= low) & (values <= high)] = index
        return mask


@lru_cache(maxsize=64)
def _reader(suffix: str, axes: str | None, array: str | None, plane: str, as_mask: bool) -> Reader:
    """The reader of a file by its ending."""
    return SUFFIXES[suffix](axes, array, plane, as_mask)


def _missing(table: str | None, path: str, column: str) -> str:
    return f"the table {table!r} names {path!r} in column {column!r}, but there is no such file."


def _stem(path: Path, folder: Path) -> str:
    """The path below a folder without its ending."""
    name = path.relative_to(folder).as_posix()
    suffix = suffix_of(path)
    return name[: -len(suffix)] if suffix and name.lower().endswith(suffix) else name


def _table(path: str) -> list[dict[str, Any]]:
    """The rows of a .csv or .parquet file."""
    if not Path(path).is_file():
        raise MmsaeError(f"there is no table {path!r}; give a .csv or .parquet file.")
    try:
        if path.endswith(".parquet"):
            rows = needs("pyarrow.parquet", "a table in Parquet", "science").read_table(path).to_pylist()
        else:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise MmsaeError(f"the table {path!r} cannot be read ({error}).") from error
    if not rows:
        raise MmsaeError(f"the table {path!r} has no rows.")
    return rows

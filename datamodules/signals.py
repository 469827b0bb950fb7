"""What data sets of recorded time series have in common: windows, splits by subject, and how signals are prepared."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items, cut
from mmsae.errors import MmsaeError, checked
from mmsae.sources.signal import STANDARDISED, channel_order, render_signal

SplitBy = Literal["subject", "recording", "time"]
SUBJECT = r"sub-[A-Za-z0-9]+|^[A-Za-z]*\d+"
"""Where the name of a file says whose it is: `sub-01_task-rest`, `S001R04`, `chb01_03`, `p10000032-s40689238`."""


class Recording(NamedTuple):
    """What is known of a recording without reading its samples.

    Attributes:
        name: For sentences and captions; mostly the path.
        subject: Whose it is.
        seconds: Its length.
        events: `[start_s, end_s, name]`.
        labels: Factor to the name of its value, for the whole recording.
        key: What `samples` needs to find it.
    """

    name: str
    subject: str
    seconds: float
    events: list[list[Any]]
    labels: dict[str, str]
    key: Any


class Samples(NamedTuple):
    """The samples of a recording.

    Attributes:
        values: Physical units, `[C, T]`.
        rate: Samples per second.
        channels: Names.
        unit: Of the values.
    """

    values: np.ndarray
    rate: float
    channels: list[str]
    unit: str


class SignalWindows(ActivationDataModule, ABC):
    """Windows of recordings; by default all windows of a subject are in one split.

    Missing samples are interpolated, recordings resampled to `rate`, channels picked and put in order. Rows carry
    `subject`, `recording` (numbers over all splits), `rate` and `offset_s`, where the window starts in its recording.

    Args:
        window_s: Length of a window, seconds; 0 takes recordings whole.
        stride_s: From the start of a window to that of the next; None is `window_s`, without overlap.
        windows: "grid" cuts from the start of a recording; "events" cuts every event by itself, and its name is the
            label `class` of its windows.
        rate: Resample to this many samples per second; None leaves what the files have.
        channels: Names of the channels to keep, in this order; capitals, dots and spaces do not matter.
        standardise: "none" leaves physical units; "train" subtracts from every channel the mean over the training
            recordings and divides by the standard deviation; "recording" does so for each by itself.
        split_by: "subject"; "recording"; or "time", which gives the beginning of every recording to the training and
            its end to the test: only for data of few subjects, since a subject is then known from the training.
        subject_pattern: Regular expression that finds the subject in the name of a file; where it finds none, every
            file is a subject.
        val_share: Share of subjects to choose latents on.
        test_share: Share of subjects to measure on.
        split_seed: Of the cut into splits.
        cache_mb: Memory for recordings that have been read.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self,
        window_s: float = 10.0,
        stride_s: float | None = None,
        windows: Literal["grid", "events"] = "grid",
        rate: float | None = None,
        channels: list[str] | None = None,
        standardise: Literal["none", "train", "recording"] = "none",
        split_by: SplitBy = "subject",
        subject_pattern: str = SUBJECT,
        val_share: float = 0.1,
        test_share: float = 0.1,
        split_seed: int = 0,
        cache_mb: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if split_by not in get_args(SplitBy):
            raise MmsaeError(f"split_by={split_by!r} is unknown; choose {', '.join(get_args(SplitBy))}.")
        self.window_s = checked("window_s", window_s, 0)
        self.stride_s = window_s if stride_s is None else checked("stride_s", stride_s, 1e-3)
        self.windows, self.channels, self.standardise = windows, channels, standardise
        self.rate = None if rate is None else checked("rate", rate, 1e-3)
        self.split_by, self.subject_pattern = split_by, subject_pattern
        self.val_share, self.test_share, self.split_seed = val_share, test_share, split_seed
        self.cache_mb = checked("cache_mb", cache_mb, 0)
        self._read: OrderedDict[int, Samples] = OrderedDict()
        self._windows: dict[Split, list[tuple[int, float, float, int]]] = {}

    # What a subclass writes.

    @abstractmethod
    def found(self) -> list[Recording]:
        """All recordings, in an order that does not change; their samples are not read."""

    @abstractmethod
    def samples(self, recording: Recording) -> Samples:
        """The samples of one; MmsaeError naming the file that cannot be read."""

    # What every one of them does.

    @cached_property
    def recordings(self) -> list[Recording]:
        """All recordings; what is damaged beyond its header is told here as well, before any model is loaded."""
        return self.found()

    @cached_property
    def subjects(self) -> list[str]:
        """Names of the subjects, in the order of the column `subject`."""
        return sorted({recording.subject for recording in self.recordings})

    @cached_property
    def factors(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """Values of the recordings' labels, and of the events."""
        values: dict[str, set[str]] = {}
        for recording in self.recordings:
            for factor, value in recording.labels.items():
                values.setdefault(factor, set()).add(value)
        events = {str(name) for recording in self.recordings for *_, name in recording.events}
        if events:
            values["event"] = events
            if self.windows == "events":
                values["class"] = events
        return {factor: tuple(sorted(names)) for factor, names in values.items()}

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Windows in the order of the recordings."""
        if split not in self._windows:
            self._windows[split] = self._cut(split)
        return Items(self._windows[split], self._item)

    def identity(self, split: Split) -> dict[str, Any]:
        """Class, arguments, split and size of the data set."""
        shared = (
            "window_s", "stride_s", "windows", "rate", "channels", "standardise", "split_by", "subject_pattern",
            "val_share", "test_share", "split_seed",
        )  # fmt: skip
        return {**super().identity(split), **{name: getattr(self, name) for name in shared}}

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The curves of a window."""
        return render_signal(item)

    def subject_of(self, name: str) -> str:
        """The subject that `subject_pattern` finds in a name, else the name."""
        match = re.search(self.subject_pattern, name)
        if match is None:
            return name
        return match.group(1) if match.re.groups else match.group()

    def _cut(self, split: Split) -> list[tuple[int, float, float, int]]:
        """Recording, start and length in seconds, and the event (or -1) of every window of a split."""
        if self.split_by == "time":
            checked("val_share + test_share", self.val_share + self.test_share, 0, 0.999)
            return [w for i in range(len(self.recordings)) for w in self._of(i) if self._in_time(w, split)]
        names = [r.subject if self.split_by == "subject" else r.name for r in self.recordings]
        known = sorted(set(names))
        try:
            chosen = {known[i] for i in cut(len(known), split, self.val_share, self.test_share, self.split_seed)}
        except MmsaeError as error:
            other = "split_by='recording' or 'time'" if self.split_by == "subject" else "split_by='time'"
            raise MmsaeError(f"{len(known)} {self.split_by}s: {error} {other} would cut within them.") from error
        windows = [w for i, name in enumerate(names) if name in chosen for w in self._of(i)]
        if not windows:
            raise MmsaeError(
                f"the {split} split of {type(self).__name__} has no window of {self.window_s:g} s: set window_s."
            )
        return windows

    def _of(self, index: int) -> list[tuple[int, float, float, int]]:
        recording = self.recordings[index]
        events = self.factors.get("event", ())
        spans: list[tuple[float, float, int]] = [(0.0, recording.seconds, -1)]
        if self.windows == "events":
            spans = [(max(a, 0), min(b, recording.seconds), events.index(n)) for a, b, n in recording.events]
        found = []
        for start, end, event in spans:
            length = self.window_s or end - start
            n = math.floor((end - start - length) / (self.stride_s or length) + 1e-6) + 1 if length > 0 else 0
            found += [(index, start + k * self.stride_s, length, event) for k in range(n)]
        return found

    def _in_time(self, window: tuple[int, float, float, int], split: Split) -> bool:
        """Whether a window lies whole in its split's part of the recording."""
        index, start, length, _ = window
        end, seconds = start + length, self.recordings[index].seconds
        first = (1 - self.val_share - self.test_share) * seconds
        second = (1 - self.test_share) * seconds
        low, high = {"train": (0, first), "val": (first, second), "test": (second, seconds)}[split]
        return start >= low - 1e-6 and end <= high + 1e-6

    def _item(self, window: tuple[int, float, float, int], sample_id: int) -> dict[str, Any]:
        index, start, length, event = window
        recording, whole = self.recordings[index], self.prepared(index)
        first, n = round(start * whole.rate), round(length * whole.rate)
        first = min(first, max(whole.values.shape[1] - n, 0))  # a last window may be half a sample too late
        values = torch.from_numpy(whole.values[:, first : first + n]).clone()
        if self.standardise == "train":
            mean, std = self._moments
            values = (values - mean) / std
        names = self.factors
        labels = {factor: names[factor].index(value) for factor, value in recording.labels.items()}
        if event >= 0:
            labels["class"] = event
        seconds = values.shape[1] / whole.rate
        inside = [
            [max(a - start, 0.0), min(b - start, seconds), name]
            for a, b, name in recording.events
            if a < start + seconds and b > start
        ]
        return {
            "signal": values,
            "rate": whole.rate,
            "channels": whole.channels,
            "unit": whole.unit if self.standardise == "none" else STANDARDISED,
            "events": inside,
            "event_names": names.get("event", ()),
            "labels": labels,
            "subject": self.subjects.index(recording.subject),
            "recording": index,
            "offset_s": float(start),
            "text": f"{recording.name}, {start:.1f} s",
            "sample_id": sample_id,
        }

    def prepared(self, index: int) -> Samples:
        """A recording resampled, with its channels picked and without gaps; the last ones stay in memory."""
        if index in self._read:
            self._read.move_to_end(index)
            return self._read[index]
        recording = self.recordings[index]
        values, rate, channels, unit = self.samples(recording)
        if self.channels:
            order = channel_order(channels, self.channels, recording.name)
            values, channels = values[order], [channels[i] for i in order]
        values = interpolated(np.asarray(values, np.float64), channels, recording.name)
        if self.rate is not None and self.rate != rate:
            values, rate = resampled(values, rate, self.rate), self.rate
        if self.standardise == "recording":
            std = values.std(1, keepdims=True)
            values = (values - values.mean(1, keepdims=True)) / np.where(std > 1e-8, std, 1)
        read = Samples(values.astype(np.float32), float(rate), list(channels), unit)
        self._read[index] = read
        while len(self._read) > 1 and sum(r.values.nbytes for r in self._read.values()) > self.cache_mb * 1e6:
            self._read.popitem(last=False)
        return read

    @cached_property
    def _moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of every channel over the training windows' recordings, `[C, 1]`."""
        self.items("train")
        count, total, squares = 0, np.zeros(1), np.zeros(1)
        for index in sorted({window[0] for window in self._windows["train"]}):
            values = self.prepared(index).values.astype(np.float64)
            if self.split_by == "time":
                values = values[:, : max(int((1 - self.val_share - self.test_share) * values.shape[1]), 1)]
            count += values.shape[1]
            total, squares = total + values.sum(1), squares + (values**2).sum(1)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        std = np.where(std > 1e-8, std, 1)
        return tuple(torch.tensor(x, dtype=torch.float32)[:, None] for x in (mean, std))  # type: ignore[return-value]


def interpolated(values: np.ndarray, channels: Sequence[str], name: str) -> np.ndarray:
    """Missing samples of `[C, T]` filled in from their neighbours; MmsaeError for a channel without any sample."""
    missing = ~np.isfinite(values)
    if not missing.any():
        return values
    values, index = values.copy(), np.arange(values.shape[1])
    for row in np.flatnonzero(missing.any(1)).tolist():
        gaps = missing[row]
        if gaps.all():
            raise MmsaeError(f"channel {channels[row]} of {name} holds no numbers: leave the recording or it out.")
        values[row, gaps] = np.interp(index[gaps], index[~gaps], values[row, ~gaps])
    return values


def resampled(values: np.ndarray, rate: float, wanted: float) -> np.ndarray:
    """`[C, T]` at another rate, by a polyphase filter; `ceil(T * wanted / rate)` samples."""
    from scipy.signal import resample_poly

    ratio = Fraction(wanted / rate).limit_denominator(1000)
    return resample_poly(values, ratio.numerator, ratio.denominator, axis=1, padtype="line")

"""Sessions of the Empatica E4 wristband."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.signals import Recording, Samples, SignalWindows, resampled
from mmsae.errors import MmsaeError
from mmsae.sources.weights import first_line

FILES = {"ACC": 3, "BVP": 1, "EDA": 1, "TEMP": 1, "HR": 1}
"""Columns of each file of a session."""
CHANNELS = ("ACC_x", "ACC_y", "ACC_z", "BVP", "EDA", "TEMP")
SLACK = 10.0  # s: channels of one session may end that much apart, and HR starts that much later


class E4Sessions(SignalWindows):
    """Empatica E4 sessions in the maker's CSV layout, a folder each: first row start (Unix), second row rate.

    All channels are cut to the time that they have in common (HR starts ten seconds after the others) and brought to
    one rate by polyphase filters. ACC is in g, EDA in µS, TEMP in °C, HR per minute; IBI, a channel that must be asked
    for, is the last interval between beats in seconds.

    Args:
        root: A session's folder, or a folder of such.
        labels_file: CSV file in each session's folder that says what the wearer did when; runs of one value become
            events, `label.event`. None reads none.
        time_column: Its column with Unix times, one row a second or more often.
        label_column: Its column with the values.
        rate: Samples per second that all channels are brought to; the fastest, BVP, has 64.
        channels: Any of ACC_x, ACC_y, ACC_z, BVP, EDA, TEMP, HR and IBI; None is the first six.
        window_s: Length of a window, seconds.
        **kwargs: See `SignalWindows` and `ActivationDataModule`.
    """

    def __init__(
        self,
        root: str,
        labels_file: str | None = None,
        time_column: str = "time",
        label_column: str = "label",
        rate: float = 32.0,
        channels: list[str] | None = None,
        window_s: float = 32.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(rate=rate, channels=list(channels or CHANNELS), window_s=window_s, **kwargs)
        self.root, self.labels_file = root, labels_file
        self.time_column, self.label_column = time_column, label_column
        known = (*CHANNELS, "HR", "IBI")
        if wrong := [name for name in self.channels or () if name not in known]:
            raise MmsaeError(f"an E4 has no channel {wrong[0]!r}; it has {', '.join(known)}.")
        _ = self.recordings  # what is damaged must be told before any model is loaded

    def found(self) -> list[Recording]:
        """One for each folder with the files that the channels need."""
        root = Path(self.root)
        one = next(iter(sorted(self._needed)))
        folders = sorted({path.parent for path in root.rglob(f"{one}.csv")})
        if not folders:
            raise MmsaeError(f"data.root={self.root} holds no session: no folder has {one}.csv.")
        return [self._recording(folder) for folder in folders]

    def samples(self, recording: Recording) -> Samples:
        """All channels over their common time, `[C, T]` at `rate`."""
        assert self.rate is not None
        tracks, start, end = _session(recording.key, self._needed)
        n = int((end - start) * self.rate)
        names, rows = [], []
        for name in self._needed:
            values, t0, rate = tracks[name]
            first = round((start - t0) * rate)
            part = values[:, first : first + round((end - start) * rate)]
            if name == "IBI":  # already on a grid
                names.append(name)
            else:
                names += [f"ACC_{axis}" for axis in "xyz"] if name == "ACC" else [name]
            rows.append(_fitted(resampled(part, rate, self.rate) if rate != self.rate else part, n))
        return Samples(np.concatenate(rows), self.rate, names, "g, µS, °C")

    @property
    def _needed(self) -> list[str]:
        """Files that the channels are read from."""
        return list(dict.fromkeys(name.partition("_")[0] for name in self.channels or CHANNELS))

    def _recording(self, folder: Path) -> Recording:
        _, start, end = _session(folder, self._needed)
        events = [] if self.labels_file is None else self._events(folder / self.labels_file, start, end)
        return Recording(str(folder), self.subject_of(folder.name), end - start, events, {}, folder)

    def _events(self, path: Path, start: float, end: float) -> list[list[Any]]:
        try:
            table = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8", deletechars="")
            t = np.asarray(table[self.time_column], float)
            values = [str(value) for value in table[self.label_column]]
        except (OSError, ValueError, IndexError) as error:
            raise MmsaeError(
                f"{path} is no table with the columns {self.time_column} and {self.label_column} ({first_line(error)})."
            ) from error
        turns = [0, *(i for i in range(1, len(t)) if values[i] != values[i - 1] or t[i] - t[i - 1] > SLACK), len(t)]
        step = float(np.median(np.diff(t))) if len(t) > 1 else 1.0
        runs = [(t[a] - start, t[b - 1] + step - start, values[a]) for a, b in pairwise(turns)]
        return [[float(max(a, 0)), float(min(b, end - start)), v] for a, b, v in runs if b > 0 and a < end - start]


def _session(folder: Path, names: list[str]) -> tuple[dict[str, tuple[np.ndarray, float, float]], float, float]:
    """Values `[C, T]`, start and rate of each file, and start and end of the time they have in common."""
    tracks = {name: _track(folder / f"{name}.csv", FILES[name]) for name in names if name != "IBI"}
    if not tracks:
        raise MmsaeError("the channel IBI alone has no time: ask for HR or another one with it.")
    starts = {name: t0 for name, (_, t0, _) in tracks.items()}
    ends = {name: t0 + values.shape[1] / rate for name, (values, t0, rate) in tracks.items()}
    for what, times in (("starts", starts), ("ends", ends)):
        middle = float(np.median(list(times.values())))
        odd = max(times, key=lambda name: abs(times[name] - middle))
        if max(times.values()) - min(times.values()) > SLACK + 1:
            apart = abs(times[odd] - middle)
            raise MmsaeError(f"{folder / odd}.csv {what} {apart:.0f} s apart from the other files of its session.")
    start, end = max(starts.values()), min(ends.values())
    if "IBI" in names:
        tracks["IBI"] = (_intervals(folder / "IBI.csv", start, end), start, 4.0)
    return tracks, start, end


def _track(path: Path, n_columns: int) -> tuple[np.ndarray, float, float]:
    """Values `[C, T]`, start (Unix) and rate of a file."""
    if not path.is_file():
        raise MmsaeError(f"there is no {path}; a session needs it for the channels that were asked for.")
    try:
        table = np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError as error:
        raise MmsaeError(f"{path} holds something else than numbers ({first_line(error)}).") from error
    if table.shape[0] < 3 or table.shape[1] != n_columns or not table[1, 0] > 0:
        raise MmsaeError(f"{path} is no E4 file: {n_columns} columns, a start, a rate, then samples.")
    values = table[2:].T / (64.0 if path.stem == "ACC" else 1.0)  # 1/64 g
    return values, float(table[0, 0]), float(table[1, 0])


def _intervals(path: Path, start: float, end: float) -> np.ndarray:
    """The last interval between beats at four points a second, `[1, T]`."""
    try:
        lines = path.read_text().strip().splitlines()
        origin = float(lines[0].split(",")[0])
        rows = np.array([[float(cell) for cell in line.split(",")] for line in lines[1:]])
        t, interval = origin + rows[:, 0], rows[:, 1]
    except (OSError, ValueError, IndexError) as error:
        raise MmsaeError(f"{path} is no IBI file: a start, then offset and interval ({first_line(error)}).") from error
    grid = start + np.arange(int((end - start) * 4)) / 4
    return interval[np.clip(np.searchsorted(t, grid, side="right") - 1, 0, None)][None]


def _fitted(values: np.ndarray, n: int) -> np.ndarray:
    """The first `n` samples of `[C, T]`; what rounding left out repeats the last one."""
    return np.pad(values, ((0, 0), (0, max(n - values.shape[1], 0))), mode="edge")[:, :n]

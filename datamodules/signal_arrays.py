"""Time series in NumPy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from datamodules.signals import Recording, Samples, SignalWindows
from mmsae.errors import MmsaeError, checked
from mmsae.sources.weights import first_line


class SignalArrays(SignalWindows):
    """Recordings of equal length in a `.npy` or `.npz` file: an array `[n, C, T]`, and beside it what is known of them.

    Args:
        path: The file. A `.npy` file is mapped into memory, not read.
        signals: Name of the array in a `.npz` file.
        array_rate: Samples per second of the array.
        labels: Names of arrays of n values that become labels.
        subject: Name of the array of n subjects; without it, every recording is of another one.
        names: Names of the channels, or of the array in the `.npz` file that holds them.
        unit: Of the samples.
        scale: Factor from the numbers of the array to that unit.
        **kwargs: See `SignalWindows` and `ActivationDataModule`.
    """

    def __init__(
        self,
        path: str,
        array_rate: float,
        signals: str = "signals",
        labels: list[str] | None = None,
        subject: str | None = None,
        names: list[str] | str | None = None,
        unit: str = "",
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.signals, self.labels, self.subject = path, signals, labels or [], subject
        self.array_rate, self.names = checked("array_rate", array_rate, 1e-3), names
        self.unit, self.scale = unit, scale
        self._arrays: dict[str, np.ndarray] = {}
        _ = self.recordings  # what is damaged must be told before any model is loaded

    def found(self) -> list[Recording]:
        """One for each row."""
        x = self._array(self.signals)
        if x.ndim != 3:
            raise MmsaeError(f"the array of {self.path} has the shape {x.shape}; give [recordings, channels, samples].")
        columns = {name: self._array(name) for name in self.labels}
        owners = None if self.subject is None else self._array(self.subject)
        named = dict(columns) if self.subject is None or owners is None else {**columns, self.subject: owners}
        for name, column in named.items():
            if column.shape != (len(x),):
                raise MmsaeError(f"{name!r} of {self.path} has the shape {column.shape}; give one value per recording.")
        seconds = x.shape[2] / self.array_rate
        return [
            Recording(
                f"{self.path}[{i}]",
                str(i) if owners is None else str(owners[i]),
                seconds,
                [],
                {name: str(column[i]) for name, column in columns.items()},
                i,
            )
            for i in range(len(x))
        ]

    def samples(self, recording: Recording) -> Samples:
        """A row of the array."""
        x = self._array(self.signals)[recording.key] * self.scale
        names = self._array(self.names).tolist() if isinstance(self.names, str) else self.names
        channels = [str(i) for i in range(len(x))] if names is None else [str(name) for name in names]
        if len(channels) != len(x):
            raise MmsaeError(f"{self.path} has {len(x)} channels and {len(channels)} names for them.")
        return Samples(x, self.array_rate, channels, self.unit)

    def _array(self, name: str) -> np.ndarray:
        if name in self._arrays:
            return self._arrays[name]
        path = Path(self.path)
        try:
            if path.suffix == ".npz":
                with np.load(path) as file:  # no pickles: they could run code
                    if name not in file.files:
                        raise MmsaeError(f"{path} has no array {name!r}; it has {', '.join(file.files)}.")
                    self._arrays[name] = file[name]
            elif name != self.signals:
                raise MmsaeError(f"{path} is a .npy file of one array: put {name!r} into a .npz file with it.")
            else:
                self._arrays[name] = np.load(path, mmap_mode="r")
        except MmsaeError:
            raise
        except Exception as error:  # any: no such file, truncated, not NumPy's
            raise MmsaeError(f"{path} is no .npy or .npz file ({first_line(error)}).") from error
        return self._arrays[name]

"""EDF and BDF recordings: EEG."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.signals import Recording, Samples, SignalWindows
from mmsae.errors import MmsaeError
from mmsae.sources.weights import first_line, needs

SUFFIXES = {".edf", ".bdf"}


class EDFRecordings(SignalWindows):
    """EDF, EDF+ and BDF files below a folder, in microvolts; their annotations are `label.event`.

    Channels of another rate than the fastest are brought to it; trailing dots of names are dropped.

    Args:
        root: The folder, or a single file.
        **kwargs: See `SignalWindows` and `ActivationDataModule`; `windows=events` cuts trials by their annotations.
    """

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        _ = self.recordings  # what is damaged must be told before any model is loaded

    def found(self) -> list[Recording]:
        """One for each file."""
        root = Path(self.root)
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise MmsaeError(f"data.root={self.root} holds no .edf or .bdf file.")
        return [self._recording(path) for path in files]

    def samples(self, recording: Recording) -> Samples:
        """Microvolts, `[C, T]`."""
        try:
            raw = _opened(recording.key)
            values = raw.get_data(units={"eeg": "uV"})
        except Exception as error:  # any: mne raises what its reader meets
            raise MmsaeError(f"the samples of {recording.key} cannot be read ({first_line(error)}).") from error
        return Samples(values, float(raw.info["sfreq"]), [name.rstrip(".") for name in raw.ch_names], "µV")

    def _recording(self, path: Path) -> Recording:
        _whole(path)
        try:
            raw = _opened(path)
        except MmsaeError:
            raise
        except Exception as error:  # any: see above
            raise MmsaeError(f"{path} is no EDF or BDF recording ({first_line(error)}).") from error
        seconds = raw.n_times / raw.info["sfreq"]
        notes = raw.annotations
        events = [
            [float(onset), min(float(onset + duration), seconds), str(name)]
            for onset, duration, name in zip(notes.onset, notes.duration, notes.description, strict=True)
            if duration > 0 and onset < seconds
        ]
        return Recording(str(path), self.subject_of(path.stem), seconds, events, {}, path)


def _opened(path: Path) -> Any:
    mne = needs("mne", "EDFRecordings", "signals")
    read = mne.io.read_raw_bdf if path.suffix.lower() == ".bdf" else mne.io.read_raw_edf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dates and filters that the header gives oddly
        return read(path, preload=False, verbose="error")


def _whole(path: Path) -> None:
    """Refuse a file whose header is damaged, or which is shorter than it says: mne would guess the length."""
    with path.open("rb") as file:
        head = file.read(256)
        try:
            n_records, n_signals = int(head[236:244]), int(head[252:256])
            fields = file.read(256 * n_signals)
            counts = [int(fields[216 * n_signals + 8 * i : 216 * n_signals + 8 * i + 8]) for i in range(n_signals)]
            header_bytes = int(head[184:192])
        except ValueError as error:
            raise MmsaeError(f"the header of {path} is damaged ({first_line(error)}).") from error
    width = 3 if path.suffix.lower() == ".bdf" else 2
    wanted, size = header_bytes + int(np.sum(counts)) * width * max(n_records, 0), path.stat().st_size
    if not counts or header_bytes != 256 * (n_signals + 1):
        raise MmsaeError(f"the header of {path} is damaged ({n_signals} signals in {header_bytes} bytes of header).")
    if size < wanted:
        raise MmsaeError(f"{path} is cut off: {wanted} bytes by its header, {size} there; fetch it again.")

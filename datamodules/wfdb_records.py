"""WFDB records: PhysioNet's ECGs and other recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.signals import Recording, Samples, SignalWindows
from mmsae.errors import MmsaeError
from mmsae.sources.weights import first_line, needs

BYTES = {"8": 1, "80": 1, "16": 2, "61": 2, "160": 2, "212": 1.5, "24": 3, "32": 4, "310": 4 / 3, "311": 4 / 3}
"""Of a sample, by format."""
BEATS = {
    "N": "normal", "L": "left bundle branch block", "R": "right bundle branch block", "B": "bundle branch block",
    "A": "atrial premature", "a": "aberrated atrial premature", "J": "nodal premature", "S": "supraventricular",
    "V": "ventricular", "r": "R-on-T", "F": "fusion", "e": "atrial escape", "j": "nodal escape",
    "n": "supraventricular escape", "E": "ventricular escape", "/": "paced", "f": "paced fusion", "Q": "unclassified",
    "?": "learning",
}  # fmt: skip
"""Annotation codes of beats; all others are no beats."""


class WFDBRecords(SignalWindows):
    """WFDB records below a folder (`.hea` with `.dat` or `.mat`), their beats or rhythms as `label.event`.

    Args:
        root: The folder, or a single `.hea` file.
        annotator: Suffix of the annotation files, `atr` mostly; "" reads none.
        annotations: "beats" makes an event of every beat, from halfway to the one before to halfway to the next;
            "rhythm" of every stretch of one rhythm.
        labels: Keys of header comments (`# Sex: Male`) that become labels; a comment of several codes (`# Dx: 1,2`)
            becomes one label for each code, `present` or `absent`.
        **kwargs: See `SignalWindows` and `ActivationDataModule`.
    """

    def __init__(
        self,
        root: str,
        annotator: str = "atr",
        annotations: Literal["beats", "rhythm"] = "beats",
        labels: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.annotator, self.annotations, self.labels = root, annotator, annotations, labels
        _ = self.recordings  # what is damaged must be told before any model is loaded

    def found(self) -> list[Recording]:
        """One for each header."""
        wfdb = needs("wfdb", "WFDBRecords", "signals")
        root = Path(self.root)
        heads = [root] if root.is_file() else sorted(root.rglob("*.hea"))
        alone = [p for p in sorted(root.rglob("*.dat")) if not _has_header(p)] if root.is_dir() else []
        if alone:
            raise MmsaeError(f"{alone[0]} has no header: put its .hea file beside it, or take it away.")
        if not heads:
            raise MmsaeError(f"data.root={self.root} holds no .hea file: give a folder of WFDB records.")
        read, comments = [], []
        for head in heads:
            try:
                header = wfdb.rdheader(str(head.with_suffix("")))
                seconds = header.sig_len / header.fs
                files = {name: (fmt, offset) for name, fmt, offset in zip(
                    header.file_name, header.fmt, header.byte_offset, strict=True)}  # fmt: skip
            except Exception as error:  # any: wfdb raises what its parser meets
                raise MmsaeError(f"{head} is no WFDB header of a single record ({first_line(error)}).") from error
            for name, (fmt, offset) in files.items():
                n = sum(k for k, file in zip(header.samps_per_frame, header.file_name, strict=True) if file == name)
                _whole(head.parent / name, str(fmt), n * header.sig_len, offset or 0)
            read.append((head, seconds, self._events(wfdb, head, header.fs, seconds)))
            comments.append({k.strip(): v.strip() for k, _, v in (c.partition(":") for c in header.comments)})
        labels = self._labels(comments, [head for head, *_ in read])
        return [
            Recording(str(head), self.subject_of(head.stem), seconds, events, own, head)
            for (head, seconds, events), own in zip(read, labels, strict=True)
        ]

    def samples(self, recording: Recording) -> Samples:
        """Physical units, `[C, T]`."""
        wfdb = needs("wfdb", "WFDBRecords", "signals")
        try:
            record = wfdb.rdrecord(str(recording.key.with_suffix("")))
            values = record.p_signal.T
        except Exception as error:  # any: see above
            raise MmsaeError(f"the samples of {recording.key} cannot be read ({first_line(error)}).") from error
        units = set(record.units)
        return Samples(values, float(record.fs), list(record.sig_name), units.pop() if len(units) == 1 else "mixed")

    def _events(self, wfdb: Any, head: Path, rate: float, seconds: float) -> list[list[Any]]:
        file = head.with_suffix(f".{self.annotator}")
        if not self.annotator or not file.is_file():
            return []
        try:
            found = wfdb.rdann(str(head.with_suffix("")), self.annotator)
        except Exception as error:  # any: see above
            raise MmsaeError(f"the annotations {file} cannot be read ({first_line(error)}).") from error
        if self.annotations == "rhythm":
            notes = [note.strip("\x00 ") for note in found.aux_note]
            starts = [(s / rate, note[1:]) for s, note in zip(found.sample, notes, strict=True) if note[:1] == "("]
            ends = [*(start for start, _ in starts[1:]), seconds]
            return [[start, end, name] for (start, name), end in zip(starts, ends, strict=False)]  # none: no rhythm
        beats = [(s / rate, BEATS[code]) for s, code in zip(found.sample, found.symbol, strict=True) if code in BEATS]
        if not beats:
            return []
        at = np.array([t for t, _ in beats])
        bounds = [max(at[0] - 0.4, 0), *((at[1:] + at[:-1]) / 2), min(at[-1] + 0.4, seconds)]
        return [[float(bounds[i]), float(bounds[i + 1]), name] for i, (_, name) in enumerate(beats)]

    def _labels(self, comments: list[dict[str, str]], heads: list[Path]) -> list[dict[str, str]]:
        found: list[dict[str, str]] = [{} for _ in heads]
        for key in self.labels or ():
            absent = [head for head, own in zip(heads, comments, strict=True) if key not in own]
            if absent:
                raise MmsaeError(f"{absent[0]} has no comment {key!r}: take it out of data.labels.")
            values = [own[key] for own in comments]
            codes = sorted({code.strip() for value in values for code in value.split(",")})
            for own, value in zip(found, values, strict=True):
                has = {code.strip() for code in value.split(",")}
                if any("," in other for other in values):
                    own.update({f"{key}:{code}": "present" if code in has else "absent" for code in codes})
                else:
                    own[key] = value
        return found


def _has_header(path: Path) -> bool:
    """Whether a header of that name is there, or any in the folder names the file."""
    return path.with_suffix(".hea").is_file() or any(
        path.name in head.read_text(errors="replace") for head in path.parent.glob("*.hea")
    )


def _whole(path: Path, fmt: str, n_samples: int, offset: int) -> None:
    """Refuse a file that is missing or shorter than its header says."""
    if not path.is_file():
        raise MmsaeError(f"the header names {path}, which is not there.")
    wanted, size = offset + int(BYTES.get(fmt, 0) * n_samples), path.stat().st_size
    if size < wanted:
        raise MmsaeError(f"{path} is cut off: {wanted} bytes by its header, {size} there; fetch it again.")

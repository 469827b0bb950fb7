"""Simulated 12-lead ECGs of known rhythm and morphology: a heart dipole in three dimensions, seen from twelve sides.

The closed form of the limit-cycle model of McSharry et al. (2003): every wave of a beat is a Gaussian in the phase of
the cardiac cycle. Every record is computed when it is asked for.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from mmsae.errors import MmsaeError, checked

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
CLASSES = ("normal", "fibrillation", "bundle branch block", "infarction", "ectopic")
FACTORS: dict[str, tuple[str, ...]] = {
    "class": CLASSES,
    "rhythm": ("sinus", "fibrillation", "ectopic"),
    "morphology": ("normal", "bundle branch block", "infarction"),
}
BEATS = ("normal", "ventricular")
RHYTHM, MORPHOLOGY = (0, 1, 0, 0, 2), (0, 0, 1, 2, 0)  # of each class
SPLITS = ("train", "val", "test")

P, Q, R, S, T = range(5)
PHASE = np.array([-1.2, -0.20, 0.0, 0.20, 1.6])  # rad; the peak of R is at 0
WIDTH = np.array([0.22, 0.07, 0.10, 0.09, 0.42])  # rad
DIPOLE = np.array([  # mV along x (left), y (down), z (back)
    [0.08, 0.10, 0.02], [-0.06, -0.08, 0.12], [0.75, 0.70, -0.25], [-0.10, -0.25, 0.45], [0.25, 0.22, -0.15],
])  # fmt: skip
VIEWS = {  # of the independent leads, after Dower
    "V1": (-0.515, 0.157, -0.917), "V2": (0.044, 0.164, -1.387), "V3": (0.882, 0.098, -1.277),
    "V4": (1.213, 0.127, -0.601), "V5": (1.125, 0.127, -0.086), "V6": (0.831, 0.076, 0.230),
    "I": (0.632, -0.235, 0.059), "II": (0.235, 1.066, -0.132),
}  # fmt: skip


def _projection() -> np.ndarray:
    """Leads from the dipole, [12, 3]; the limb leads obey Einthoven and Goldberger."""
    one, two = np.array(VIEWS["I"]), np.array(VIEWS["II"])
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.stack([*limb, *(np.array(VIEWS[f"V{i}"]) for i in range(1, 7))])


PROJECTION = _projection()


class Record(NamedTuple):
    """A simulated ECG.

    Attributes:
        signal: Millivolts, float32 `[12, samples]`, in the order of `LEADS`.
        labels: Factor to the index of its value in `FACTORS`.
        beats: `[start_s, end_s, name]` of every beat, halfway to its neighbours.
        heart_rate: Mean, per minute.
    """

    signal: np.ndarray
    labels: dict[str, int]
    beats: list[list[Any]]
    heart_rate: float


class ECGs(Dataset):
    """Simulated 12-lead ECGs with the class, rhythm and morphology of each; a pure function of split, seed and index.

    Args:
        split: Another split has other hearts.
        n: Number of records; every record is of a subject of its own.
        seed: Another seed gives other records.
        seconds: Length of a record.
        rate: Samples per second.
        noise: Share of the baseline wander and white noise that records have by default; 0 is a clean record.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"],
        n: int,
        seed: int = 0,
        seconds: float = 5.0,
        rate: int = 100,
        noise: float = 1.0,
    ) -> None:
        if split not in SPLITS:
            raise MmsaeError(f"The ECGs have no split {split!r}; they have {', '.join(SPLITS)}.")
        self.split = split
        self.n, self.seed = checked("n", n, 1), checked("seed", seed, 0)
        self.seconds, self.rate = checked("seconds", seconds, 1), checked("rate", rate, 50)
        self.noise = checked("noise", noise, 0)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.record(index)
        return {
            "signal": torch.from_numpy(record.signal),
            "rate": float(self.rate),
            "channels": LEADS,
            "unit": "mV",
            "events": record.beats,
            "labels": record.labels,
            "heart_rate": record.heart_rate,
            "subject": index % self.n,
            "offset_s": 0.0,
            "sample_id": index % self.n,
        }

    def record(self, index: int) -> Record:
        """One of them."""
        if not -self.n <= index < self.n:
            raise IndexError(f"There are {self.n} records, so there is none of index {index}.")
        draw = np.random.RandomState([self.seed, SPLITS.index(self.split), index % self.n])  # frozen for good
        return simulated(int(draw.randint(len(CLASSES))), draw, self.seconds, self.rate, self.noise)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All signals, float32 `[n, 12, samples]`, and their classes, int64 `[n]`."""
        records = [self.record(i) for i in range(self.n)]
        return np.stack([r.signal for r in records]), np.array([r.labels["class"] for r in records])


def simulated(kind: int, draw: np.random.RandomState, seconds: float, rate: int, noise: float) -> Record:
    """A record of the class `CLASSES[kind]`."""
    name = CLASSES[kind]
    peaks, ectopic = _peaks(name, draw, seconds)
    middles = (peaks[1:] + peaks[:-1]) / 2
    t = np.arange(round(seconds * rate)) / rate
    beat = np.searchsorted(middles, t)  # the peak that is nearest
    side = np.where(t < peaks[beat], beat - 1, beat)  # the interval between two peaks that t lies in
    phase = 2 * np.pi * (t - peaks[beat]) / np.diff(peaks)[side]

    amplitude = draw.lognormal(0, 0.15, 5)
    late = 0.04 * draw.standard_normal(5)
    ordinary = _waves(name)
    waves = [ordinary, _ventricular()] if ectopic.any() else [ordinary]
    dipole = np.zeros((len(t), 3))
    for number, (where, width, size) in enumerate(waves):
        scale = np.append(amplitude, np.ones(len(where) - 5))
        where = where + np.append(late, np.zeros(len(where) - 5))
        away = (phase[:, None] - where + np.pi) % (2 * np.pi) - np.pi
        shape = np.exp(-(away**2) / (2 * width**2)) @ (scale[:, None] * size)
        dipole += np.where((ectopic[beat] == bool(number))[:, None], shape, 0)
    if name == "fibrillation":
        f, start = draw.uniform(4.5, 8), draw.uniform(0, 2 * np.pi, 3)
        dipole += 0.04 * np.sin(2 * np.pi * f * t[:, None] + start)

    turned = dipole @ _rotation(0.25 * draw.standard_normal(3)).T * draw.lognormal(0, 0.2)
    signal = PROJECTION @ turned.T
    slow, start = draw.uniform(0.1, 0.35, 12), draw.uniform(0, 2 * np.pi, 12)
    wander = 0.10 * draw.standard_normal(12)[:, None] * np.sin(2 * np.pi * slow[:, None] * t + start[:, None])
    signal = signal + noise * (wander + 0.03 * draw.standard_normal(signal.shape))

    labels = {"class": kind, "rhythm": RHYTHM[kind], "morphology": MORPHOLOGY[kind]}
    bounds = np.clip(np.concatenate([[0], middles, [seconds]]), 0, seconds)
    beats = [
        [float(a), float(b), BEATS[int(e)]] for a, b, e in zip(bounds[:-1], bounds[1:], ectopic, strict=True) if b > a
    ]
    return Record(signal.astype(np.float32), labels, beats, float(60 / np.diff(peaks).mean()))


def _peaks(name: str, draw: np.random.RandomState, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Times of the R peaks, s, from before the start to behind the end, and which beats are ventricular."""
    mean = 60 / (draw.uniform(70, 110) if name == "fibrillation" else draw.uniform(55, 100))
    t = -mean * (1 + draw.uniform())
    peaks: list[float] = []
    ectopic: list[bool] = []
    while not peaks or peaks[-1] < seconds + 1:
        peaks.append(t)
        if name == "fibrillation":
            interval = mean * draw.lognormal(0, 0.18)
        else:
            breath = 0.03 * np.sin(2 * np.pi * 0.1 * t) + 0.03 * np.sin(2 * np.pi * 0.25 * t)
            interval = mean * (1 + breath) * (1 + 0.01 * draw.standard_normal())
        early = draw.uniform() < 0.25
        ectopic.append(name == "ectopic" and bool(early) and not (ectopic and ectopic[-1]))
        t += interval
    found = np.array(ectopic)
    times = np.array(peaks)
    if name == "ectopic" and not (found & (times > 0.5) & (times < seconds - 0.5)).any():
        inside = np.flatnonzero((times > 0.5) & (times < seconds - 0.5))
        found[inside[len(inside) // 2]] = True  # the label would be wrong
    intervals = np.diff(times)
    for i in np.flatnonzero(found):  # it comes after .65 of the interval, the next one after 1.3
        if 0 < i < len(intervals):
            intervals[i - 1], intervals[i] = 0.65 * intervals[i - 1], 1.3 * intervals[i]
    return np.concatenate([times[:1], times[0] + np.cumsum(intervals)]), found


def _waves(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Phases, widths and dipoles of the waves of an ordinary beat."""
    where, width, size = PHASE.copy(), WIDTH.copy(), DIPOLE.copy()
    if name == "fibrillation":
        size[P] = 0
    elif name == "bundle branch block":
        width[[Q, R, S]] *= 2
        size[S] *= (-1.5, 0.6, -0.9)
        where[S] += 0.25
        size[T] *= -0.8
    elif name == "infarction":  # the raised stretch between S and T
        where, width = np.append(where, 0.75), np.append(width, 0.40)
        size = np.vstack([size, (0.12, 0.02, -0.34)])
    return where, width, size


def _ventricular() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of a beat that starts in a ventricle: no P, broad and turned."""
    width, size = WIDTH.copy(), DIPOLE.copy()
    size[[P, Q]] = 0
    size[R] = -1.3 * size[R] + (0.2, 0.3, -0.4)
    width[[Q, R, S]] *= 2.6
    size[S] *= 1.4
    size[T] *= -1.3
    return PHASE.copy(), width, size


def _rotation(angles: np.ndarray) -> np.ndarray:
    (a, b, c), (d, e, f) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, a, -d], [0, d, a]])
    about_y = np.array([[b, 0, e], [0, 1, 0], [-e, 0, b]])
    about_z = np.array([[c, -f, 0], [f, c, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def probe_auc(
    features: np.ndarray, labels: np.ndarray, n_train: int = 200, seeds: tuple[int, ...] = (0, 1, 2), C: float = 1.0
) -> float:
    """Macro area under the ROC curve of a logistic regression on `n_train` records, measured on all others.

    Args:
        features: `[n, d]`, one row for each record.
        labels: Classes, int `[n]`.
        n_train: Records that the regression sees; those of all classes in their shares.
        seeds: Of the choice of these records; the mean over them is returned.
        C: Inverse strength of the L2 penalty.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = []
    for seed in seeds:
        x, x_test, y, y_test = train_test_split(
            features, labels, train_size=n_train, random_state=seed, stratify=labels
        )
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000)).fit(x, y)
        score = model.predict_proba(x_test)
        score = score[:, 1] if score.shape[1] == 2 else score
        found.append(roc_auc_score(y_test, score, multi_class="ovr", average="macro"))
    return float(np.mean(found))

"""Simulated sessions of a wristband (Empatica E4): movement, pulse, skin conductance and temperature of known causes.

What one of the causes does is written where it is done; sizes are those of real sessions, in rough. Every window is
computed when it is asked for.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from mmsae.errors import MmsaeError, checked

CHANNELS = ("ACC_x", "ACC_y", "ACC_z", "BVP", "EDA", "TEMP")
UNIT = "g, µS, °C"
FACTORS: dict[str, tuple[str, ...]] = {
    "activity": ("still", "gesturing", "walking", "running"),
    "arousal": ("calm", "stressed"),
    "posture": ("hanging", "resting", "raised"),
    "pulse": ("slow", "middle", "fast"),
}
EVENTS = ("movement", "skin response")
SPLITS = ("train", "val", "test")
PULSE_LIMITS = (75.0, 100.0)  # per minute: slow below, fast above
GRAVITY = {"hanging": (0.95, 0.20, -0.10), "resting": (0.10, 0.05, 0.98), "raised": (-0.90, 0.15, 0.25)}  # g
STEPS = {"walking": (1.5, 2.2, 0.30), "running": (2.4, 3.2, 0.95)}  # lowest and highest rate, Hz; g
FASTER = {"still": 0.0, "gesturing": 4.0, "walking": 18.0, "running": 50.0}  # beats per minute
STRESS = 14.0  # beats per minute
VARIABILITY = {"calm": 0.05, "stressed": 0.02}  # of the intervals between beats
RESPONSES = {"calm": 0.04, "stressed": 0.15}  # of the skin, per second
RISE, FALL = 0.7, 4.0  # s, of one response
BURSTS = 0.25  # gestures per second
WINDOWS = 8  # of each wearer


class Window(NamedTuple):
    """A simulated window.

    Attributes:
        signal: float32 `[6, samples]`, in the order of `CHANNELS`: g, arbitrary units (BVP), microsiemens, degrees
            Celsius.
        labels: Factor to the index of its value in `FACTORS`.
        events: `[start_s, end_s, name]` of movements and of responses of the skin.
        heart_rate: Mean, per minute.
    """

    signal: np.ndarray
    labels: dict[str, int]
    events: list[list[Any]]
    heart_rate: float


class Wristbands(Dataset[dict[str, Any]]):
    """Simulated E4 windows with what the wearer did; a pure function of split, seed and index.

    Eight windows in a row are of one wearer, who has a pulse, a skin and a way to wear the band of their own; wearers
    of another split are other people.

    Args:
        split: Which wearers.
        n: Number of windows.
        seed: Another seed gives other wearers.
        seconds: Length of a window.
        rate: Samples per second of all channels.
        noise: Share of the sensors' noise and of the movement artefacts of the pulse.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"],
        n: int,
        seed: int = 0,
        seconds: float = 32.0,
        rate: int = 32,
        noise: float = 1.0,
    ) -> None:
        if split not in SPLITS:
            raise MmsaeError(f"The wristbands have no split {split!r}; they have {', '.join(SPLITS)}.")
        self.split = split
        self.n, self.seed = checked("n", n, 1), checked("seed", seed, 0)
        self.seconds, self.rate = checked("seconds", seconds, 4), checked("rate", rate, 8)
        self.noise = checked("noise", noise, 0)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        window = self.window(index)
        return {
            "signal": torch.from_numpy(window.signal),
            "rate": float(self.rate),
            "channels": CHANNELS,
            "unit": UNIT,
            "events": window.events,
            "labels": window.labels,
            "heart_rate": window.heart_rate,
            "subject": index % self.n // WINDOWS,
            "offset_s": index % self.n % WINDOWS * self.seconds,
            "sample_id": index % self.n,
        }

    def window(self, index: int) -> Window:
        """One of them."""
        if not -self.n <= index < self.n:
            raise IndexError(f"There are {self.n} windows, so there is none of index {index}.")
        key, index = [self.seed, SPLITS.index(self.split)], index % self.n
        wearer = Wearer.drawn(np.random.RandomState([*key, index // WINDOWS, 1]))  # frozen for good
        return simulated(wearer, np.random.RandomState([*key, index, 2]), self.seconds, self.rate, self.noise)

    def arrays(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """All signals, float32 `[n, 6, samples]`, and the values of every factor, int64 `[n]` each."""
        windows = [self.window(i) for i in range(self.n)]
        labels = {factor: np.array([w.labels[factor] for w in windows]) for factor in FACTORS}
        return np.stack([w.signal for w in windows]), labels


class Wearer(NamedTuple):
    """What stays the same in all windows of a person.

    Attributes:
        pulse: At rest, per minute.
        pressure: Size of a pulse wave.
        conductance: Of the skin at rest, microsiemens.
        warmth: Of the skin, degrees Celsius.
        tilt: How the band sits, rotation `[3, 3]`.
    """

    pulse: float
    pressure: float
    conductance: float
    warmth: float
    tilt: np.ndarray

    @classmethod
    def drawn(cls, draw: np.random.RandomState) -> Wearer:
        """Somebody."""
        pulse, size = 66 + 6 * draw.standard_normal(), 120 * draw.lognormal(0, 0.4)
        skin, warmth = draw.lognormal(-0.5, 0.8), 33.5 + 1.2 * draw.standard_normal()
        return cls(pulse, size, skin, warmth, _turned(0.2 * draw.standard_normal(3)))


def simulated(wearer: Wearer, draw: np.random.RandomState, seconds: float, rate: int, noise: float) -> Window:
    """A window of a wearer; activity, arousal and posture are independent of one another."""
    value = {factor: int(draw.randint(len(FACTORS[factor]))) for factor in ("activity", "arousal", "posture")}
    activity, arousal, posture = (FACTORS[factor][value[factor]] for factor in ("activity", "arousal", "posture"))
    t = np.arange(round(seconds * rate)) / rate
    acc, moves = _movement(activity, posture, wearer, draw, t)
    mean = wearer.pulse + FASTER[activity] + STRESS * (arousal == "stressed") + 3 * draw.standard_normal()
    wave, heart_rate = _pulse(mean, VARIABILITY[arousal], draw, t)
    shaken = np.gradient(np.linalg.norm(acc, axis=0)) * rate  # g/s: the sensor slips on the skin
    size = wearer.pressure * (0.7 if arousal == "stressed" else 1.0)
    bvp = size * (wave + noise * (0.06 * shaken + 0.05 * draw.standard_normal(len(t))))
    eda, responses = _skin(arousal, wearer, draw, t)
    drift = 0.002 * draw.standard_normal() - (0.001 if arousal == "stressed" else 0.0)  # degrees per second
    temp = wearer.warmth + 0.3 * draw.standard_normal() + drift * t
    acc = acc + noise * 0.01 * draw.standard_normal(acc.shape)
    eda = eda + noise * 0.004 * draw.standard_normal(len(t))
    temp = temp + noise * 0.02 * draw.standard_normal(len(t))
    labels = {**value, "pulse": int(np.searchsorted(PULSE_LIMITS, heart_rate))}
    signal = np.concatenate([acc, bvp[None], eda[None], temp[None]]).astype(np.float32)
    return Window(signal, labels, sorted(moves + responses), heart_rate)


def _movement(
    activity: str, posture: str, wearer: Wearer, draw: np.random.RandomState, t: np.ndarray
) -> tuple[np.ndarray, list[list[Any]]]:
    """Acceleration in g `[3, T]`: gravity along the arm's direction, and steps or gestures."""
    down = wearer.tilt @ np.array(GRAVITY[posture]) + 0.05 * draw.standard_normal(3)
    acc = np.repeat((down / np.linalg.norm(down))[:, None], len(t), 1)
    if activity in STEPS:
        low, high, size = STEPS[activity]
        phase = 2 * np.pi * draw.uniform(low, high) * t + draw.uniform(0, 2 * np.pi)
        way = draw.standard_normal(3)
        swing = np.outer(draw.standard_normal(3), np.sin(phase / 2))  # the arm, at half the rate of the steps
        steps = np.outer(way / np.linalg.norm(way), np.sin(phase) + 0.4 * np.sin(2 * phase + 1))
        return acc + size * draw.uniform(0.8, 1.2) * (steps + 0.25 * swing), []
    events: list[list[Any]] = []
    if activity == "gesturing":
        for start in np.flatnonzero(draw.uniform(size=int(t[-1]) + 1) < BURSTS):
            length = draw.uniform(0.6, 1.8)
            inside = (t >= start) & (t < start + length)
            window = np.sin(np.pi * (t - start) / length) * inside
            wiggle = np.sin(2 * np.pi * draw.uniform(1, 4) * t + draw.uniform(0, 2 * np.pi))
            acc = acc + 0.5 * np.outer(draw.standard_normal(3), window * wiggle)
            events.append([float(start), float(min(start + length, t[-1])), EVENTS[0]])
    return acc, events


def _pulse(mean: float, variability: float, draw: np.random.RandomState, t: np.ndarray) -> tuple[np.ndarray, float]:
    """Pulse waves of size 1 `[T]`, breathing in their height, and the mean rate per minute."""
    beats, interval = [-2.0], 60 / mean
    while beats[-1] < t[-1] + 2:
        breath = 0.6 * np.sin(2 * np.pi * 0.25 * beats[-1])
        beats.append(beats[-1] + interval * (1 + variability * (breath + 0.6 * draw.standard_normal())))
    times = np.array(beats)
    beat = np.searchsorted(times, t, side="right") - 1
    phase = (t - times[beat]) / np.diff(times)[beat]
    shape = np.exp(-((phase - 0.2) ** 2) / (2 * 0.08**2)) + 0.45 * np.exp(-((phase - 0.55) ** 2) / (2 * 0.11**2))
    height = 1 + 0.15 * np.sin(2 * np.pi * 0.25 * t + draw.uniform(0, 2 * np.pi))
    inside = (times >= 0) & (times <= t[-1])
    return height * shape - 0.35, float(60 / np.diff(times[inside]).mean())


def _skin(
    arousal: str, wearer: Wearer, draw: np.random.RandomState, t: np.ndarray
) -> tuple[np.ndarray, list[list[Any]]]:
    """Conductance in microsiemens `[T]`: a slow level and responses that rise fast and fall slowly."""
    level = wearer.conductance * (1.25 if arousal == "stressed" else 1.0)
    eda = level * (1 + 0.02 * draw.standard_normal() + 0.001 * draw.standard_normal() * t)
    events: list[list[Any]] = []
    seconds = np.arange(-8, int(t[-1]) + 1)  # those that began before are still falling
    for start in seconds[draw.uniform(size=len(seconds)) < RESPONSES[arousal]]:
        since = np.clip(t - start, 0, None)
        eda = eda + level * 0.25 * draw.lognormal(0, 0.4) * (np.exp(-since / FALL) - np.exp(-since / RISE))
        if start >= 0:
            events.append([float(start), float(min(start + FALL, t[-1])), EVENTS[1]])
    return eda, events


def _turned(angles: np.ndarray) -> np.ndarray:
    """A rotation by small angles about the three axes."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix

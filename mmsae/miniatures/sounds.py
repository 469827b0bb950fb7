"""Captioned sounds with known factors: an instrument of some pitch, played in some rhythm, over some noise.

Every sound is computed when it is asked for; nothing is recorded or downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from mmsae.errors import MmsaeError, checked, nearest

RATE = 16_000  # samples per second
SECONDS = 2
FACTORS: dict[str, tuple[str, ...]] = {
    "timbre": ("whistle", "buzzer", "clarinet", "bell", "string", "voice"),
    "pitch": ("deep", "low", "middle", "high", "piercing"),
    "rhythm": ("held", "slow", "quick", "early", "late"),
    "loudness": ("faint", "loud"),
    "noise": ("clean", "hiss", "rumble", "crackle"),
}
PHRASES = {
    "rhythm": {
        "held": ("in one long note", "held throughout"),
        "slow": ("repeated slowly", "in slow pulses"),
        "quick": ("repeated quickly", "in quick pulses"),
        "early": ("once at the start", "only at the beginning"),
        "late": ("once at the end", "only near the end"),
    },
    "noise": {
        "clean": ("in silence", "without noise"),
        "hiss": ("with hiss", "over hiss"),
        "rumble": ("with rumble", "over rumble"),
        "crackle": ("with crackle", "over crackle"),
    },
}
OPENINGS = ("", "the sound of ", "this is ")
FUNDAMENTAL = {"deep": 95.0, "low": 190.0, "middle": 380.0, "high": 760.0, "piercing": 1520.0}  # Hz, lowest of the band
BAND = 1.4  # highest of the band, as a multiple: the bands do not touch
LEVEL = {"faint": 0.012, "loud": 0.12}  # root mean square of a note
NOTES = {"held": 1, "slow": 4, "quick": 12, "early": 1, "late": 1}  # in two seconds
SPLITS = ("train", "val", "test")

# One number for each name; append only, or every sound changes.
DRAWS = (
    *FACTORS, "fundamental", "level", "vibrato", "vibrato rate", "brightness", "decay", "onset", "gap", "tempo",
    "phase", "noise level", "noise colour", "vowel", "short", "single", *(f"say {factor}" for factor in FACTORS),
    "opening", "say rhythm how", "say noise how",
)  # fmt: skip


class Sounds(Dataset[dict[str, Any]]):
    """Sounds of two seconds at 16 kHz with a caption and the value of every factor; a pure function of its arguments.

    Args:
        split: The splits have other random numbers: exact pitches, onsets, noises, loudness.
        n: Number of sounds.
        seed: Another seed gives other sounds.
    """

    def __init__(self, split: Literal["train", "val", "test"], n: int, seed: int = 0) -> None:
        if split not in SPLITS:
            raise MmsaeError(f"The sounds have no split {split!r}; they have {', '.join(SPLITS)}.")
        self.split = split
        self.n = checked("n", n, 1)
        self.seed = checked("seed", seed, 0)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        draws, labels, noise = self._sound(index)
        return {
            "audio": _play(draws, labels, noise),
            "rate": RATE,
            "text": compose(_stated(draws, labels), *_wording(draws)),
            "sample_id": int(index) % self.n,
            "labels": labels,
        }

    def captions(self) -> list[str]:
        """The captions of all sounds, without playing them."""
        known = (self._sound(i)[:2] for i in range(self.n))
        return [compose(_stated(draws, labels), *_wording(draws)) for draws, labels in known]

    def labels(self) -> dict[str, np.ndarray]:
        """The factors of all sounds, without playing them: name to int64 [n], indices into `FACTORS[name]`."""
        rows = [self._sound(i)[1] for i in range(self.n)]
        return {factor: np.array([row[factor] for row in rows]) for factor in FACTORS}

    def _sound(self, index: int) -> tuple[dict[str, float], dict[str, int], np.random.Philox]:
        """Random numbers in [0, 1), the labels, and the generator of the noise.

        The raw stream of a bit generator is the same in every version of numpy; its distributions are not.
        """
        if not -self.n <= index < self.n:
            raise IndexError(f"There are {self.n} sounds, so there is none of index {index}.")
        stream = np.random.Philox(key=np.array([self.seed * 3 + SPLITS.index(self.split), index % self.n], np.uint64))
        draws = dict(zip(DRAWS, _uniform(stream, len(DRAWS)).tolist(), strict=True))
        return draws, {f: int(draws[f] * len(values)) for f, values in FACTORS.items()}, stream


def compose(stated: Mapping[str, int], opening: int = 0, rhythm: int = 0, noise: int = 0) -> str:
    """Write the caption that states exactly the given facts.

    Args:
        stated: Factor name to index of its value; factors left out are not mentioned.
        opening: Which of `OPENINGS` to begin with.
        rhythm: Which of the two phrases in `PHRASES["rhythm"]`.
        noise: Which of the two phrases in `PHRASES["noise"]`.
    """
    words = {factor: FACTORS[factor][value] for factor, value in stated.items()}
    noun = " ".join([*(words[f] for f in ("loudness", "pitch") if f in words), words.get("timbre", "sound")])
    said = [PHRASES[f][words[f]][i] for f, i in (("rhythm", rhythm), ("noise", noise)) if f in words]
    return " ".join([f"{OPENINGS[opening]}a {noun}", *said])


def mentions(caption: str) -> dict[str, int]:
    """The facts that a caption states: factor name to index into `FACTORS[factor]`."""
    said = caption.lower()
    stated = {}
    for factor, values in FACTORS.items():
        for index, value in enumerate(values):
            phrases = PHRASES[factor][value] if factor in PHRASES else (value,)
            if re.search(rf"\b({'|'.join(phrases)})\b", said):
                stated[factor] = index
    return stated


def zero_shot_prompts(factor: str) -> list[str]:
    """One prompt for each value of a factor, in the order of `FACTORS[factor]`."""
    if factor not in FACTORS:
        raise MmsaeError(f"The sounds have no factor {factor!r}; nearest: {nearest(factor, FACTORS)}.")
    return [compose({factor: index}) for index in range(len(FACTORS[factor]))]


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted."""
    phrases = [*OPENINGS, "a sound", *(v for f in ("timbre", "pitch", "loudness") for v in FACTORS[f])]
    phrases += [phrase for values in PHRASES.values() for pair in values.values() for phrase in pair]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _uniform(stream: np.random.Philox, n: int) -> np.ndarray:
    return (stream.random_raw(n) >> np.uint64(11)) * 2.0**-53


def _stated(draws: dict[str, float], labels: dict[str, int]) -> dict[str, int]:
    """About half the captions state one fact, the others a random subset of them."""
    if draws["short"] < 0.45:
        said = [list(FACTORS)[int(draws["single"] * len(FACTORS))]]
    else:
        said = [f for f in FACTORS if draws[f"say {f}"] < 0.6] or ["timbre"]
    return {f: labels[f] for f in said}


def _wording(draws: dict[str, float]) -> tuple[int, int, int]:
    return int(draws["opening"] * len(OPENINGS)), int(draws["say rhythm how"] * 2), int(draws["say noise how"] * 2)


def _play(draws: dict[str, float], labels: dict[str, int], stream: np.random.Philox) -> np.ndarray:
    """The samples, float32 [RATE * SECONDS] in -1..1."""
    value = {f: FACTORS[f][i] for f, i in labels.items()}
    time = np.arange(RATE * SECONDS) / RATE
    frequency = FUNDAMENTAL[value["pitch"]] * BAND ** draws["fundamental"]
    wobble = 0.004 * draws["vibrato"] / (4 + 3 * draws["vibrato rate"])  # turns, as a share of the frequency
    turns = frequency * (time + wobble * np.sin(2 * np.pi * (4 + 3 * draws["vibrato rate"]) * time))
    since, sounding = _notes(value["rhythm"], draws, time)
    tone = _tone(value["timbre"], draws, turns, since, frequency)
    tone = tone * np.clip(since / 0.008, 0, 1) * sounding  # without a click at the onset
    level = LEVEL[value["loudness"]] * 2 ** (1.2 * draws["level"] - 0.6)
    loud = sounding > 0.5
    tone *= level / max(float(np.sqrt(np.mean(tone[loud] ** 2))), 1e-9)
    # noise has a level of its own, or it would tell the loudness of the tone
    noise = _noise(value["noise"], draws, stream) * 0.012 * 2 ** (2 * draws["noise level"] - 1)
    return np.clip(tone + noise, -1, 1).astype(np.float32)


def _notes(rhythm: str, draws: dict[str, float], time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seconds since the onset of the running note (0 before the first), and how far it sounds, 0 to 1."""
    n = NOTES[rhythm]
    if rhythm in ("early", "late"):
        onset = (0.05 if rhythm == "early" else 1.15) + 0.2 * draws["onset"]
        since, length = time - onset, 0.45 + 0.15 * draws["gap"]
    elif n == 1:
        since, length = time + 0.02, np.inf
    else:
        period = SECONDS / n * (0.9 + 0.2 * draws["tempo"])
        since, length = (time + draws["onset"] * period) % period, period * (0.5 + 0.15 * draws["gap"])
    sounding = np.clip((length - since) / 0.02, 0, 1) * (since >= 0)
    return np.maximum(since, 0), sounding


def _tone(timbre: str, draws: dict[str, float], turns: np.ndarray, since: np.ndarray, frequency: float) -> np.ndarray:
    bright, decay = draws["brightness"], draws["decay"]
    if timbre == "bell":  # partials that are no multiples, the higher ones gone sooner
        partials = ((0.56, 1.0), (0.92, 0.67), (1.19, 1.0), (1.71, 1.4), (2.0, 1.3), (2.74, 0.9))
        wave = np.zeros_like(turns)
        for ratio, weight in partials:
            if ratio * frequency < RATE / 2:
                wave += weight * np.exp(-since * ratio * (1.5 + 2 * decay)) * np.sin(2 * np.pi * ratio * turns)
        return wave
    n = int(RATE / 2 / (frequency * 1.02))
    order = np.arange(1, n + 1)
    weights: np.ndarray
    if timbre == "whistle":
        weights = np.where(order == 1, 1.0, np.where(order == 2, 0.05 + 0.05 * bright, 0.0))
    elif timbre == "buzzer":
        weights = order ** -(0.6 + 0.4 * bright)
    elif timbre == "clarinet":  # odd harmonics
        weights = np.where(order % 2 == 1, order ** -(0.9 + 0.4 * bright), 0.02)
    elif timbre == "string":
        weights = order ** -(1.3 + 0.4 * bright)
        return _periodic(weights, turns + draws["phase"]) * np.exp(-since * (5 + 5 * decay))
    else:  # a voice: formants over a buzz; above them only what the slopes leave
        first, second = (730, 1090) if draws["vowel"] < 0.5 else (300, 2300)
        formants = ((first, 90.0), (second, 120.0), (2700.0, 180.0))
        hertz = order * frequency
        peaks = [1 / (1 + ((hertz - centre * (0.95 + 0.1 * bright)) / width) ** 2) for centre, width in formants]
        weights = sum(peaks) * order**-0.5 + 0.01 / order
        flutter = 1 + 0.35 * np.sin(2 * np.pi * 5.5 * since)  # tremolo, which tells it where few harmonics are left
        return _periodic(weights, turns + draws["phase"]) * flutter
    return _periodic(weights, turns + draws["phase"])


def _periodic(weights: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """The wave with these harmonics at these phases, in turns."""
    spectrum = np.zeros(1025, complex)
    spectrum[1 : min(len(weights), 1024) + 1] = -1j * np.asarray(weights)[:1024]
    table = np.fft.irfft(spectrum)
    return table[(turns % 1 * 2048).astype(np.intp) % 2048]


def _noise(kind: str, draws: dict[str, float], stream: np.random.Philox) -> np.ndarray:
    """Of root mean square 1, but for clicks and silence."""
    n = RATE * SECONDS
    if kind == "clean":
        return np.zeros(n)
    white = _uniform(stream, n) - 0.5
    if kind == "crackle":
        clicks = np.where(np.abs(white) > 0.5 - 0.0004 - 0.0004 * draws["noise colour"], np.sign(white), 0.0)
        return 12 * np.convolve(clicks, np.exp(-np.arange(64) / 12) * np.cos(np.arange(64) * 0.9))[:n]
    shaped = np.fft.rfft(white) * _slope(kind)
    found = np.fft.irfft(shaped)
    return found / np.sqrt(np.mean(found**2))


@lru_cache
def _slope(kind: str) -> np.ndarray:
    hertz = np.fft.rfftfreq(RATE * SECONDS, 1 / RATE)
    if kind == "rumble":
        return 1 / (1 + (hertz / 120) ** 2)
    return hertz / (hertz + 2000)

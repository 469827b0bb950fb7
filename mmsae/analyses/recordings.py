"""Sounds and signals made small enough for a page: excerpts, 16-bit samples, spectrograms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image
from scipy import signal

from mmsae.analyses.encoded import base64_of, picture_of

AUDIO_RATE = 16_000
"""Highest sampling rate of the sound on the page, Hz."""
SIGNAL_RATE = 256
"""Highest sampling rate of the traces on the page, Hz: some three points per screen pixel at 25 mm/s."""
COLUMNS, BANDS = 320, 96
"""Largest number of time frames of a spectrogram's picture, and its number of frequency bands."""
DECIBELS = 70.0
"""From the loudest point of a spectrogram to black."""
MISSING = -32768
"""The level that stands for a missing value of a trace."""


def length_of(medium: dict[str, Any]) -> float | None:
    """Seconds of what the datamodule rendered; None for what is not a recording."""
    if medium["kind"] == "audio":
        return len(medium["samples"]) / medium["rate"]
    if medium["kind"] == "signal":
        return np.shape(medium["values"])[1] / medium["rate"]
    return None


def excerpt(total: float | None, seconds: float, window: tuple[float, float] | None) -> float:
    """Where an excerpt begins, whole seconds where it can: the window in its middle, or at its begin if it is longer.

    Args:
        total: Length of the recording in seconds, None if it has none.
        seconds: Longest excerpt.
        window: Begin and length, seconds.
    """
    if total is None or total <= seconds or window is None:
        return 0.0
    begin, length = window
    start = begin if length >= seconds else math.floor(begin + length / 2 - seconds / 2)
    if length < seconds < begin + length - start:
        start = begin + length - seconds  # rounding down must not cut the window's end off
    return min(max(start, 0.0), total - seconds)


def audio(medium: dict[str, Any], start: float, seconds: float) -> dict[str, Any]:
    """Sound as 16-bit samples, and the picture of its spectrogram on the mel scale."""
    rate = int(medium["rate"])
    samples = np.asarray(medium["samples"], dtype=np.float32).ravel()
    total = len(samples) / rate
    samples = np.nan_to_num(samples[round(start * rate) : round((start + seconds) * rate)])
    heard, heard_rate = samples, rate
    if rate > AUDIO_RATE:
        divisor = math.gcd(rate, AUDIO_RATE)
        heard, heard_rate = signal.resample_poly(samples, AUDIO_RATE // divisor, rate // divisor), AUDIO_RATE
    return {
        "kind": "audio",
        "text": str(medium.get("text", "")),
        "pcm": base64_of(np.round(np.clip(heard, -1, 1) * 32767).astype("<i2")),
        "rate": heard_rate,
        "seconds": len(samples) / rate,
        "start_ms": round(1000 * start),
        "total": total,
        "spectrogram": picture_of(Image.fromarray(spectrogram(samples, rate))),
        "top_hz": rate // 2,
        "mel_hz": [float(hz) for hz in medium.get("mel_hz") or ()],
    }


def mel(hz: np.ndarray | float) -> np.ndarray:
    """Mels of frequencies (O'Shaughnessy's formula)."""
    return 2595 * np.log10(1 + np.asarray(hz) / 700)


def spectrogram(samples: np.ndarray, rate: int) -> np.ndarray:
    """Levels `[BANDS, frames]` of a sound, uint8: highest band first, mel scale from 0 to half the rate, decibels."""
    width = max(64, 2 ** round(math.log2(0.032 * rate)))
    padded = np.pad(samples, width // 2)
    hop = max(1, math.ceil(len(samples) / COLUMNS), width // 8)
    overlap = max(width - hop, 0)
    power = signal.spectrogram(padded, rate, nperseg=width, noverlap=overlap)[2]  # [bins, frames]
    edges = 700 * (10 ** (np.linspace(0, mel(rate / 2), BANDS + 1) / 2595) - 1)
    low = np.minimum(np.floor(edges[:-1] / rate * width).astype(int), len(power) - 1)
    high = np.clip(np.ceil(edges[1:] / rate * width).astype(int), low + 1, len(power))
    bands = np.stack([power[a:b].mean(0) for a, b in zip(low, high, strict=True)])
    loudest = bands.max(initial=0)
    if loudest <= 0:
        return np.zeros(bands.shape, np.uint8)
    decibels = 10 * np.log10(np.maximum(bands / loudest, 1e-12))
    return np.round(255 * np.clip(1 + decibels / DECIBELS, 0, 1)).astype(np.uint8)[::-1]


def trace(medium: dict[str, Any], start: float, seconds: float) -> dict[str, Any]:
    """Traces as 16-bit levels, each with its own offset and step."""
    rate = float(medium["rate"])
    whole = np.asarray(medium["values"], dtype=np.float64)
    first = round(start * rate)
    values = whole[:, first : first + round(seconds * rate)]
    length = values.shape[1] / rate
    down = math.ceil(rate / SIGNAL_RATE)
    if down > 1:
        gaps = not np.isfinite(values).all()  # a filter would spread what is missing
        values = values[:, ::down] if gaps else signal.resample_poly(values, 1, down, axis=1, padtype="line")
    offset, step, levels = quantised(values)
    channels = [str(name) for name in medium.get("channels") or range(len(values))]
    events = [
        [begin - start, end - start, str(name)]
        for begin, end, name in medium.get("events") or ()
        if end >= start and begin <= start + length
    ]
    return {
        "kind": "signal",
        "text": str(medium.get("text", "")),
        "channels": channels,
        "unit": str(medium.get("unit", "")),
        "levels": base64_of(levels.astype("<i2")),
        "offset": base64_of(offset.astype("<f4")),
        "step": base64_of(step.astype("<f4")),
        "seconds": length,
        "hz": rate / down,
        "start_ms": round(1000 * start),
        "total": whole.shape[1] / rate,
        "events": events,
    }


def quantised(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset and step `[C]`, float32, and int16 levels `[C, T]`: `offset + step * level`, or missing at `MISSING`."""
    known = np.where(np.isfinite(values), values, np.nan)
    silent = np.isnan(known).all(1)
    known[silent] = 0.0
    low, high = np.nanmin(known, 1), np.nanmax(known, 1)
    offset = ((low + high) / 2).astype(np.float32)
    step = np.maximum((high - low) / 65000, np.finfo(np.float32).tiny).astype(np.float32)
    levels = np.round((known - offset[:, None]) / step[:, None])
    levels = np.where(np.isfinite(values), np.nan_to_num(levels).clip(-32767, 32767), MISSING)
    return offset, step, levels.astype(np.int16)

"""Sounds of items: read from files, mixed to one channel, resampled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mmsae.errors import MmsaeError
from mmsae.sources.weights import first_line, needs


def sound_of(item: dict[str, Any], rate: int) -> np.ndarray:
    """The sound of an item, float32 `[n]` in -1..1, one channel, at `rate` samples per second.

    Args:
        item: With `audio`: the path of a sound file, of which `crop_start_s` and `crop_s` (seconds) choose a part; or
            samples `[n]` or `[channels, n]`, with their `rate`.
        rate: Wanted, in samples per second.
    """
    audio, name = item.get("audio"), f"item {item.get('sample_id')}"
    if isinstance(audio, str | Path):
        name = f"the sound file {str(audio)!r}"
        samples, own_rate = read_sound(audio, float(item.get("crop_start_s", 0)), item.get("crop_s"))
    elif audio is None:
        raise MmsaeError(f"{name} has no sound under 'audio': give a path, or samples with their 'rate'.")
    elif "rate" not in item:
        raise MmsaeError(f"{name} has samples but no 'rate': say how many there are in a second.")
    else:
        samples, own_rate = np.asarray(audio), int(item["rate"])
        if samples.dtype.kind in "iu":
            samples = samples / float(np.iinfo(samples.dtype).max)
        samples = samples.mean(0) if samples.ndim == 2 else samples
    if samples.ndim != 1 or samples.size == 0:
        raise MmsaeError(f"{name} is an empty sound; leave it out of the data.")
    if not np.isfinite(samples).all():
        raise MmsaeError(f"{name} has samples that are not finite; repair it or leave it out.")
    return resampled(samples.astype(np.float32), own_rate, rate, name)


def resampled(samples: np.ndarray, own_rate: int, rate: int, name: str = "a sound") -> np.ndarray:
    """Samples at another rate, with a filter that keeps out what it cannot hold."""
    if not 1000 <= own_rate <= 1_000_000:
        raise MmsaeError(f"{name} says that it has {own_rate} samples per second; that is no sound.")
    if own_rate == rate:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(own_rate, rate)
    return resample_poly(samples, rate // common, own_rate // common).astype(np.float32)


def read_sound(path: str | Path, start_s: float = 0, length_s: float | None = None) -> tuple[np.ndarray, int]:
    """A part of a sound file, mixed to one channel `[n]`, and its samples per second."""
    soundfile = needs("soundfile", "a sound file", "audio")
    _, rate = sound_length(path)
    first = round(start_s * rate)
    n = -1 if length_s is None else round(length_s * rate)
    try:
        samples, rate = soundfile.read(str(path), frames=n, start=first, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise MmsaeError(f"the sound file {str(path)!r} cannot be read ({first_line(error)}).") from error
    return samples.mean(1), rate


def sound_length(path: str | Path) -> tuple[int, int]:
    """Samples (per channel) and samples per second of a sound file, without reading it; refused where it is cut off."""
    soundfile = needs("soundfile", "a sound file", "audio")
    path = Path(path)
    if not path.is_file():
        raise MmsaeError(f"there is no sound file {str(path)!r}.")
    try:
        found = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise MmsaeError(f"the sound file {str(path)!r} cannot be read ({first_line(error)}).") from error
    with path.open("rb") as file:
        head = file.read(12)
    promised = int.from_bytes(head[4:8], "little") + 8
    # libsndfile reads what there is of a truncated file, in silence; 0xFFFFFFFF means "not known"
    if head[:4] == b"RIFF" and path.stat().st_size < promised < 0xFFFFFFFF:
        raise MmsaeError(
            f"the sound file {str(path)!r} is cut off: it has {path.stat().st_size} of {promised} bytes; copy it again."
        )
    if found.frames == 0:
        raise MmsaeError(f"the sound file {str(path)!r} is empty; leave it out of the data.")
    return int(found.frames), int(found.samplerate)

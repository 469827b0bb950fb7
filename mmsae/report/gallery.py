"""Packs the latents and media of results into a small JSON document that the page's script draws from."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmsae.report.tables import is_number

if TYPE_CHECKING:
    from mmsae.results import Result

DIGITS = 4  # significant digits of an activation on the page
PICTURES = ("data", "mask", "spectrogram")
NEEDED = {"image": {"data"}, "image_text": {"data"}, "audio": {"spectrogram"}}  # diffusion may be without a picture


def pack(results: Iterable[Result]) -> dict[str, Any]:
    """Return the latents of all results in one list, and the media that they show.

    Args:
        results: Those with `latents` are packed; each becomes one set, for a page may show several modalities.
    """
    sets: list[str] = []
    latents: list[dict[str, Any]] = []
    media: list[dict[str, Any]] = []
    for result in results:
        if not result.latents:
            continue
        used: dict[int, int] = {}  # index in the result to index on the page
        for latent in result.latents:
            latents.append(_latent(latent, len(sets), len(result.media), used, len(media)))
        media += [_medium(result.media[i]) for i in used]
        sets.append(result.title or result.name)
    return {"sets": sets, "latents": latents, "media": media}


def _latent(latent: dict[str, Any], set_index: int, n_media: int, used: dict[int, int], offset: int) -> dict[str, Any]:
    examples = [e for e in latent.get("examples") or [] if e.get("media") in range(n_media)]  # None: nothing to show
    shown = [v for e in examples for v in _activations(e)]
    peak = max((abs(v) for v in [*shown, latent.get("max")] if is_number(v)), default=0) or 1.0
    packed = []
    for example in examples:
        index = used.setdefault(example["media"], offset + len(used))
        packed.append({**example, "media": index, "heat": _heat(example.get("heat"), peak)})
    return {**latent, "set": set_index, "peak": peak, "examples": packed}


def _activations(example: dict[str, Any]) -> Iterator[Any]:
    yield example.get("activation")
    yield from example.get("values") or []
    yield from (window[-1] for window in example.get("windows") or [])
    for row in example.get("heat") or []:
        yield from row


def _heat(heat: Sequence[Sequence[float]] | None, peak: float) -> dict[str, Any] | None:
    """A heat map as one byte per patch, in shares of the latent's peak: a tenth of the size of decimals."""
    if not heat or not heat[0]:
        return None
    flat = [v if is_number(v) else 0.0 for row in heat for v in row]
    levels = bytes(min(255, round(255 * abs(v) / peak)) for v in flat)
    return {"columns": len(heat[0]), "levels": base64.b64encode(levels).decode()}


def _medium(medium: dict[str, Any]) -> dict[str, Any]:
    """Only data that is inside the page: a picture that would have to be fetched is shown by its text."""
    shown = {*PICTURES} & medium.keys() | NEEDED.get(str(medium.get("kind")), set())
    if all(str(medium.get(name, "")).startswith("data:image/") for name in shown):
        return medium
    return {"kind": "other", "text": str(medium.get("text") or "picture not stored")}


def embed(data: Any) -> str:
    """JSON that can stand in a `<script>` element: no `<`, no NaN, the same for the same data."""
    text = json.dumps(_clean(data), ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value

"""Where in an example a latent fires: patches, tokens, windows of time and frequency, steps of diffusion."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmsae.analyses.media import mask_shares
from mmsae.analyses.recordings import mel
from mmsae.latents import LatentStore

PLACELESS = {1: "the class token", 3: "a register token"}
"""Kinds of tokens (`mmsae.sources.positions`) that lie nowhere in a picture."""
STEPS = 50
"""Largest number of points of a profile over timesteps."""
BOX = ("x0", "y0", "x1", "y1")
"""Columns with the pixels of the picture that a patch covers."""
CELLS = 48
"""Cells of such a heat map along the longer side."""
WINDOWED = ("audio", "signal")
"""Kinds of media that are looked at over time."""
SHORTEST = 0.3
"""Seconds of sound below which nobody hears what it is."""
CONDITIONS = {1: "conditional", 0: "unconditional"}


def window_of(latents: LatentStore, row: int) -> tuple[float, float] | None:
    """Begin and length in seconds of what a row stands for."""
    if "start_s" not in latents.columns:
        return None
    begin, length = (float(latents.columns[name][row]) for name in ("start_s", "duration_s"))
    return (begin, length) if begin >= 0 and length > 0 else None


class Places:
    """What the page needs to show where latents fire in examples.

    Args:
        latents: The codes and their columns.
    """

    def __init__(self, latents: LatentStore) -> None:
        self.latents, self.columns = latents, latents.columns
        self.n_bands = int(np.max(self.columns["row"])) + 1 if "row" in self.columns else 0

    def of(self, latent: int, sample: int, row: int, medium: dict[str, Any] | None) -> dict[str, Any]:
        """`heat`, `values`, `windows` with `region`, `shares` and `note`, as far as they apply.

        Args:
            latent: Which.
            sample: Place among `latents.samples`.
            row: Row of the strongest activation.
            medium: The packed example, None if there is none.
        """
        columns, rows = self.columns, self.latents.rows_of_sample[sample]
        kind = medium["kind"] if medium else ""
        found: dict[str, Any] = {"heat": None, "values": None}
        if medium and kind in WINDOWED:
            return found | self._windows(latent, rows, row, medium)
        for name in ("timestep", "conditional"):  # one pass of the model: steps are not added up
            if name in columns:
                rows = rows[columns[name][rows] == columns[name][row]]
        codes = self.latents.at(latent, rows)
        notes = [_step(self.latents, row)] if "timestep" in columns else []
        if "row" in columns and (columns["row"][rows] >= 0).any() and kind != "text":
            if columns["row"][row] < 0 and kind != "image_text":  # a map of patches would hide where it really fired
                token = int(columns["kind"][row]) if "kind" in columns else -1
                notes.append(f"at {PLACELESS.get(token, 'a token')}")
            elif "image" in columns and columns["image"][row] > 0:
                notes.append(f"strongest in picture {int(columns['image'][row]) + 1}, which is not shown")
            else:
                found |= self._map(rows, codes, medium)
        if medium and "tokens" in medium and "position" in columns:
            found["values"] = _values(columns["position"][rows], codes, medium)
        return found | ({"note": ", ".join(notes)} if notes else {})

    def _map(self, rows: np.ndarray, codes: np.ndarray, medium: dict[str, Any] | None) -> dict[str, Any]:
        """The heat map, over the whole picture where patches say which pixels they cover."""
        columns = self.columns
        placed = columns["row"][rows] >= 0
        if "image" in columns:
            placed &= columns["image"][rows] <= 0
        rows, codes = rows[placed], codes[placed]
        whole = bool(medium and medium.get("size") and all(name in columns for name in BOX))
        if whole and medium:
            heat = _from_boxes(np.stack([columns[name][rows] for name in BOX], 1), codes, medium["size"])
        else:
            y, x = columns["row"][rows], columns["column"][rows]
            heat = np.zeros((y.max() + 1, x.max() + 1))
            heat[y, x] = codes
        shares = mask_shares(medium, heat, whole) if medium else None
        return {"heat": heat.tolist()} | ({"whole": True} if whole else {}) | ({"shares": shares} if shares else {})

    def _windows(self, latent: int, rows: np.ndarray, row: int, medium: dict[str, Any]) -> dict[str, Any]:
        """Active windows in seconds of the excerpt, `[begin, end, channel or edges of the band, code]`; the region."""
        columns, codes = self.columns, self.latents.at(latent, rows)
        rows, codes = rows[codes != 0], codes[codes != 0]
        if window_of(self.latents, row) is None:
            return {"windows": [], "note": "of the whole recording"}
        shift, length = medium["start_ms"] / 1000, medium["seconds"]
        begin = columns["start_s"][rows].astype(np.float64) - shift
        end = begin + columns["duration_s"][rows]
        region = _region(begin, end, np.abs(codes), int(np.flatnonzero(rows == row)[0]), length)
        name = "channel" if medium["kind"] == "signal" else "row"
        where = columns[name][rows].tolist() if name in columns else [-1] * len(rows)
        windows = [
            [max(float(begin[i]), 0.0), min(float(end[i]), length), *self._extent(where[i], medium), float(codes[i])]
            for i in np.flatnonzero((end > 0) & (begin < length) & (end > begin))
        ]
        return {"windows": windows, "region": region}

    def _extent(self, place: int, medium: dict[str, Any]) -> list[float]:
        """A channel; or the shares of the spectrogram's height, from below, between which a band lies."""
        if medium["kind"] == "signal":
            return [place]
        if place < 0:
            return [0.0, 1.0]
        edges = medium["mel_hz"] or (0, medium["top_hz"])
        low, high = (min(float(mel(hz) / mel(medium["top_hz"])), 1.0) for hz in edges)
        return [low + (high - low) * (place + i) / self.n_bands for i in (0, 1)]


def _from_boxes(boxes: np.ndarray, codes: np.ndarray, size: list[int]) -> np.ndarray:
    """The strongest code over each cell of a grid on the picture.

    Args:
        boxes: Left, top, right, bottom in pixels, `[n, 4]`; parts outside the picture are left out.
        codes: `[n]`.
        size: Width and height of the picture.
    """
    scale = CELLS / max(size)
    width, height = (max(1, round(side * scale)) for side in size)
    heat = np.zeros((height, width))
    edges = np.round(boxes * scale).astype(int).clip(0, [width, height, width, height])
    for i in np.argsort(np.abs(codes), kind="stable"):  # the strongest is written last
        left, top, right, bottom = edges[i]
        heat[top : max(bottom, top + 1), left : max(right, left + 1)] = codes[i]
    return heat


def _values(position: np.ndarray, codes: np.ndarray, medium: dict[str, Any]) -> list[float]:
    """The activation of each token."""
    code = dict(zip(position.tolist(), codes.tolist(), strict=True))
    return [code.get(p, 0.0) for p in medium.get("positions", range(len(medium["tokens"])))]


def _step(latents: LatentStore, row: int) -> str:
    columns = latents.columns
    sigma = f", σ {float(columns['sigma'][row]):.3g}" if "sigma" in columns else ""
    condition = CONDITIONS.get(int(columns["conditional"][row])) if "conditional" in columns else None
    return f"timestep {int(columns['timestep'][row])}{sigma}" + (f", {condition}" if condition else "")


def _region(begin: np.ndarray, end: np.ndarray, codes: np.ndarray, strongest: int, length: float) -> list[float]:
    """The strongest window, with those that touch it and are at least half as strong; long enough to be heard."""
    low, high = float(begin[strongest]), float(end[strongest])
    strong = codes >= codes[strongest] / 2
    order = np.flatnonzero(strong)[np.argsort(begin[strong], kind="stable")]
    touching = 1e-6 + (high - low) / 100  # times of neighbours are rounded
    for i in order[begin[order] >= low]:
        if begin[i] <= high + touching:
            high = max(high, float(end[i]))
    for i in order[np.argsort(-end[order], kind="stable")]:
        if end[i] >= low - touching:
            low = min(low, float(begin[i]))
    if high - low < SHORTEST:
        low, high = (low + high - SHORTEST) / 2, (low + high + SHORTEST) / 2
    return [max(low, 0.0), min(high, length)]


class StepProfile:
    """Mean activation of latents over the timesteps of diffusion, with and without the condition.

    Args:
        latents: With a column `timestep`, and perhaps `conditional`.
    """

    def __init__(self, latents: LatentStore) -> None:
        step = np.asarray(latents.columns["timestep"]).astype(np.float64)
        condition = np.asarray(latents.columns.get("conditional", np.full(len(step), -1)))
        known = np.unique(step)
        if len(known) > STEPS:
            edges = np.linspace(known[0], known[-1], STEPS + 1)
            place = np.clip(np.searchsorted(edges, step, side="right") - 1, 0, STEPS - 1)
            self.steps = (edges[:-1] + edges[1:]) / 2
        else:
            place, self.steps = np.searchsorted(known, step), known
        self.conditions = np.unique(condition)
        self._group = np.searchsorted(self.conditions, condition) * len(self.steps) + place
        self._n = len(self.conditions) * len(self.steps)
        self._rows = np.bincount(self._group, minlength=self._n)

    def of(self, latents: LatentStore, latent: int) -> list[dict[str, Any]]:
        """Lines `{"label", "x", "y"}`; a timestep without rows is left out."""
        rows, values = latents.of_latent(latent)
        total = np.bincount(self._group[rows], weights=values, minlength=self._n)
        lines = []
        for i, condition in enumerate(self.conditions.tolist()):
            own = slice(i * len(self.steps), (i + 1) * len(self.steps))
            counts = self._rows[own]
            mean = total[own][counts > 0] / counts[counts > 0]
            label = CONDITIONS.get(int(condition), "")
            lines.append({"label": label, "x": self.steps[counts > 0].tolist(), "y": mean.tolist()})
        return lines[::-1]  # with the condition first

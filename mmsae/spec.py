"""What flows between the rooms: the widths of the activation streams and the names of the batch keys."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mmsae.errors import MmsaeError

ACTS = "acts"
"""Batch key of the activations: a dict from stream name to a tensor `[rows, width]`."""

GRADS = "grads"
"""Batch key of the gradients of the model's loss by the activations: a dict as `acts`, for cores that need it."""

TARGET = "target"
"""Stream that a transcoder reconstructs; without it the input is its own target."""

MODALITIES = {"image": 0, "text": 1, "audio": 2, "signal": 3, "video": 4, "volume": 5, "graph": 6, "other": 7}
"""Name of a modality to its number in the batch column `modality`; numbers are in stores, so only append."""

Batch = dict[str, Any]
"""`acts`, `grads` where asked for, and one tensor per metadata column, each with one entry per row."""


class ActivationSpec(NamedTuple):
    """Widths of the activation streams; the data know them, nobody types them.

    Attributes:
        streams: Stream name (a hook point, a modality of a pair, or `target`) to its width.
    """

    streams: dict[str, int]

    @property
    def input(self) -> str:
        """Name of the only, or first, stream that is read."""
        return next(name for name in self.streams if name != TARGET)

    @property
    def d_in(self) -> int:
        """Width of `input`."""
        return self.streams[self.input]

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return self.streams.get(TARGET, self.d_in)

    def require(self, stream: str, width: int) -> None:
        """Raise unless these data have the stream that a dictionary reads, in its width."""
        if self.streams.get(stream) != width:
            has = ", ".join(f"{name} ({found})" for name, found in self.streams.items())
            raise MmsaeError(f"the dictionary reads {stream!r} with d_in={width}, but the data have {has}.")

    @classmethod
    def of(cls, spec: ActivationSpec | dict[str, int] | int) -> ActivationSpec:
        """Accept a spec, its streams, or the bare width of a single stream."""
        if isinstance(spec, ActivationSpec):
            return spec
        streams = {"x": spec} if isinstance(spec, int) else dict(spec)
        if not streams or any(width < 1 for width in streams.values()) or set(streams) == {TARGET}:
            raise MmsaeError(f"activation spec {streams} names no input stream of positive width.")
        return cls(streams)


def in_float32(batch: Batch) -> Batch:
    """The batch with its activations (and gradients) in float32, whatever they were stored in."""
    return {**batch, **{key: {s: x.float() for s, x in batch[key].items()} for key in (ACTS, GRADS) if key in batch}}


def rows_of(batch: Batch) -> int:
    """Number of activation rows in a batch."""
    return len(next(iter(batch[ACTS].values())))


def map_batch(batch: Batch, fn: Any) -> Batch:
    """Apply `fn` to every tensor of a batch, activations and metadata alike."""
    return {
        key: {k: fn(v) for k, v in value.items()} if isinstance(value, dict) else fn(value)
        for key, value in batch.items()
        if isinstance(value, dict | Tensor)
    }

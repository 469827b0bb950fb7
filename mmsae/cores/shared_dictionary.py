"""One dictionary for several streams, and a code for each of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import Affine, Losses, SAECore, untraced
from mmsae.cores.frame import Frame
from mmsae.errors import MmsaeError, nearest
from mmsae.spec import ACTS, MODALITIES, TARGET, ActivationSpec, Batch

STREAM = "stream"
"""Entry of `Codes.extra`, and column of stored codes: number of the stream in `core.outputs` of each row."""
PAIR = "pair_id"
"""Batch key: below 0 the streams of a row do not belong together. Without it they all do."""


class SharedDictionary(SAECore):
    """What cores with one dictionary and a code for each stream share.

    `encode` of a dict by stream gives codes `[n_streams, batch, ...]` in the order of `outputs`, marked by
    `extra["stream"]`; `encode` of a tensor, codes of the first stream. `decode` is the inverse: marked codes give a
    dict, any others the first stream. `encode_stream` and `decode_stream` serve one stream by name.

    The normalisation is folded into the `frames` before and after the dictionary, so weights and codes stay those of
    the training.

    A subclass writes `code`, `write`, `rows` and `terms`, all of them between the frames.

    Args:
        spec: Widths of the streams, two or more; all are read and reconstructed.
        d_latent: Number of latents.
    """

    def __init__(self, spec: ActivationSpec | int, d_latent: int) -> None:
        super().__init__(spec, d_latent)
        name, streams = type(self).__name__, self.spec.streams
        if TARGET in streams:
            raise MmsaeError(f"{name} reconstructs every stream it reads: give {TARGET!r} another name.")
        if len(streams) < 2:
            raise MmsaeError(
                f"{name} reads two or more streams, but the data have only {self.spec.input!r}: "
                "pair them (--data.source=PairedEmbeddings), or train TopK."
            )
        self.frames = nn.ModuleList([Frame(width) for width in streams.values()])

    # ---- between the frames

    @abstractmethod
    def code(self, number: int, x: Tensor) -> Codes:
        """Codes of what the frame of a stream reads, `[..., inner]`."""

    @abstractmethod
    def write(self, number: int, codes: Codes) -> Tensor:
        """What the frame of a stream turns into its reconstruction, `[..., inner]`."""

    @abstractmethod
    def rows(self, number: int) -> Tensor:
        """What a unit of each latent adds to `write`, `[d_latent, inner]`."""

    @abstractmethod
    def terms(self, x: list[Tensor], out: list[Tensor], codes: list[Codes], batch: Batch) -> dict[str, Tensor]:
        """The loss, from what was read, written and coded in each stream."""

    def codes_of(self, x: list[Tensor]) -> list[Codes]:
        """Codes of each stream, for `losses`."""
        return [self.code(number, part) for number, part in enumerate(x)]

    # ---- what a core does

    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """Codes of the first stream for a tensor, `[n_streams, ..., k]` for a dict by stream."""
        if isinstance(x, Tensor):
            return self.encode_stream(self.spec.input, x)
        return stacked([self.encode_stream(stream, x[stream]) for stream in self.outputs])

    def decode(self, codes: Codes) -> Tensor | dict[str, Tensor]:
        """A dict by stream for codes marked as those of all streams, else the reconstruction of one."""
        marks = codes.extra.get(STREAM)
        if marks is None:
            return self.decode_stream(self.spec.input, codes)
        n = len(self.outputs)
        if len(marks) == n and (marks.numel() == 0 or marks.reshape(n, -1)[:, 0].tolist() == list(range(n))):
            return {stream: self.decode_stream(stream, codes[number]) for number, stream in enumerate(self.outputs)}
        own = marks.unique().tolist()
        if len(own) > 1:
            raise MmsaeError("these codes mix the streams row by row: take those of one stream, and decode_stream.")
        return self.decode_stream(self.outputs[own[0] if own else 0], codes)

    @untraced
    def encode_stream(self, stream: str, x: Tensor) -> Codes:
        """Codes of activations of one stream, `[..., width]`."""
        number = self.number(stream)
        return self.code(number, self.frame(number).read(x))

    @untraced
    def decode_stream(self, stream: str, codes: Codes) -> Tensor:
        """Reconstruction in one stream `[..., width]` of codes of any: that is how a concept crosses over."""
        number = self.number(stream)
        return self.frame(number).write(self.write(number, codes))

    def losses(self, batch: Batch) -> Losses:
        """The terms of the subclass."""
        x = [self.frame(number).read(batch[ACTS][stream]) for number, stream in enumerate(self.outputs)]
        codes = self.codes_of(x)
        out = [self.write(number, own) for number, own in enumerate(codes)]
        terms = self.terms(x, out, codes, batch)
        written = {stream: self.frame(number).write(out[number]) for number, stream in enumerate(self.outputs)}
        return Losses(terms, stacked(codes), written)

    def frame(self, number: int) -> Frame:
        """What stands between a stream and the dictionary."""
        return self.frames[number]  # type: ignore[return-value]

    def number(self, stream: str) -> int:
        """Place of a stream in `outputs`."""
        if stream not in self.outputs:
            raise MmsaeError(
                f"{type(self).__name__} has no stream {stream!r}; nearest: {nearest(stream, self.outputs)}."
            )
        return self.outputs.index(stream)

    @property
    def outputs(self) -> list[str]:
        """All streams."""
        return list(self.spec.streams)

    @property
    def dictionaries(self) -> dict[str, Tensor]:
        """Decoder rows of each stream, `[d_latent, width]`."""
        return {stream: self.frame(number).rows(self.rows(number)) for number, stream in enumerate(self.outputs)}

    @property
    def dictionary(self) -> Tensor:
        """Decoder rows of the first stream; `dictionaries` has all of them."""
        return self.frame(0).rows(self.rows(0))

    def inputs(self, batch: Batch) -> Any:
        """All streams."""
        return {stream: batch[ACTS][stream] for stream in self.outputs}

    @torch.no_grad()
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation of each stream into its frame; codes keep their unit."""
        for number, stream in enumerate(self.outputs):
            self.frame(number).fold(affine[stream])

    def by_row(self, codes: Codes, columns: dict[str, Tensor]) -> tuple[Codes, dict[str, Tensor]]:
        """One row for each stream of each pair: first all of the first stream, then all of the next.

        The columns `stream` (number in `outputs`) and `modality` (where the stream is named as one) tell them apart.
        """
        marks = codes.extra.get(STREAM)
        if marks is None or marks.ndim < 2:
            return codes, columns
        n = len(self.outputs)
        flat = Codes(
            codes.values.flatten(0, 1),
            None if codes.indices is None else codes.indices.flatten(0, 1),
            codes.d_latent,
            {name: entry.flatten(0, 1) for name, entry in codes.extra.items()},
        )
        repeated = {name: column.repeat(n, *[1] * (column.ndim - 1)) for name, column in columns.items()}
        repeated[STREAM] = flat.extra[STREAM].clone()
        modality = repeated.get("modality", torch.full_like(repeated[STREAM], MODALITIES["other"])).clone()
        for number, stream in enumerate(self.outputs):
            if stream in MODALITIES:
                modality[repeated[STREAM] == number] = MODALITIES[stream]
        return flat, {**repeated, "modality": modality}


def stacked(codes: list[Codes]) -> Codes:
    """Codes of all streams on a new leading axis, marked as such."""
    values = torch.stack([own.values for own in codes])
    indices = None if codes[0].indices is None else torch.stack([own.indices for own in codes])  # type: ignore[misc]
    numbers = torch.arange(len(codes), device=values.device)
    marks = numbers.view(-1, *[1] * (values.ndim - 2)).expand(values.shape[:-1])
    return Codes(values, indices, codes[0].d_latent, {STREAM: marks})


def paired_rows(batch: Batch, like: Tensor) -> Tensor:
    """1 for rows whose streams belong together, 0 for others, `[rows]`."""
    if PAIR not in batch:
        return like.new_ones(len(like))
    return (batch[PAIR] >= 0).to(like)

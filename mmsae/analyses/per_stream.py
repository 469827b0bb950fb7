"""A code for each stream of pairs, whatever the dictionary: cores that know streams, and cores that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores import SAECore, SharedDictionary
from mmsae.errors import MmsaeError
from mmsae.latents import to_csr

ROWS = 4096
"""Rows encoded at a time."""


class StreamCoder(Protocol):
    """What measures across modalities need of a dictionary; a `SharedDictionary` has it already."""

    d_latent: int

    @property
    def outputs(self) -> list[str]:
        """The streams."""

    @property
    def dictionaries(self) -> Mapping[str, Tensor]:
        """Decoder rows of each stream, `[d_latent, width]`."""

    def encode_stream(self, stream: str, x: Tensor) -> Codes:
        """Codes of activations of one stream."""

    def decode_stream(self, stream: str, codes: Codes) -> Tensor:
        """Reconstruction in one stream."""


class Union:
    """One dictionary of one stream, used for all streams alike: it was trained on their rows as if they were one.

    Args:
        core: The dictionary.
        streams: Names of the streams.
        means: Of each stream, subtracted before and added after; without it nothing is.
    """

    def __init__(self, core: SAECore, streams: Sequence[str], means: Mapping[str, Tensor] | None = None) -> None:
        self.core, self.outputs, self.means = core, list(streams), means
        self.d_latent = core.d_latent

    @property
    def dictionaries(self) -> dict[str, Tensor]:
        """The same for all streams."""
        return dict.fromkeys(self.outputs, self.core.dictionary)

    def encode_stream(self, stream: str, x: Tensor) -> Codes:
        """As the core does, whatever the stream."""
        return self.core.encode(x if self.means is None else x - self.means[stream])

    def decode_stream(self, stream: str, codes: Codes) -> Tensor:
        """As the core does, whatever the stream."""
        made = self.core.decode(codes)
        assert isinstance(made, Tensor)
        return made if self.means is None else made + self.means[stream]


class Matched:
    """A dictionary for each stream, whose latents were matched afterwards by how they fire on pairs.

    Args:
        cores: Stream to its dictionary, all of one size.
        orders: Stream to the own latent that each common latent stands for, int64 `[d_latent]`.
    """

    def __init__(self, cores: Mapping[str, SAECore], orders: Mapping[str, Tensor]) -> None:
        self.cores, self.orders, self.outputs = cores, orders, list(cores)
        self.d_latent = next(iter(cores.values())).d_latent
        self._place = {name: order.argsort() for name, order in orders.items()}

    @classmethod
    @torch.no_grad()
    def on_pairs(cls, cores: Mapping[str, SAECore], acts: Mapping[str, Tensor]) -> Matched:
        """Match by the correlation of activations over pairs (Hungarian method), the latents of the first stream kept.

        Args:
            cores: Stream to its dictionary.
            acts: Stream to activations of the same pairs, `[n, width]`.
        """
        first, *others = cores
        codes = {name: _standard(encoded(core, acts[name]).toarray()) for name, core in cores.items()}
        orders = {first: torch.arange(cores[first].d_latent)}
        for name in others:
            gain = codes[first].T @ codes[name] / len(codes[name])
            orders[name] = torch.as_tensor(linear_sum_assignment(-gain)[1])
        return cls(cores, orders)

    @property
    def dictionaries(self) -> dict[str, Tensor]:
        """Of each core, in the common order."""
        return {name: core.dictionary[self.orders[name]] for name, core in self.cores.items()}

    def encode_stream(self, stream: str, x: Tensor) -> Codes:
        """Codes of the stream's core, under the common names of latents."""
        codes = self.cores[stream].encode(x).sparse()
        assert codes.indices is not None
        return Codes(codes.values, self._place[stream][codes.indices], self.d_latent)

    def decode_stream(self, stream: str, codes: Codes) -> Tensor:
        """Reconstruction of the stream's core."""
        codes = codes.sparse()
        assert codes.indices is not None
        made = self.cores[stream].decode(Codes(codes.values, self.orders[stream][codes.indices], self.d_latent))
        assert isinstance(made, Tensor)
        return made


def coder_of(core: SAECore, streams: Sequence[str]) -> StreamCoder:
    """The core as a coder of streams; one that reads a single stream codes all of them alike."""
    if isinstance(core, SharedDictionary):
        return core
    if len(core.outputs) > 1 or len(core.spec.streams) > 1:
        raise MmsaeError(
            f"{type(core).__name__} has one code for all its streams, so streams cannot be compared by their codes."
        )
    return Union(core, streams)


@torch.no_grad()
def encoded(core: SAECore | StreamCoder, x: Tensor, stream: str | None = None) -> sparse.csr_matrix:
    """Codes of rows of one stream, a block at a time, `[n, d_latent]`."""
    coder: Any = core
    parts = []
    for block in x.split(ROWS):
        codes = coder.encode(block) if stream is None else coder.encode_stream(stream, block)
        parts.append(to_csr(codes))
    return sparse.vstack(parts, format="csr")


def _standard(z: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and standard deviation 1; those that do not vary are 0."""
    z = z - z.mean(0)
    deviation = z.std(0)
    return z / np.where(deviation > 0, deviation, 1)

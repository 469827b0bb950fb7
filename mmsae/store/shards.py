"""One shard: a safetensors file of rows, with the moments of its rows."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from mmsae.errors import MmsaeError
from mmsae.spec import ACTS, GRADS, Batch

MOMENTS = "moments."
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "BOOL": torch.bool,
}


class Field(NamedTuple):
    """Where one tensor lies in a shard."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def encode_shard(rows: Batch, covariance: bool) -> tuple[bytes, list[str]]:
    """Serialise rows and their float64 moments; also names the streams that are not finite."""
    tensors = {name: value.contiguous() for name, value in rows.items() if isinstance(value, Tensor)}
    tensors |= {f"{GRADS}.{stream}": x.contiguous() for stream, x in rows.get(GRADS, {}).items()}
    broken = []
    for stream, x in rows[ACTS].items():
        tensors[f"{ACTS}.{stream}"] = x.contiguous()
        found = moments(x, covariance)
        if not torch.isfinite(found["norms"]).all():
            broken.append(stream)
        tensors |= {f"{MOMENTS}{stream}.{name}": value for name, value in found.items()}
    return save(_apart(tensors)), broken


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory as copies, which safetensors asks for: two columns may be one tensor."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def moments(x: Tensor, products: bool) -> dict[str, Tensor]:
    """Sums over rows `[n, width]` in float64: of the rows, of their norms and squared norms, of their outer products.

    Block by block, so that no wide copy of everything is made; the blocks are fixed, so that the bits are too.
    """
    width = x.shape[1]
    total = x.new_zeros(width, dtype=torch.float64)
    norms = x.new_zeros(2, dtype=torch.float64)
    outer = x.new_zeros(width, width, dtype=torch.float64) if products else None
    for start in range(0, len(x), 1024):
        block = x[start : start + 1024].double()
        squares = block.pow(2).sum(-1)
        total += block.sum(0)
        norms += torch.stack([squares.sqrt().sum(), squares.sum()])
        if outer is not None:
            outer += block.T @ block
    return {"sum": total, "norms": norms, **({} if outer is None else {"products": outer})}


def fields_of(path: Path, verb: str = "extract") -> dict[str, Field]:
    """Read the header of a shard; a missing or truncated file is named, with the verb of mmsae that writes it."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        fields, end = {}, 0
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            fields[name] = Field(8 + length + start, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            end = max(end, stop)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes instead of {8 + length + end}")
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise MmsaeError(
            f"shard {path} is missing or damaged ({error}): delete its store and run mmsae {verb} again."
        ) from error
    return fields


def map_arrays(path: Path, fields: dict[str, Field], mode: Literal["r", "r+"] = "r") -> dict[str, np.ndarray]:
    """The tensors of a shard as arrays in a memory map: nothing is read before it is used."""
    memory = np.asarray(np.memmap(path, mode=mode))
    return {
        name: memory[f.offset : f.offset + math.prod(f.shape) * f.dtype.itemsize]
        .view(str(f.dtype).removeprefix("torch."))
        .reshape(f.shape)
        for name, f in fields.items()
    }


@dataclass
class Shard:
    """An open shard; rows are read by position, without the page faults of a memory map.

    Attributes:
        path: The file.
        fields: Tensor name to place.
        n_rows: Rows in it.
    """

    path: Path
    fields: dict[str, Field]
    n_rows: int

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read the header; a file that is missing, truncated or no shard is named."""
        fields = fields_of(path)
        n_rows = next((f.shape[0] for name, f in fields.items() if name.startswith(f"{ACTS}.")), None)
        if n_rows is None:
            raise MmsaeError(f"shard {path} holds no activations: delete its store and run mmsae extract again.")
        return cls(path, fields, n_rows)

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` `[n, ...]` with rows `start .. start + n` of a tensor."""
        field = self.fields[name]
        view = memoryview(out.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        with open(self.path, "rb", buffering=0) as file:
            place, done = field.offset + start * field.row_bytes, 0
            while done < len(view):
                got = os.preadv(file.fileno(), [view[done:]], place + done)
                if got == 0:
                    raise MmsaeError(f"shard {self.path} ended while it was read: was it changed by someone else?")
                done += got

    def announce(self, name: str, start: int, n: int) -> None:
        """Tell the system that `n` rows will be read soon, so that many reads are under way at once."""
        if hasattr(os, "posix_fadvise"):
            field = self.fields[name]
            with open(self.path, "rb", buffering=0) as file:
                place, length = field.offset + start * field.row_bytes, n * field.row_bytes
                os.posix_fadvise(file.fileno(), place, length, os.POSIX_FADV_WILLNEED)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor."""
        field = self.fields[name]
        out = torch.empty(field.shape, dtype=field.dtype)
        flat = out.reshape(1) if not field.shape else out
        if flat.numel():
            self.read(name, 0, flat)
        return out

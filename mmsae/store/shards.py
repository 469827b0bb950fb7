"""One shard: a safetensors file of rows, with the moments of its rows."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from mmsae.errors import MmsaeError
from mmsae.spec import ACTS, Batch

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
        width = 1
        for size in self.shape[1:]:
            width *= size
        return width * self.dtype.itemsize


def encode_shard(rows: Batch, covariance: bool) -> bytes:
    """Serialise rows and their float64 moments."""
    tensors = {name: value.contiguous() for name, value in rows.items() if name != ACTS}
    for stream, x in rows[ACTS].items():
        tensors[f"{ACTS}.{stream}"] = x.contiguous()
        wide = x.double()
        norms = wide.norm(dim=-1)
        tensors[f"{MOMENTS}{stream}.sum"] = wide.sum(0)
        tensors[f"{MOMENTS}{stream}.norms"] = torch.stack([norms.sum(), norms.pow(2).sum()])
        if covariance:
            tensors[f"{MOMENTS}{stream}.products"] = wide.T @ wide
    return save(tensors)


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        """Read the header; a missing or truncated file is named."""
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
            n_rows = next(f.shape[0] for name, f in fields.items() if name.startswith(f"{ACTS}."))
        except (OSError, ValueError, KeyError, struct.error, StopIteration) as error:
            raise MmsaeError(
                f"shard {path} is missing or damaged ({error}): delete its store and run mmsae extract again."
            ) from error
        return cls(path, fields, n_rows)

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` `[n, ...]` with rows `start .. start + n` of a tensor."""
        field = self.fields[name]
        view = memoryview(out.view(torch.uint8).numpy() if out.ndim else out.numpy()).cast("B")
        with open(self.path, "rb", buffering=0) as file:
            place, done = field.offset + start * field.row_bytes, 0
            while done < len(view):
                got = os.preadv(file.fileno(), [view[done:]], place + done)
                if got == 0:
                    raise MmsaeError(f"shard {self.path} ended while it was read: was it changed by someone else?")
                done += got

    def tensor(self, name: str) -> Tensor:
        """One whole tensor."""
        field = self.fields[name]
        out = torch.empty(field.shape, dtype=field.dtype)
        flat = out.reshape(1) if not field.shape else out
        if flat.numel():
            self.read(name, 0, flat)
        return out

"""What a store of activations says about itself."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mmsae.errors import MmsaeError
from mmsae.files import write_atomic

FORMAT = 1
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Statistics:
    """Moments of one stream over all rows of a store, accumulated in float64.

    Attributes:
        mean: `[width]`.
        mean_norm: Mean of the row norms.
        mean_square: Mean of the squared row norms.
        covariance: `[width, width]`, if it was asked for.
    """

    mean: Tensor
    mean_norm: float
    mean_square: float
    covariance: Tensor | None = None

    @classmethod
    def of(cls, sums: dict[str, Tensor], n_rows: int) -> Statistics:
        """From sums over rows, as `mmsae.store.shards.moments` gives them."""
        mean = sums["sum"] / n_rows
        mean_norm, mean_square = (sums["norms"] / n_rows).tolist()
        covariance = sums["products"] / n_rows - mean.outer(mean) if "products" in sums else None
        return cls(mean, mean_norm, mean_square, covariance)


@dataclass
class Manifest:
    """`manifest.json`, written last: a folder without it is an unfinished extraction.

    Attributes:
        dtype: Of the activations.
        streams: Hook point to width.
        columns: Metadata column to dtype.
        source: What produced the activations: class, model, revision, hook points, positions.
        data: The data set: class, arguments, split, number of examples.
        shards: In reading order: file, rows, bytes, sha256.
        versions: Of the libraries that wrote it.
        factors: Label column (without its prefix "label.") to the names of its values.
        gradients: Whether every row also has the gradient of the model's loss.
        format: Number of this layout.
    """

    dtype: str
    streams: dict[str, int]
    columns: dict[str, str]
    source: dict[str, Any]
    data: dict[str, Any]
    shards: list[dict[str, Any]]
    versions: dict[str, str]
    factors: dict[str, list[str]] = field(default_factory=dict)
    gradients: bool = False
    format: int = FORMAT

    holds: ClassVar[str] = "activations"
    verb: ClassVar[str] = "extract"
    making: ClassVar[str] = "extraction"

    @property
    def n_rows(self) -> int:
        """Rows in all shards."""
        return sum(shard["rows"] for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Write it atomically."""
        write_atomic(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read and check it."""
        path = folder / MANIFEST
        if not folder.is_dir():
            raise MmsaeError(f"no {cls.holds[:-1]} store at {folder}: make one with mmsae {cls.verb}.")
        if not path.is_file():
            if any((folder / name / MANIFEST).is_file() for name in os.listdir(folder)):
                splits = ", ".join(sorted(n for n in os.listdir(folder) if (folder / n / MANIFEST).is_file()))
                raise MmsaeError(f"{folder} holds stores by split ({splits}), not one store: name one of them.")
            raise MmsaeError(
                f"{folder} has no {MANIFEST}: its {cls.making} did not finish; run mmsae {cls.verb} again."
            )
        try:
            raw = json.loads(path.read_text())
            number = raw["format"]
            if number > FORMAT:
                raise MmsaeError(f"{path} has format {number}, newer than the {FORMAT} known here: update mmsae.")
            holds = "codes" if "d_latent" in raw else "activations"
            if holds != cls.holds:
                raise MmsaeError(f"{folder} holds {holds}, not {cls.holds}.")
            return cls(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise MmsaeError(f"{path} cannot be read ({error}): {cls.verb} the {cls.holds} again.") from error


@dataclass(kw_only=True)
class CodeManifest(Manifest):
    """The same for a store of codes: `dtype` is that of the values, `streams` are those that the dictionary reads.

    Attributes:
        d_latent: Size of the dictionary.
        signed: Whether codes may be negative.
        dictionary: Its class, arguments and the checksum of its weights.
    """

    d_latent: int
    signed: bool
    dictionary: dict[str, Any]

    holds: ClassVar[str] = "codes"
    verb: ClassVar[str] = "encode"
    making: ClassVar[str] = "encoding"

    @property
    def n_pairs(self) -> int:
        """Codes other than 0 in all shards."""
        return sum(shard["pairs"] for shard in self.shards)


def save_statistics(folder: Path, statistics: dict[str, Statistics]) -> None:
    """Write `statistics.safetensors`."""
    tensors = {}
    for stream, s in statistics.items():
        tensors[f"{stream}.mean"] = s.mean
        tensors[f"{stream}.norms"] = torch.tensor([s.mean_norm, s.mean_square], dtype=torch.float64)
        if s.covariance is not None:
            tensors[f"{stream}.covariance"] = s.covariance
    write_atomic(folder / STATISTICS, save(tensors))


def load_statistics(folder: Path, streams: dict[str, int]) -> dict[str, Statistics]:
    """Read `statistics.safetensors`."""
    path = folder / STATISTICS
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            found = {}
            for stream in streams:
                mean_norm, mean_square = file.get_tensor(f"{stream}.norms").tolist()
                key = f"{stream}.covariance"
                covariance = file.get_tensor(key) if key in names else None
                found[stream] = Statistics(file.get_tensor(f"{stream}.mean"), mean_norm, mean_square, covariance)
            return found
    except Exception as error:
        raise MmsaeError(f"{path} cannot be read ({error}): extract the activations again.") from error

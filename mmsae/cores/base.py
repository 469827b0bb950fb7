"""The interface that every sparse dictionary fits."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.errors import MmsaeError, checked
from mmsae.spec import ACTS, TARGET, ActivationSpec, Batch


class Affine(NamedTuple):
    """The normalisation of one stream: `x_normalised = (x - mean) @ scale`.

    Attributes:
        mean: `[width]`.
        scale: A number (0-dim) or a matrix `[width, width]`.
    """

    mean: Tensor
    scale: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """From raw to normalised activations."""
        x = x - self.mean
        return x * self.scale if self.scale.ndim == 0 else x @ self.scale

    def invert(self, x: Tensor) -> Tensor:
        """From normalised back to raw activations."""
        return (x / self.scale if self.scale.ndim == 0 else x @ self.inverse_scale()) + self.mean

    def inverse_scale(self) -> Tensor:
        """`scale` inverted, as a number or a matrix, computed in float64."""
        if self.scale.ndim == 0:
            return 1 / self.scale
        return torch.linalg.inv(self.scale.double()).to(self.scale.dtype)

    def reading(self, rows: Tensor) -> Tensor:
        """Rows `[..., width]` that are multiplied with normalised activations, for raw ones less the mean; float64."""
        scale, rows = self.scale.double(), rows.double()
        return scale * rows if scale.ndim == 0 else rows @ scale.t()

    def writing(self, rows: Tensor) -> Tensor:
        """Rows `[..., width]` that add up to normalised activations, for raw ones less the mean; float64."""
        inverse, rows = self.inverse_scale().double(), rows.double()
        return rows * inverse if inverse.ndim == 0 else rows @ inverse


class Losses(NamedTuple):
    """One training step of a core.

    Attributes:
        terms: Named scalars; their sum is minimised. A term called "sparsity" is ramped up by the training module.
        codes: What fired.
        reconstruction: Of the target, in the units of the batch; several streams as a dict or side by side
            (`SAECore.by_stream`).
    """

    terms: dict[str, Tensor]
    codes: Codes
    reconstruction: Tensor | dict[str, Tensor]


class SAECore(nn.Module, ABC):
    """A sparse dictionary: pure torch, all training state in buffers, so that a checkpoint carries it.

    How the cores of the literature use this interface:

    - ReLU, Gated, TopK, AbsTopK, JumpReLU, Atoms (threshold), Archetypal: `encode` and `losses`. AbsTopK sets
      `signed`; Gated adds a term to `losses`; Archetypal makes `dictionary` from its points and restores its
      constraints in `after_step`.
    - BatchTopK = MutualChoice, FeatureChoice, TopAFA: select over the whole batch while `training`, and use threshold
      buffers (averaged over ranks by `reduce`) in `eval`; `finish` may calibrate them.
    - GradientTopK (g-SAE): `needs = {"grads"}`, and reads `batch["grads"]` in `encode`.
    - Matryoshka: sums its reconstruction over prefixes in `losses`. End-to-end training: `losses` over the model's
      output, which the module puts into the batch.
    - MatchingPursuit, PolySAE, Variational: an unrolled `encode`; an own `decode` (`linear_decode = False`); sampling
      in `encode` while `training` and a KL term.
    - GroupBias (GBA): keeps its biases out of `parameter_groups` and moves them in `after_step`.
    - ITDA, SemiNMF, PCA, ICA, NMF, k-means: `gradient_free`; `partial_fit` sees one pass, `finish` concludes it.
    - Transcoder, SkipTranscoder: the stream `target`. Crosscoder: several streams, one code, `decode` gives a dict.
    - GroupSparse, VLSAE, AlignmentAutoencoder: several streams, one dictionary, a code for each stream
      (`SharedDictionary`). The last is trained before VLSAE, which reads its embeddings.
    - SAEV: one stream, `needs = {"token_type"}`, statistics per modality in buffers.

    Tensors may have any leading dimensions; `train()` and `eval()` decide between training and inference.

    Args:
        spec: Widths of the streams; an int is the width of the only one.
        d_latent: Number of latents.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Batch keys beyond `acts`."""
    gradient_free: ClassVar[bool] = False
    """Trained by `partial_fit` and `finish` instead of `losses` and an optimizer."""
    signed: ClassVar[bool] = False
    """Codes may be negative."""
    linear_decode: ClassVar[bool] = True
    """`decode` is affine in the codes, so that `dictionary` tells everything."""
    reduce: ClassVar[Mapping[str, str]] = {}
    """Buffer name to how it is combined over ranks after each step: "sum", "mean", "min" or "max"."""

    rows_seen: Tensor
    rows_since_fired: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("encode", "decode", "losses"):
            if name in cls.__dict__:
                setattr(cls, name, untraced(cls.__dict__[name]))

    def __init__(self, spec: ActivationSpec | int, d_latent: int) -> None:
        super().__init__()
        self.spec = ActivationSpec.of(spec)
        self.d_latent = checked("d_latent", d_latent, 1)
        self.rows_counted: int | None = None  # rows_seen, known without asking the device
        self.register_buffer("rows_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rows_since_fired", torch.zeros(d_latent, dtype=torch.int64))

    # ---- what every core has

    @abstractmethod
    def encode(self, x: Tensor | dict[str, Tensor], batch: Batch | None = None) -> Codes:
        """Codes of activations.

        Args:
            x: `[..., d_in]`, or a dict of them by stream for cores that read several.
            batch: For cores with `needs`.
        """

    @abstractmethod
    def decode(self, codes: Codes) -> Tensor | dict[str, Tensor]:
        """Reconstruction `[..., d_out]`, or a dict of them by stream."""

    @property
    @abstractmethod
    def dictionary(self) -> Tensor:
        """First-order direction of each latent `[d_latent, d_out]`: what steering and analyses use."""

    @abstractmethod
    def fold(self, affine: Mapping[str, Affine]) -> None:
        """Absorb the normalisation of each stream, so that the core takes and gives raw activations.

        Reconstructions become exactly those of the normalised pipeline. Codes may change unit by one positive factor
        per latent, so that decoder rows have norm 1 where the selection allows it.
        """

    # ---- training; a gradient-free core implements partial_fit, any other losses

    def losses(self, batch: Batch) -> Losses:
        """Loss terms of a batch; by default the squared error, summed over the width and averaged over the rows."""
        codes = self.encode(self.inputs(batch), batch)
        reconstruction = self.decode(codes)
        error = squared_error(self.target(batch), self.joined(reconstruction))
        return Losses({"reconstruction": error}, codes, reconstruction)

    def partial_fit(self, batch: Batch) -> None:
        """Learn from a batch without gradients."""
        raise MmsaeError(f"{type(self).__name__} learns by gradients: call losses, not partial_fit.")

    def start(self, batch: Batch) -> None:
        """Data-dependent initialisation from a sample of normalised rows, once, before the first step."""

    def before_step(self) -> None:
        """After the backward pass, before clipping and the optimizer: projections of gradients."""

    def after_step(self, step: int, codes: Codes) -> None:
        """After the optimizer: decoder norms, thresholds, bias adaptation. `step` counts from 1."""

    def finish(self) -> None:
        """After the last step, before the export."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer; leave out what must not receive gradients."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    # ---- shared

    def inputs(self, batch: Batch) -> Tensor:
        """The stream that is read."""
        return batch[ACTS][self.spec.input]

    def target(self, batch: Batch) -> Tensor:
        """What is reconstructed: `target` for transcoders, else the input; several streams side by side."""
        return self.joined({stream: batch[ACTS][stream] for stream in self.outputs})

    def check(self, data: ActivationSpec) -> None:
        """Raise unless data have the streams that are read."""
        for stream, width in self.spec.streams.items():
            if stream != TARGET:
                data.require(stream, width)

    @property
    def outputs(self) -> list[str]:
        """Streams that are reconstructed."""
        return [TARGET if TARGET in self.spec.streams else self.spec.input]

    def by_stream(self, reconstruction: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        """A reconstruction by stream, in the order of `outputs`."""
        if isinstance(reconstruction, Tensor):
            widths = [self.spec.streams[stream] for stream in self.outputs]
            return dict(zip(self.outputs, reconstruction.split(widths, -1), strict=True))
        return {stream: reconstruction[stream] for stream in self.outputs}

    def joined(self, reconstruction: Tensor | dict[str, Tensor]) -> Tensor:
        """A reconstruction with its streams side by side, in the order of `outputs`."""
        if isinstance(reconstruction, Tensor):
            return reconstruction
        parts = [reconstruction[stream] for stream in self.outputs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def by_row(self, codes: Codes, columns: dict[str, Tensor]) -> tuple[Codes, dict[str, Tensor]]:
        """Codes of a batch as they are stored, one row after the other, with the metadata of each row."""
        return codes, columns

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Reconstruction of activations."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def count(self, firings: Tensor, n_rows: int) -> None:
        """Keep the books of dead latents; `firings` `[d_latent]` and `n_rows` are totals over all ranks."""
        if self.rows_counted is None:
            self.rows_counted = int(self.rows_seen)
        self.rows_counted += n_rows
        self.rows_seen += n_rows
        self.rows_since_fired += n_rows
        self.rows_since_fired[firings > 0] = 0

    def dead_latents(self, dead_after: int) -> Tensor:
        """Latents that have not fired for `dead_after` rows, int64 `[n]`.

        Waits for the device only if there can be any.
        """
        if self.rows_counted is not None and self.rows_counted < dead_after and self.rows_seen.device.type != "cpu":
            return torch.empty(0, dtype=torch.int64, device=self.rows_seen.device)
        return (self.rows_since_fired >= dead_after).nonzero()[:, 0]

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON: `type(core)(**core.config)` rebuilds it."""
        arguments = {}
        for name in inspect.signature(type(self).__init__).parameters:
            if name == "self":
                continue
            if not hasattr(self, name):
                raise MmsaeError(
                    f"{type(self).__name__} does not store its argument {name!r} as self.{name}, "
                    "so a checkpoint could not rebuild it; store it in __init__."
                )
            value = getattr(self, name)
            if isinstance(value, ActivationSpec):
                value = dict(value.streams)
            arguments[name] = list(value) if isinstance(value, tuple) else value
        return arguments


def untraced(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method as it is, and a break in the graph where `torch.compile` traces a model that calls it.

    Sparse selections look at their data, and the kernels are compiled already: tracing would fail and bring nothing.
    """
    hidden = torch._disable_dynamo(method)  # the public name imports the compiler, which takes seconds

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (hidden if torch.compiler.is_dynamo_compiling() else method)(*args, **kwargs)

    return call


def squared_error(target: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error, summed over the width and averaged over the rows."""
    return (target - reconstruction).pow(2).sum(-1).mean()


def variance(x: Tensor) -> Tensor:
    """Squared distance from the mean row, summed over the width and averaged over the rows."""
    return (x - x.mean(0)).pow(2).sum(-1).mean()


def geometric_median(x: Tensor, n_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point of least summed distance to the rows `[n, width]`, by Weiszfeld's iteration."""
    point = x.mean(0)
    for _ in range(n_iterations):
        weights = 1 / (x - point).norm(dim=-1).clamp_min(1e-8)
        new = (x * weights[:, None]).sum(0) / weights.sum()
        if (new - point).norm() <= tolerance * new.norm().clamp_min(1e-8):
            return new
        point = new
    return point

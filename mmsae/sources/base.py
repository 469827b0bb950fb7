"""What a source is: a model, the points where it is read, and everything that depends on its modality."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from mmsae.errors import MmsaeError, nearest
from mmsae.hooks import HookPoint, capture, differentiable, edit, resolve
from mmsae.layout import from_positions, to_positions
from mmsae.sources.items import columns_of, sample_ids
from mmsae.sources.positions import Positions, checked_positions, choose, grid_places, ordinary_norms, pooled
from mmsae.spec import ACTS, GRADS, MODALITIES, ActivationSpec, Batch, map_batch

_ONE_AT_A_TIME = threading.RLock()
"""Hooks are on the model, so a chunk that is read in the background and a validation must not run it together."""


class Source(ABC):
    """A model and how to read its activations.

    A subclass writes `load`, `tensors`, `forward` and `example_items`, and whatever of the rest its modality needs.

    Args:
        hook_points: Where to read, see `mmsae.hooks`; globs are allowed.
        positions: Which positions become rows.
        drop_special: Leave out class tokens, delimiters and registers.
        drop_outliers: Leave out positions with more than this multiple of the median norm in the batch.
        device: "auto" takes the GPU if there is one.
    """

    modality: str
    channels_last: bool = False  # feature maps are [B, H, W, C]

    def __init__(
        self,
        hook_points: Sequence[str],
        positions: Positions = "all",
        drop_special: bool = False,
        drop_outliers: float | None = None,
        device: str = "auto",
    ) -> None:
        if self.modality not in MODALITIES:
            raise MmsaeError(f"modality={self.modality!r} is unknown; nearest: {nearest(self.modality, MODALITIES)}.")
        checked_positions(positions, drop_outliers, self.modality)
        self.hook_points = [hook_points] if isinstance(hook_points, str) else list(hook_points)
        self.positions: Positions = positions
        self.drop_special = drop_special
        self.drop_outliers = drop_outliers
        self.device = device_of(device)
        self._model: nn.Module | None = None
        self._points: list[HookPoint] = []

    # What a subclass writes.

    @abstractmethod
    def load(self) -> nn.Module:
        """Build the model and read its weights; called once, with a fixed seed for weights that stay random."""

    @abstractmethod
    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Turn the contents of items into tensors for `forward`."""

    @abstractmethod
    def forward(self, batch: dict[str, Any]) -> Any:
        """Run the model on a collated batch; the caller decides about gradients."""

    @abstractmethod
    def example_items(self) -> list[dict[str, Any]]:
        """A few small items, to find the widths of the streams without data."""

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """What stands at each position, int64 `[B, T]`: see `mmsae.sources.positions`."""
        return torch.zeros(len(batch["sample_id"]), T, dtype=torch.int64)

    def grid(self, batch: dict[str, Any], T: int) -> tuple[Tensor, Tensor]:
        """Row and column of each position on the patch grid, int64 `[B, T]` each, -1 where there is none."""
        return grid_places(len(batch["sample_id"]), T, 0, 0, 0)

    def columns(self, batch: dict[str, Any], T: int) -> dict[str, Tensor]:
        """Further columns of each position (token ids, roles, seconds): name to `[B, T]`."""
        return {}

    def outcomes(self, output: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Downstream measures of what `forward` returned: name to float `[B]`; empty where there is none."""
        return {}

    def predictions(self, output: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the model decides: logits `[n, n_classes]`, and the true classes int64 `[n]`, -1 where unknown."""
        raise MmsaeError(f"{type(self).__name__} knows no loss of its model: give a source with a task.")

    def generate(self, items: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        """What the model makes of items by itself, one entry each: a `text` that it writes, or a `posterior`.

        A `posterior` maps labels to probabilities of their values, `[n_values]`, on the CPU.

        Args:
            items: As `collate` takes them; answers at the end of a dialogue are left out.
            settings: Of models that write: `max_new_tokens`, `temperature` (0: the likeliest token), `seed`.
        """
        raise MmsaeError(
            f"{type(self).__name__} neither writes nor decides: give a source with a task or prompts, or let a probe "
            "decide."
        )

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """An item for a reader: `{"kind": "image", "image", "text"}`, or `{"kind": "text", "tokens"}`, as positions."""
        return {"kind": "text", "tokens": [str(item.get("text", item.get("sample_id", "")))]}

    def render_stream(self, item: dict[str, Any], stream: str) -> dict[str, Any]:
        """What one stream of a pair sees of an item, for a reader, in the same form; by default all of it."""
        return self.render(item)

    def describe(self) -> dict[str, Any]:
        """What identifies the model, JSON: name, weights, arguments."""
        return {}

    # What every source does in the same way.

    @property
    def model(self) -> nn.Module:
        """The model: loaded once, in eval mode, without gradients for its weights, on the device."""
        if self._model is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # a model without trained weights is the same one in every run
                model = self.load()
            self._points = resolve(model, self.hook_points)
            self._model = model.eval().requires_grad_(False).to(self.device)
        return self._model

    @property
    def placed(self) -> torch.device:
        """Where the model is now; a trainer that took it as a submodule may have moved it from `device`."""
        return next((weight.device for weight in self.model.parameters()), self.device)

    @property
    def points(self) -> list[HookPoint]:
        """The hook points, globs expanded."""
        return self._points if self._model is not None else (self.model, self._points)[1]

    @cached_property
    def spec(self) -> ActivationSpec:
        """Widths of the streams, from one forward pass over `example_items`."""
        acts = self.read(self.collate(self.example_items()))[ACTS]
        return ActivationSpec({name: rows.shape[1] for name, rows in acts.items()})

    @property
    def identity(self) -> dict[str, Any]:
        """What a store has to know to be compared with another one: model, revision, hook points, positions; JSON."""
        return {
            "class": type(self).__name__,
            **self.describe(),
            "weights": fingerprint(self.model),
            "modality": self.modality,
            "hook_points": [point.name for point in self.points],
            "positions": self.positions,
            "drop_special": self.drop_special,
            "drop_outliers": self.drop_outliers,
        }

    def loss(self, output: Any, batch: dict[str, Any]) -> Tensor:
        """Cross entropy in nats, summed over all that is predicted; what has no truth is measured by its own choice."""
        logits, truth = self.predictions(output, batch)
        truth = torch.where(truth >= 0, truth, logits.argmax(-1))
        return cross_entropy(_wide(logits), truth, reduction="sum")

    def divergence(self, output: Any, clean: Any, batch: dict[str, Any]) -> Tensor:
        """Mean Kullback-Leibler divergence in nats from the predictions of the `clean` output to those of `output`."""
        ours, theirs = (_wide(self.predictions(o, batch)[0]).log_softmax(-1) for o in (output, clean))
        return kl_div(ours, theirs, reduction="batchmean", log_target=True)

    @contextmanager
    def spliced(
        self, batch: dict[str, Any], replace: Mapping[str, Callable[[Tensor], Tensor]], also: Sequence[str] = ()
    ) -> Iterator[dict[str, Tensor]]:
        """Replace activations while the model runs on a batch.

        Args:
            batch: As collated.
            replace: Hook point to a function from the rows that `read` gives `[rows, width]` to their replacement.
            also: Further hook points.

        Yields:
            A dict that fills with what flows through the further points, differentiable by the replacements.
        """

        def splice(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
            x, _ = to_positions(tensor, self.channels_last)
            chosen = self.selected(batch, x).to(x.device)
            x = x.clone()
            x[chosen] = change(x[chosen]).to(x.dtype)
            return from_positions(x, tensor.shape, self.channels_last)

        edits = {name: partial(splice, change) for name, change in replace.items()}
        with differentiable(self.model, also) as found, edit(self.model, edits):
            yield found

    def check_points(self, patterns: Sequence[str]) -> None:
        """Refuse hook points that the model has not."""
        resolve(self.model, patterns)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch for `forward` and `read`, on the CPU.

        Args:
            items: Dicts with an integer `sample_id`, the contents, optional `labels` (name to int) and numbers.

        Returns:
            What `tensors` gives, `sample_id` int64 `[B]`, and `columns`: name to `[B]`, labels as `label.<name>`.
        """
        return {**self.tensors(items), "sample_id": sample_ids(items), "columns": columns_of(items)}

    def selected(self, batch: dict[str, Any], acts: Tensor) -> Tensor:
        """Which positions are read (for `mean`: pooled), bool `[B, T]`.

        Args:
            batch: As collated.
            acts: `[B, T, D]`.
        """
        wanted = choose(self.kinds(batch, acts.shape[1]).to(acts.device), self.positions, self.drop_special)
        if self.drop_outliers is not None:
            wanted = wanted & ordinary_norms(acts, wanted, self.drop_outliers)
        return wanted

    def read(self, batch: dict[str, Any], gradients: bool = False) -> Batch:
        """Run the model as far as needed and return one row per selected position.

        Args:
            batch: As collated.
            gradients: Also run it backwards from its `loss`.

        Returns:
            `acts` (stream to `[rows, width]`, in the precision of the model); with `gradients` also `grads`, the same
            of the gradients of the summed loss (for a mean over positions: by a shift of all of them); int64 `[rows]`
            `sample_id`, `position`, `row`, `column`, `kind`, `modality` (-1: no such place; a mean has position -1);
            the columns of the batch and of the positions, one entry a row.

        Raises:
            MmsaeError: Streams have different positions, or an activation is not finite.
        """
        slopes: dict[str, Tensor] = {}
        if gradients:
            captured, slopes = self._gradients(batch)
        else:
            model = self.model
            with _ONE_AT_A_TIME, torch.no_grad(), capture(model, self.points) as captured:
                self.forward(batch)
        return self._as_rows(captured, slopes, batch)

    def run(self, batch: dict[str, Any], also: Sequence[str] = ()) -> tuple[Batch, Any, dict[str, Tensor]]:
        """Run the whole model, without gradients.

        Args:
            batch: As collated.
            also: Further hook points.

        Returns:
            Rows as `read` gives them, what `forward` returned, and the tensors at the further points.
        """
        model = self.model
        points = [*self.points, *resolve(model, also)] if also else self.points
        with _ONE_AT_A_TIME, torch.no_grad(), capture(model, points, stop=False) as captured:
            output = self.forward(batch)
        further = {point.name: captured[point.name] for point in points[len(self.points) :]}
        return self._as_rows({p.name: captured[p.name] for p in self.points}, {}, batch), output, further

    def _as_rows(self, captured: Mapping[str, Tensor], by_point: Mapping[str, Tensor], batch: dict[str, Any]) -> Batch:
        """One row per selected position, of activations and of gradients if there are some."""
        acts, places = self._positions(captured, batch)
        slopes = self._positions(by_point, batch)[0] if by_point else {}
        stream = next(iter(acts.values()))
        device = stream.device
        chosen = torch.stack([self.selected(batch, other) for other in acts.values()]).all(0)

        if self.positions == "mean":
            rows = {name: pooled(other, chosen) for name, other in acts.items()}
            slopes = {name: (x * chosen[..., None]).sum(1)[chosen.any(1)] for name, x in slopes.items()}
            example = chosen.any(1).nonzero()[:, 0]
            nowhere = torch.full_like(example, -1)
            where = {"position": nowhere, "row": nowhere, "column": nowhere, "kind": torch.zeros_like(example)}
        else:
            rows = {name: other[chosen] for name, other in acts.items()}
            slopes = {name: other[chosen] for name, other in slopes.items()}
            example, position = chosen.nonzero(as_tuple=True)
            kind, (row, column) = self.kinds(batch, stream.shape[1]), places
            found = {"row": row, "column": column, "kind": kind, **self.columns(batch, stream.shape[1])}
            where = {"position": position, **{key: of.to(device)[example, position] for key, of in found.items()}}

        sample_id = batch["sample_id"].to(device)[example]
        _finite(rows, sample_id)
        _finite(slopes, sample_id, "gradients")
        columns = {name: values.to(device)[example] for name, values in batch["columns"].items()}
        modality = torch.full_like(example, MODALITIES[self.modality])
        streams = {ACTS: rows, GRADS: slopes} if slopes else {ACTS: rows}
        return {**streams, "sample_id": sample_id, **where, "modality": modality, **columns}

    def _gradients(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations at the hook points, and the gradients of the loss by them, in the model's own shapes."""
        model = self.model
        with _ONE_AT_A_TIME, torch.inference_mode(False), torch.enable_grad():
            batch = {**batch, **map_batch(batch, torch.clone)}  # what was collated in inference mode takes no gradient
            with differentiable(model, self.points) as found:
                loss = self.loss(self.forward(batch), batch)
            if not loss.requires_grad:
                raise MmsaeError(f"the loss of {type(self).__name__} does not depend on the activations.")
            slopes = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
        if silent := [name for name, slope in zip(found, slopes, strict=True) if slope is None]:
            raise MmsaeError(f"the loss does not depend on {silent[0]!r}: choose a hook point before the output.")
        return {n: x.detach() for n, x in found.items()}, dict(zip(found, slopes, strict=True))

    def _positions(
        self, captured: Mapping[str, Tensor], batch: dict[str, Any]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """The streams as `[B, T, D]` with equal B and T, and the places of the positions."""
        laid = {name: to_positions(tensor, self.channels_last) for name, tensor in captured.items()}
        acts = {name: laid[name][0] for name in [point.name for point in self.points]}
        first, stream = next(iter(acts.items()))
        B, T = len(batch["sample_id"]), stream.shape[1]
        for name, other in acts.items():
            if len(other) != B:
                raise MmsaeError(
                    f"hook point {name!r} gives {len(other)} examples for a batch of {B}; hook a module whose first "
                    "axis is the batch."
                )
            if other.shape[1] != T:
                raise MmsaeError(
                    f"hook points {first!r} and {name!r} have {T} and {other.shape[1]} positions; extract them "
                    "separately."
                )
        shape = laid[first][1]
        places = grid_places(B, T, 0, *shape) if shape else self.grid(batch, T)
        return acts, places

    def __getstate__(self) -> dict[str, Any]:
        """Data workers need `collate`, not the weights."""
        return {**self.__dict__, "_model": None}


def device_of(device: str) -> torch.device:
    """The torch device for a name; "auto" is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise MmsaeError(f"device={device!r} is unknown; choose auto, cpu, cuda or cuda:1.") from error


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of the names, shapes and first values of all weights; cheap for large models."""
    digest = hashlib.sha256()
    samples = [torch.zeros(0)]
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)};".encode())
        samples.append(tensor.detach().flatten()[:16].float().cpu())
    digest.update(torch.cat(samples).numpy().tobytes())
    return digest.hexdigest()[:16]


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _finite(rows: Mapping[str, Tensor], sample_id: Tensor, what: str = "activations") -> None:
    for name, stream in rows.items():
        bad = ~torch.isfinite(stream).all(1)
        if bad.any():
            ids = sample_id[bad].unique().tolist()
            shown = ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
            raise MmsaeError(
                f"the {what} at {name!r} are not finite for sample_id {shown}; check these items, or run the "
                "model in float32."
            )

"""Encoders of time series: ECG, EEG, wearables."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mmsae.errors import MmsaeError, checked, nearest
from mmsae.sources.base import Source
from mmsae.sources.image import Task, classification, decided, stacked
from mmsae.sources.positions import patch_kinds
from mmsae.sources.weights import first_line, load_weights, located, needs

Layout = Literal["time", "channel_time", "time_channel"]
"""How positions stand: windows of time; channel by channel the windows of each; window by window its channels."""

Standardise = Literal["model", "window", "none"]
STANDARDISED = "standard deviations"
"""Unit of signals that the data have standardised."""

PER_CHANNEL = {"Labram": 1, "BIOT": 0}
"""Models of braindecode whose tokens are windows of single channels, and their class tokens."""


class Signal(Source):
    """An encoder of time series: ECG-JEPA and other encoders of ours, or a model of braindecode.

    Items hold a `signal`, float `[C, T]` in physical units, and should hold its `rate` in Hz and the names of its
    `channels`; channels are put into the order that the encoder was trained on. Rows carry `start_s` and `duration_s`
    (of the window that a token is of, in seconds of the item; evenly shared where a model convolves), `channel` (-1:
    all), and where items have `events`, `label.event`: the one that covers most of the window.

        from datamodules import SimulatedECGs
        from mmsae.sources import Signal

        source = Signal("miniature:ecg_jepa", ["norm"])
        data = SimulatedECGs(source=source)

    Args:
        model: `miniature:ecg_jepa`; a folder with `config.json` and `model.safetensors`, see `mmsae.encoders`; a class
            of ours to be built with random weights (ECGJEPA, SignalTransformer); or a class of braindecode, such as
            EEGConformer, Labram or ShallowFBCSPNet.
        hook_points: Where to read. Ours: `blocks.*`, `norm`. EEGConformer: `transformer.*`; Labram: `blocks.*`;
            ShallowFBCSPNet: `pool`.
        config: Arguments of the class; braindecode needs `n_chans`, `n_times`, `n_outputs` and mostly `sfreq`.
        checkpoint: Weight file to load.
        standardise: "model" by the moments of the encoder's training data, if it knows them and the data are not
            standardised themselves; "window" every channel of an item by its own; "none". Then clipped as in training.
        layout: How positions stand; by default as known of the model, else "time".
        prefix_tokens: Class tokens in front; by default as known of the model.
        task: "classification" measures logits against the label `class`.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    modality = "signal"

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        config: dict[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        standardise: Standardise = "model",
        layout: Layout | None = None,
        prefix_tokens: int | None = None,
        task: Task | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(hook_points, **kwargs)
        if layout not in (None, *get_args(Layout)):
            raise MmsaeError(f"layout={layout!r} is unknown; choose {', '.join(get_args(Layout))}.")
        if standardise not in get_args(Standardise):
            raise MmsaeError(f"standardise={standardise!r} is unknown; choose {', '.join(get_args(Standardise))}.")
        self.name = str(model)
        self.config = config or {}
        self.checkpoint = checkpoint
        self.standardise: Standardise = standardise
        self.layout, self.prefix = layout, prefix_tokens
        self.task = task
        self.registers = False  # what stands in front are registers, not class tokens
        self.trained: dict[str, Any] = {}  # what the encoder was trained on: rate, channels, mean, std, clip
        self.shape = (0, 0)  # channels, and samples of an example
        self.fixed = False  # whether all items need that number of samples
        self.known_names: list[str] = []  # of channels, where the model has to be told which it is given

    def load(self) -> nn.Module:
        """Read the folder, or build the class and load its weights."""
        from mmsae.encoders import ENCODERS, built, described, read_encoder

        name = located(self.name)
        if Path(name).is_dir():
            file = "model.safetensors" if self.checkpoint is None else Path(self.checkpoint).expanduser().absolute()
            model, content = read_encoder(name, file)
            self.trained = content.get("preprocess", {})
        elif name in ENCODERS:
            model = built(name, self.config)
            if self.checkpoint:
                load_weights(model, self.checkpoint)
        elif "/" in name or "." in name:
            described(name)  # says that there is none
        else:
            return self._braindecode(name)
        self.shape = (model.n_channels, 8 * model.patch)
        self._presume("time" if model.tokens == "joint" else "channel_time", model.n_registers)
        self.registers = True
        return model

    def _braindecode(self, name: str) -> nn.Module:
        models = needs("braindecode.models", f"the model {name!r}", "eeg")
        known = [n for n, found in vars(models).items() if isinstance(found, type) and issubclass(found, nn.Module)]
        if name not in known:
            raise MmsaeError(f"neither mmsae nor braindecode has an encoder {name!r}; nearest: {nearest(name, known)}.")
        try:
            model = getattr(models, name)(**self.config)
            self.shape = (int(model.n_chans), int(model.n_times))
        except Exception as error:  # any: arguments that are missing, unknown, or do not go together
            why = first_line(error)
            raise MmsaeError(f"braindecode cannot build {name} with config {self.config} ({why}).") from error
        if self.checkpoint:
            load_weights(model, self.checkpoint)
        self.fixed = True
        if "ch_names" in signature(model.forward).parameters:
            known_names = vars(import_module(type(model).__module__)).get("LABRAM_CHANNEL_ORDER", ())
            self.known_names = [str(channel) for channel in known_names]
        self._presume("channel_time" if name in PER_CHANNEL else "time", PER_CHANNEL.get(name, 0))
        return model

    def _presume(self, layout: Layout, prefix: int) -> None:
        self.layout = layout if self.layout is None else self.layout
        self.prefix = prefix if self.prefix is None else checked("prefix_tokens", self.prefix, 0)

    def example_items(self) -> list[dict[str, Any]]:
        """Noise of the encoder's shape."""
        self.model  # noqa: B018, loading sets the shape
        noise = torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))
        channels = {"channels": self.known_names[: self.shape[0]]} if self.known_names else {}
        return [{"signal": noise[i], "sample_id": i, "labels": {"class": 0}, **channels} for i in range(2)]

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`input` float `[B, C, T]`, `seconds` `[B]` (NaN where the rate is unknown), `events`, and `channels`."""
        self.model  # noqa: B018, loading tells the channels and the rate
        rates = [float(item.get("rate") or self.trained.get("rate") or float("nan")) for item in items]
        signals = stacked([self._prepared(item) for item in items])
        return {
            "input": signals,
            "seconds": signals.shape[2] / torch.tensor(rates, dtype=torch.float64),
            "events": event_table(items),
            "channels": [str(name) for name in items[0].get("channels") or ()],
        }

    def forward(self, batch: dict[str, Any]) -> Any:
        """What the model returns for `batch["input"]`."""
        weight = next(self.model.parameters())
        x = batch["input"].to(weight.device, weight.dtype)
        if not (self.known_names and batch["channels"]):
            return self.model(x)
        unknown = {name.upper() for name in batch["channels"]} - {name.upper() for name in self.known_names}
        if unknown:
            raise MmsaeError(f"{self.name} does not know the channel {sorted(unknown)[0]}: set data.channels.")
        return self.model(x, ch_names=batch["channels"])

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Class tokens or registers, then windows."""
        first = self._first(T)
        return patch_kinds(len(batch["sample_id"]), T, first, first if self.registers else 0)

    def columns(self, batch: dict[str, Any], T: int) -> dict[str, Tensor]:
        """`start_s`, `duration_s`, `channel`, and `label.event` where items have events."""
        B, first = len(batch["sample_id"]), self._first(T)
        window, channel, n = self._places(T - first)
        duration = (batch["seconds"].cpu() / n)[:, None].expand(B, T - first)  # [B, T]
        start = window * duration
        found = {
            "start_s": torch.cat([torch.zeros(B, first), start.float()], 1),
            "duration_s": torch.cat([batch["seconds"].cpu().float()[:, None].expand(B, first), duration.float()], 1),
            "channel": torch.cat([torch.full((first,), -1), channel]).expand(B, T),
        }
        if "events" in batch and batch["events"].shape[1]:
            covered = torch.full((B, T), -1)
            covered[:, first:] = covering(batch["events"].cpu(), start, start + duration)
            found["label.event"] = covered
        return found

    def outcomes(self, output: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`cross_entropy` (nats) and `accuracy` (0 or 1) against the label `class`, with `task="classification"`."""
        return classification(output, batch) if self.task == "classification" else {}

    def predictions(self, output: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits of the classes, and the label `class`."""
        if not isinstance(output, Tensor) or output.dim() != 2:
            return super().predictions(output, batch)
        labels = batch["columns"].get("label.class", torch.full((len(output),), -1))
        return output, labels.to(output.device)

    def generate(self, items: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        """The posterior of `class`, with `task="classification"`."""
        return decided(self, items) if self.task == "classification" else super().generate(items, **settings)

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The curves in physical units, as they were recorded."""
        return render_signal(item)

    def describe(self) -> dict[str, Any]:
        """Name, arguments, weights and how signals are prepared."""
        checkpoint = str(self.checkpoint) if self.checkpoint else None
        given = {"config": self.config, "checkpoint": checkpoint, "standardise": self.standardise}
        return {"model": self.name, "revision": None, **given}

    def _prepared(self, item: dict[str, Any]) -> Tensor:
        """An item's signal as the encoder reads it."""
        here, x = f"item {item.get('sample_id')}", signal_of(item)
        wanted, have = self.trained.get("channels"), item.get("channels")
        if wanted and have:
            x = x[channel_order(have, wanted, here)]
        if len(x) != self.shape[0]:
            raise MmsaeError(f"{here} has {len(x)} channels, but {self.name} reads {self.shape[0]}: set data.channels.")
        if self.fixed and x.shape[1] != self.shape[1]:
            raise MmsaeError(
                f"{here} has {x.shape[1]} samples, but {self.name} reads {self.shape[1]}: set n_times in the config of "
                "the source, or the window and the rate of the data."
            )
        rate, trained = item.get("rate"), self.trained.get("rate")
        if rate and trained and abs(rate - trained) > 1e-3 * trained:
            raise MmsaeError(f"{here} has {rate:g} Hz, but {self.name} was trained at {trained:g}: set data.rate.")
        if not torch.isfinite(x).all():
            raise MmsaeError(f"the signal of {here} is not finite; leave it out of the data.")
        if self.standardise == "window":
            x = (x - x.mean(1, keepdim=True)) / deviation(x)
        elif self.standardise == "model" and "mean" in self.trained and item.get("unit") != STANDARDISED:
            unit, expected = (str(of.get("unit") or "").lower().replace("µ", "u") for of in (item, self.trained))
            if unit and expected and unit != expected:
                raise MmsaeError(f"{here} is in {item['unit']}, but {self.name} was trained on {self.trained['unit']}.")
            mean, std = (torch.tensor(self.trained[key])[:, None] for key in ("mean", "std"))
            x = (x - mean) / std
        clip = self.trained.get("clip")
        return x if clip is None else x.clamp(-clip, clip)

    def _first(self, T: int) -> int:
        """Tokens in front of the windows."""
        return (self.prefix or 0) if (self.prefix or 0) + 1 < T else 0  # a pooled vector has none

    def _places(self, n: int) -> tuple[Tensor, Tensor, int]:
        """Window and channel of `n` positions, and the number of windows."""
        index, C = torch.arange(n), self.shape[0]
        if self.layout == "time" or n == 1:
            return index, torch.full((n,), -1), n
        if n % C:
            raise MmsaeError(f"{n} positions are no windows of {C} channels: set layout='time' or prefix_tokens.")
        if self.layout == "channel_time":
            return index % (n // C), index // (n // C), n // C
        return index // C, index % C, n // C


def signal_of(item: dict[str, Any]) -> Tensor:
    """The signal of an item, float32 `[C, T]`; MmsaeError naming an item without one."""
    value = item.get("signal", item.get("input"))
    if value is None:
        raise MmsaeError(f"item {item.get('sample_id')} has no 'signal'; it has {', '.join(item)}.")
    x = torch.as_tensor(value)
    if x.dim() != 2:
        raise MmsaeError(
            f"the signal of item {item.get('sample_id')} has the shape {tuple(x.shape)}; give [channels, samples]."
        )
    return x.float()


def plain(channel: str) -> str:
    """A channel's name without what writers differ in: capitals, dots, spaces, a leading "EEG"."""
    name = "".join(character for character in channel.lower() if character not in ". _-")
    return name.removeprefix("eeg") or name


def channel_order(have: Sequence[str], wanted: Sequence[str], where: str) -> list[int]:
    """Indices of the wanted channels among those that are there, whatever their capitals and dots; else MmsaeError."""
    index = {plain(name): i for i, name in enumerate(have)}
    missing = [name for name in wanted if plain(name) not in index]
    if missing:
        raise MmsaeError(f"{where} has no channel {', '.join(missing)}; it has {', '.join(have)}.")
    return [index[plain(name)] for name in wanted]


def deviation(x: Tensor) -> Tensor:
    """Standard deviation of every channel, `[C, 1]`; 1 where a channel does not vary."""
    std = x.std(1, keepdim=True, correction=0)
    return torch.where(std > 1e-8, std, 1.0)


def event_table(items: Sequence[dict[str, Any]]) -> Tensor:
    """Start and end (seconds) and value of the events of each item, float64 `[B, E, 3]`.

    The value is the index of the event's name in the item's `event_names`; -1 fills up. Items of data that have no
    events give E = 0, items without any of their own E = 1.
    """
    rows = []
    for item in items:
        names = {str(name): i for i, name in enumerate(item.get("event_names") or ())}
        rows.append([(a, b, names[str(name)]) for a, b, name in item.get("events") or () if str(name) in names])
    longest = max(max(map(len, rows)), int(any(item.get("event_names") for item in items)))
    table = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).repeat(len(items), longest, 1)
    for filled, row in zip(table, rows, strict=True):
        if row:
            filled[: len(row)] = torch.tensor(row, dtype=torch.float64)
    return table


def covering(events: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The event that covers most of each window, as its value, int64 `[B, n]`; -1 where there is none.

    Args:
        events: See `event_table`, `[B, E, 3]`.
        start: Of the windows, seconds `[B, n]`.
        end: Of the windows, seconds `[B, n]`.
    """
    at_once = max(10_000_000 // (start.shape[1] * events.shape[1]), 1)  # whole recordings have thousands of beats
    parts = [part.split(at_once) for part in (events, start, end)]
    return torch.cat([_covering(*part) for part in zip(*parts, strict=True)])


def _covering(events: Tensor, start: Tensor, end: Tensor) -> Tensor:
    a, b, value = (column[:, None] for column in events.unbind(-1))  # [B, 1, E]
    overlap = (torch.minimum(end[..., None], b) - torch.maximum(start[..., None], a)).clamp(min=0)
    overlap = overlap.nan_to_num(0.0)  # where seconds are unknown, no window lies anywhere
    total = overlap.new_zeros(*start.shape, int(value.max()) + 2)
    total.scatter_add_(2, (value.long() + 1).expand_as(overlap), overlap)  # short events of one kind count together
    most, which = total[..., 1:].max(-1) if total.shape[-1] > 1 else (total[..., 0], total[..., 0].long())
    return torch.where(most > 0, which, -1)


def render_signal(item: dict[str, Any]) -> dict[str, Any]:
    """An item for a reader: `values` float32 `[C, T]`, `rate`, `channels`, `unit`, `text`, `events`."""
    values = signal_of(item).cpu().numpy().astype(np.float32)
    channels = item.get("channels") or [str(i) for i in range(len(values))]
    return {
        "kind": "signal",
        "values": values,
        "rate": float(item.get("rate") or 1.0),
        "channels": list(channels),
        "unit": str(item.get("unit") or ""),
        "text": str(item.get("text") or ""),
        "events": [list(event) for event in item.get("events") or []],
    }

"""Interventions on any model: one operator, `x' = x + where * (decode(z') - decode(z))`, as a context manager."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.codes import Codes
from mmsae.cores.base import SAECore
from mmsae.cores.shared_dictionary import SharedDictionary
from mmsae.errors import MmsaeError
from mmsae.hooks import capture, edit, resolve
from mmsae.layout import from_positions, to_positions
from mmsae.sources.base import Source
from mmsae.steering.context import Context, Tracker
from mmsae.steering.edits import Add, CodesEdit, Edit, LatentEdit, Rows, VectorEdit

__all__ = ["Intervention", "codes_at", "edited", "intervene", "steer"]


@dataclass
class Intervention:
    """What is done at one hook point.

    Attributes:
        dictionary: Folded, in `eval` mode; None if all edits move the activation itself.
        hook_point: Where, see `mmsae.hooks`; exactly one module.
        edits: In the order in which they apply.
        where: Weight of every position (`mmsae.steering.where`); None is everywhere.
        keep_error: Keep what the dictionary does not explain. Without, the activation becomes what the new codes
            decode to.
        scale: What a strength of 1 is worth, for each latent `[d_latent]` or for all; None is a code of 1
            (`mmsae.steering.quantiles` gives a quantile of each latent's own activations).
    """

    dictionary: SAECore | None
    hook_point: str
    edits: Sequence[Edit]
    where: Callable[[Context], Tensor] | None = None
    keep_error: bool = True
    scale: Tensor | float | None = None


@contextmanager
def steer(
    model: Any,
    dictionary: SAECore | None,
    hook_point: str,
    edits: Edit | Sequence[Edit],
    where: Callable[[Context], Tensor] | None = None,
    keep_error: bool = True,
    scale: Tensor | float | None = None,
) -> Iterator[None]:
    """Steer a model at one hook point while the `with` is open; afterwards it is as it was, also after an exception.

        with steer(model, sae, "model.layers.8", [Add(1234, 4.0)], where=Generated()):
            model.generate(**inputs)

    Args:
        model: A module, a source of mmsae, or a pipeline of diffusers (hook points then begin with its part: `unet.…`).
        dictionary: See `Intervention`, as for all that follows.
        hook_point: Where.
        edits: One, or several in order.
        where: Weight of every position.
        keep_error: Keep what the dictionary does not explain.
        scale: Unit of strengths.

    Raises:
        MmsaeError: The hook point, a latent or a width does not fit; before the model runs where that can be known.
    """
    chosen = [edits] if isinstance(edits, Edit) else list(edits)
    with intervene(model, [Intervention(dictionary, hook_point, chosen, where, keep_error, scale)]):
        yield


@contextmanager
def intervene(model: Any, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Several interventions at once; those at the same point apply in their order.

    What `torch.compile` has compiled runs in plain Python meanwhile: compiled code would not notice.
    """
    modules, scheduler = modules_of(model)
    channels_last = model.channels_last if isinstance(model, Source) else False
    trackers: dict[str, Tracker] = {}
    functions = []
    for one in interventions:
        points = resolve(modules, [one.hook_point])
        if len(points) != 1:
            raise MmsaeError(
                f"{one.hook_point!r} matches {len(points)} modules; give an intervention for each of them."
            )
        # a bare Module holds the parts of a pipeline and is never called itself
        part = points[0].path.split(".")[0] if type(modules) is nn.Module else ""
        if part not in trackers:
            trackers[part] = Tracker(modules.get_submodule(part), scheduler)
        _warn_if_unread(trackers[part].root, points[0].path)
        functions.append((points[0].name, _Operator(one, trackers[part], channels_last)))
    with ExitStack() as stack:
        for tracker in trackers.values():
            stack.enter_context(tracker.following())
        for name, function in reversed(functions):  # nested edits of one point apply innermost first
            stack.enter_context(edit(modules, {name: function}))
        yield


@torch.no_grad()
def codes_at(
    model: Any, dictionary: SAECore, hook_point: str, run: Callable[[], Any], channels_last: bool = False
) -> Codes:
    """Codes `[B, T, …]` of one forward pass, to transplant them with `Patch` or to look at them.

    Args:
        model: As for `steer`.
        dictionary: Of this hook point.
        hook_point: Where to read; the first time that the module runs counts.
        run: Calls the model.
        channels_last: Feature maps are `[B, H, W, C]`.
    """
    modules, _ = modules_of(model)
    with capture(modules, [hook_point], stop=False) as found:
        run()
    x, _ = to_positions(next(iter(found.values())), channels_last)
    return dictionary.to(x.device).encode(x.float())


@torch.no_grad()
def edited(what: Intervention, x: Tensor) -> Tensor:
    """What an intervention makes of activations `[R, d]` as such, without running a model; `where` does not count.

    Args:
        what: Edits that ask about the running call (masks, `Patch` of several positions) cannot be told anything.
        x: Activations at the hook point.
    """
    here = torch.arange(len(x), device=x.device)
    rows = Rows(Context((len(x), 1), x.device), here, torch.zeros_like(here))
    return _Operator(what, Tracker(nn.Identity()), False)._edited(_wide(x), rows).to(x.dtype)


def modules_of(model: Any) -> tuple[nn.Module, Any]:
    """The module whose parts are hooked, and the scheduler of a pipeline."""
    if isinstance(model, Source):
        inner = model.model  # loading sets the pipeline
        pipe = getattr(model, "pipe", None)
        return (inner, None) if pipe is None else modules_of(pipe)
    if isinstance(model, nn.Module):
        model = getattr(model, "_orig_mod", model)  # compiled
        wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
        return (model.module if wrapped else model), None
    if hasattr(model, "components"):
        parts = nn.Module()
        for name, part in model.components.items():
            if isinstance(part, nn.Module):
                parts.add_module(name, part)
        return parts, getattr(model, "scheduler", None)
    raise MmsaeError(
        f"{type(model).__name__} cannot be steered; give a torch module, a source or a diffusers pipeline."
    )


class _Operator:
    """From the tensor at a hook point to the one that takes its place."""

    def __init__(self, what: Intervention, tracker: Tracker, channels_last: bool) -> None:
        self.what, self.tracker, self.channels_last = what, tracker, channels_last
        core = what.dictionary
        self.core = core
        if not what.edits:
            raise MmsaeError(f"no edit was given for {what.hook_point!r}; give Add, Ablate, Clamp …")
        self.groups: list[list[Edit]] = []
        for one in what.edits:
            if not isinstance(one, LatentEdit | CodesEdit | VectorEdit):
                raise MmsaeError(f"{one!r} is no edit; give Add, Scale, Clamp, Ablate, Suppress … of mmsae.steering.")
            grouped = isinstance(one, LatentEdit) and self.groups and isinstance(self.groups[-1][-1], LatentEdit)
            if grouped:
                self.groups[-1].append(one)
            else:
                self.groups.append([one])
        self.rows: Tensor | None = None
        if core is None:
            if any(not isinstance(one, VectorEdit) for one in what.edits):
                raise MmsaeError(f"the edits at {what.hook_point!r} name latents, so they need a dictionary.")
            return
        several = len(core.spec.streams) > 1
        self.stream = what.hook_point if what.hook_point in core.spec.streams else core.spec.input
        if several and not isinstance(core, SharedDictionary):  # transcoders, crosscoders
            if any(not isinstance(one, VectorEdit | Add) for one in what.edits):
                raise MmsaeError(
                    f"{type(core).__name__} reads more than {what.hook_point!r}: only Add and vectors steer with it."
                )
        elif several and what.hook_point not in core.spec.streams:
            raise MmsaeError(
                f"{type(core).__name__} has the streams {', '.join(core.spec.streams)}, and {what.hook_point!r} is "
                "none of them."
            )
        for one in what.edits:
            latents = getattr(one, "latents", None)
            if latents is not None and (int(latents.min()) < 0 or int(latents.max()) >= core.d_latent):
                raise MmsaeError(
                    f"{type(one).__name__} names latent {int(latents.max())}, but the dictionary has "
                    f"{core.d_latent} latents, from 0 to {core.d_latent - 1}."
                )
        self.unit = self._units(core.d_latent)
        own = getattr(core, "dictionaries", {})
        self.rows = own.get(what.hook_point, core.dictionary).detach()

    def __call__(self, tensor: Tensor) -> Tensor:
        """See the class."""
        x, grid = to_positions(tensor, self.channels_last)
        B, T, d = x.shape
        context = self.tracker.context(B, T, x.device, grid)
        with torch.autocast(x.device.type, enabled=False):
            if self.what.where is None:
                example = torch.arange(B, device=x.device).repeat_interleave(T)
                index = torch.arange(T, device=x.device).repeat(B)
                new = self._edited(_wide(x.reshape(B * T, d)), Rows(context, example, index)).to(x.dtype)
                return from_positions(new.view(B, T, d), tensor.shape, self.channels_last)
            weight = torch.as_tensor(self.what.where(context), device=x.device).expand(B, T)
            chosen = weight != 0
            example, index = chosen.nonzero(as_tuple=True)
            if not len(example):
                return tensor
            old = _wide(x[example, index])
            new = self._edited(old, Rows(context, example, index))
            if weight.dtype != torch.bool:
                share = weight[example, index][:, None].to(old)
                # a share of 1 must give the same bits as no share at all
                new = torch.where(share == 1, new, old + share * (new - old))
            x = x.clone(memory_format=torch.contiguous_format)
            x[example, index] = new.to(x.dtype)
        return from_positions(x, tensor.shape, self.channels_last)

    def _edited(self, x: Tensor, rows: Rows) -> Tensor:
        if self.rows is not None and x.shape[-1] != self.rows.shape[1]:
            raise MmsaeError(
                f"the dictionary writes vectors of width {self.rows.shape[1]}, but {self.what.hook_point!r} has width "
                f"{x.shape[-1]}; give the hook point that it was trained on."
            )
        for group in self.groups:
            if isinstance(group[0], VectorEdit):
                x = group[0].moved(x, rows)
            elif isinstance(group[0], CodesEdit):
                x = self._recoded(x, group[0], rows)
            else:
                x = self._steered(x, group, rows)
        return x

    def _steered(self, x: Tensor, group: list[Any], rows: Rows) -> Tensor:
        core = self._core(x)
        latents = torch.cat([one.latents for one in group]).unique().to(x.device)
        codes = self._codes(x, rows) if self._needs_codes(group) else None
        before = x.new_zeros(len(x), len(latents)) if codes is None else columns_of(codes, latents).to(x.dtype)
        after = before
        unit = self.unit.to(x)
        for one in group:
            own = one.latents.to(x.device)
            place = torch.searchsorted(latents, own)
            after = after.index_copy(1, place, one.change(after[:, place], unit[own], rows))
        difference = after - before
        if self.what.keep_error and core.linear_decode:
            assert self.rows is not None
            if self.rows.device != x.device:
                self.rows = self.rows.to(x.device)
            change = difference @ self.rows[latents].to(x.dtype)
        else:
            assert codes is not None
            dense = codes.dense().to(x.dtype).index_copy(1, latents, after)
            new = self._decoded(replace(codes, values=dense, indices=None))
            if not self.what.keep_error:
                return new.to(x.dtype)
            change = (new - self._decoded(codes)).to(x.dtype)
        touched = (difference != 0).any(-1, keepdim=True)
        return torch.where(touched, x + change, x)

    def _recoded(self, x: Tensor, one: CodesEdit, rows: Rows) -> Tensor:
        codes = self._codes(x, rows)
        changed = one.codes(codes, rows)
        if self.what.keep_error and changed is codes:
            return x
        new = self._decoded(changed).to(x.dtype)
        return x + (new - self._decoded(codes).to(x.dtype)) if self.what.keep_error else new

    def _needs_codes(self, group: list[Any]) -> bool:
        assert self.core is not None
        return any(one.reads for one in group) or not self.what.keep_error or not self.core.linear_decode

    def _codes(self, x: Tensor, rows: Rows) -> Codes:
        core = self._core(x)
        if isinstance(core, SharedDictionary):
            return core.encode_stream(self.stream, x)
        if "timestep" not in core.needs or "timestep" not in rows.context.call:
            return core.encode(x)
        time = rows.context.time.expand(rows.context.shape[0])
        return core.encode(x, {"timestep": time[rows.example]})

    def _decoded(self, codes: Codes) -> Tensor:
        core = self.core
        found = core.decode_stream(self.stream, codes) if isinstance(core, SharedDictionary) else core.decode(codes)  # type: ignore[union-attr]
        assert isinstance(found, Tensor)
        return found

    def _core(self, x: Tensor) -> SAECore:
        assert self.core is not None
        if self.core.rows_seen.device != x.device:
            self.core.to(x.device)
        return self.core

    def _units(self, d_latent: int) -> Tensor:
        if self.what.scale is None:
            return torch.ones(d_latent)
        scale = torch.as_tensor(self.what.scale, dtype=torch.float32)
        if scale.dim() and scale.shape != (d_latent,):
            raise MmsaeError(f"scale has the shape {tuple(scale.shape)}; it needs one number for each of {d_latent}.")
        scale = scale.expand(d_latent)
        for one in self.what.edits:
            if isinstance(one, LatentEdit):
                silent = one.latents[~(scale[one.latents].abs() > 0)]
                if len(silent):
                    raise MmsaeError(f"latent {int(silent[0])} never fired in the data of `scale`, so it has no unit.")
        return scale


def _warn_if_unread(model: nn.Module, path: str) -> None:
    """Say so where a LLaVA takes the states of an earlier layer of its tower than the one that is steered."""
    config = getattr(model, "config", None)
    chosen = getattr(config, "vision_feature_layer", None)
    found = re.search(r"vision_tower\..*layers\.(\d+)", path)
    depth = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    if found is None or chosen is None or depth is None:
        return
    read = max(i if i >= 0 else depth + 1 + i for i in ([chosen] if isinstance(chosen, int) else chosen)) - 1
    if int(found[1]) > read:
        warnings.warn(
            f"{type(model).__name__} reads layer {read} of its vision tower, so nothing will change by steering "
            f"{path!r} behind it.",
            stacklevel=4,
        )


def columns_of(codes: Codes, latents: Tensor) -> Tensor:
    """Codes of some latents (ascending, int64 `[n]`) as a matrix `[R, n]`."""
    if codes.indices is None:
        return codes.values.index_select(-1, latents)
    place = torch.searchsorted(latents, codes.indices).clamp_max(len(latents) - 1)
    values = codes.values * (latents[place] == codes.indices)
    return values.new_zeros(len(values), len(latents)).scatter_add(-1, place, values)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

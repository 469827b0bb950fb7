"""Find modules by path or glob, read what they compute, replace it, stop early.

A hook point is written `path`, `path:input`, `path:output` or `path:delta` (output minus input: what a residual block
writes), with an optional choice of one element of a tuple, dict or dataclass: `path:output[1]`,
`path:output[last_hidden_state]`. In the path, `*`, `?` and `[..]` match within one component:
`visual.transformer.resblocks.*.mlp`. An empty path is the whole model.

    with capture(model, ["blocks.*"]) as acts:
        model(images)               # stops after the last block; lines below it inside the `with` do not run
    acts["blocks.0"]                # what the rest of the model would have received, detached

    with edit(model, {"blocks.3": lambda x: x + direction}):
        logits = model(images)
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmsae.containers import find, of_call, put, put_call
from mmsae.errors import MmsaeError, nearest
from mmsae.layout import from_positions, to_positions

__all__ = ["HookPoint", "capture", "differentiable", "edit", "from_positions", "parse", "resolve", "to_positions"]

Where = Literal["output", "input", "delta"]
_STANCE, _uncompiled = threading.Lock(), 0
SYNTAX = re.compile(r"(?P<path>[^:]*)(:(?P<where>input|output|delta)(\[(?P<select>[^\[\]]+)\])?)?")


@dataclass(frozen=True)
class HookPoint:
    """One tensor that a model computes.

    Attributes:
        path: Module path as in `model.named_modules()`.
        where: The module's output, its input, or output minus input.
        select: Element of a container; None takes the tensor itself or the first tensor in the container.
    """

    path: str
    where: Where = "output"
    select: int | str | None = None

    @property
    def name(self) -> str:
        """The shortest way to write it; the name of the stream."""
        if self.path and self.where == "output" and self.select is None:
            return self.path
        return f"{self.path}:{self.where}" + ("" if self.select is None else f"[{self.select}]")


def parse(text: str) -> HookPoint:
    """Read the syntax above, globs left as they are; MmsaeError if it is not of that form."""
    match = SYNTAX.fullmatch(text)
    if not match:
        raise MmsaeError(
            f"hook point {text!r} cannot be read; write path, path:input, path:output or path:delta, "
            "with [1] or [name] after it to choose an element."
        )
    select = match["select"]
    number = select is not None and re.fullmatch(r"-?\d+", select)
    return HookPoint(match["path"], cast(Where, match["where"] or "output"), int(select) if number else select)


def resolve(model: nn.Module, patterns: Sequence[str]) -> list[HookPoint]:
    """Expand globs to the modules of a model: pattern by pattern, in the order of the model, duplicates removed.

    Raises:
        MmsaeError: A pattern matches no module that can be called; names the nearest paths.
    """
    # remove_duplicate=False: a shared module can be asked for under each of its names
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, HookPoint] = {}
    for text in [patterns] if isinstance(patterns, str) else patterns:
        pattern = parse(text)
        paths = [path for path in modules if _matches(path, pattern.path)]
        called = [path for path in paths if not isinstance(modules[path], nn.ModuleList | nn.ModuleDict)]
        if not called:
            raise MmsaeError(_nothing(model, text, pattern.path, paths, list(modules)))
        points = [HookPoint(path, pattern.where, pattern.select) for path in called]
        found |= {point.name: point for point in points}
    if not found:
        raise MmsaeError(f"no hook point was given for {type(model).__name__}; name a module, for example 'blocks.*'.")
    return list(found.values())


@contextmanager
def capture(model: nn.Module, hook_points: Sequence[HookPoint | str], stop: bool = True) -> Iterator[dict[str, Tensor]]:
    """Collect the tensors at some hook points of one forward pass.

    Reads what the following modules receive, `edit` in force included. A module that runs several times counts once,
    the first time.

    Args:
        model: The model that will be run inside the `with`.
        hook_points: Resolved points, or patterns.
        stop: End the forward pass, and with it the body of the `with`, once every point has been read.

    Yields:
        A dict that fills during the forward pass: name of the point to the detached tensor, in the model's own shape.

    Raises:
        MmsaeError: A point does not run, or holds no tensor.
    """
    points = _points(model, hook_points)
    found: dict[str, Tensor] = {}
    entered: dict[str, Tensor] = {}  # inputs of modules whose delta is wanted
    halt = _Stop()

    def keep(point: HookPoint, tensor: Tensor) -> None:
        if point.name in found:
            return
        last = stop and len(found) + 1 == len(points)
        # A copy, because later modules may write in place (ResNet: bn2 is overwritten by `out += identity`).
        found[point.name] = tensor.detach() if last else tensor.detach().clone()
        if last:
            raise halt

    def before(point: HookPoint, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensor = _input(point, args, kwargs)
        if point.where == "input":
            keep(point, tensor)
        else:
            entered[point.name] = tensor.detach().clone()

    def after(point: HookPoint, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        tensor = find(output, point.select, point.name)[1]
        keep(point, tensor if point.where == "output" else _difference(point, tensor, entered.pop(point.name)))

    with uncompiled(), ExitStack() as hooks:
        for point in points:
            module = model.get_submodule(point.path)
            # Appended, not prepended: they come after the edits, which are prepended, whichever was opened first.
            if point.where != "output":
                handle = module.register_forward_pre_hook(partial(before, point), with_kwargs=True)
                hooks.callback(handle.remove)
            if point.where != "input":
                handle = module.register_forward_hook(partial(after, point), with_kwargs=True)
                hooks.callback(handle.remove)
        try:
            yield found
        except _Stop as stopped:
            if stopped is not halt:  # of a capture around this one
                raise
            halt.__traceback__ = None  # its frames hold every intermediate tensor of the forward pass
    _all_fired(model, points, found)


@contextmanager
def edit(model: nn.Module, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the tensors at some hook points by a function of them, while the `with` is open.

    The container around the tensor keeps its type; the new tensor gets the dtype and device of the old one. At
    `:delta`, the output becomes input plus edited difference. Nested edits of the same point apply innermost first.

    Args:
        model: The model that will be run inside the `with`.
        edits: Hook point or glob to a function from a tensor to one of equal shape; called at every forward pass.

    Raises:
        MmsaeError: A function returns something else, a point never ran, or two entries name the same point.
    """
    functions: dict[str, Callable[[Tensor], Tensor]] = {}
    points: list[HookPoint] = []
    for text, function in edits.items():
        for point in resolve(model, [text]):
            if point.name in functions:
                raise MmsaeError(f"two edits name the hook point {point.name!r}; combine them into one function.")
            functions[point.name] = function
            points.append(point)
    fired: set[str] = set()
    entered: dict[str, Tensor] = {}

    def before(point: HookPoint, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if point.where == "delta":
            entered[point.name] = _input(point, args, kwargs).clone()
            return None
        fired.add(point.name)
        key, old = find(of_call(args, kwargs), point.select, point.name)
        return put_call(args, kwargs, key, _replaced(point, functions[point.name], old))

    def after(point: HookPoint, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        fired.add(point.name)
        key, old = find(output, point.select, point.name)
        if point.where == "output":
            return put(output, key, _replaced(point, functions[point.name], old))
        start = entered.pop(point.name)
        difference = _difference(point, old, start)
        new = _replaced(point, functions[point.name], difference)
        # what was not changed keeps its bits: input plus difference is the output up to rounding only
        total = start + new
        kept = torch.where(new == difference, old, total)
        return put(output, key, _Valued.apply(total, kept.detach()) if total.requires_grad else kept)

    with uncompiled(), ExitStack() as hooks:
        for point in points:
            module = model.get_submodule(point.path)
            # Prepended: transformers installs its own hooks for `output_hidden_states` at the first call that asks
            # for them, LLaVA goes on with what those recorded, and an edit that runs after them changes nothing.
            if point.where != "output":
                handle = module.register_forward_pre_hook(partial(before, point), prepend=True, with_kwargs=True)
                hooks.callback(handle.remove)
            if point.where != "input":
                handle = module.register_forward_hook(partial(after, point), prepend=True, with_kwargs=True)
                hooks.callback(handle.remove)
        yield
    _all_fired(model, points, fired)


@contextmanager
def differentiable(model: nn.Module, hook_points: Sequence[HookPoint | str]) -> Iterator[dict[str, Tensor]]:
    """As `capture`, but to the end of the forward pass, and with tensors that a loss can be differentiated by.

    The graph begins at the first of the points, so weights may be frozen.

    Args:
        model: The model that will be run, once, inside the `with`.
        hook_points: Resolved points, or patterns.

    Yields:
        Name of the point to the tensor, for `torch.autograd.grad(loss, list(found.values()))`.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> Tensor:
        if name in found:
            return tensor
        found[name] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return found[name].clone()  # later modules may write in place, which a leaf forbids

    with edit(model, {point.name: partial(keep, point.name) for point in _points(model, hook_points)}):
        yield found


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what `torch.compile` has compiled, or would compile, in plain Python while the `with` is open.

    Compiled code does not notice hooks that came after it, and would keep those that were there when it was made.
    """
    global _uncompiled
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with _STANCE:  # one for all threads: the first in sets it, the last out takes it back
        _uncompiled += 1
        if _uncompiled == 1:
            torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _STANCE:
            _uncompiled -= 1
            if _uncompiled == 0:
                torch.compiler.set_stance("default")


class _Valued(torch.autograd.Function):
    """The value of one tensor with the gradient of another that is equal up to rounding."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return slope, None


class _Stop(BaseException):  # not an Exception: the model's own `except Exception` must not swallow it
    pass


def _points(model: nn.Module, given: Sequence[HookPoint | str]) -> list[HookPoint]:
    given = [given] if isinstance(given, HookPoint | str) else given
    lists = [[point] if isinstance(point, HookPoint) else resolve(model, [point]) for point in given]
    return list({point.name: point for points in lists for point in points}.values())


def _matches(path: str, pattern: str) -> bool:
    parts, globs = path.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))


def _nothing(model: nn.Module, text: str, path: str, containers: list[str], known: list[str]) -> str:
    kind = type(model).__name__
    if containers:
        return f"{containers[0]!r} of {kind} is a list of modules and never runs itself; write '{containers[0]}.*'."
    if path in dict(model.named_parameters()):
        owner = path.rpartition(".")[0]
        return f"{path!r} of {kind} is a parameter, not a module; hook the module around it, '{owner}:output'."
    return f"{kind} has no module that matches {text!r}; nearest: {nearest(path, filter(None, known))}."


def _input(point: HookPoint, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return find(of_call(args, kwargs), point.select if point.where == "input" else None, point.name)[1]


def _difference(point: HookPoint, output: Tensor, start: Tensor) -> Tensor:
    if output.shape != start.shape:
        raise MmsaeError(
            f"hook point {point.name!r} has no difference: output {tuple(output.shape)} and input {tuple(start.shape)} "
            f"differ in shape; choose another output with '{point.path}:delta[1]', or hook ':output'."
        )
    return output - start


def _replaced(point: HookPoint, function: Callable[[Tensor], Tensor], old: Tensor) -> Tensor:
    new = function(old)
    if not isinstance(new, Tensor) or new.shape != old.shape:
        given = f"shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise MmsaeError(
            f"the edit at {point.name!r} returned {given} for a tensor of shape {tuple(old.shape)}; "
            "it must return a tensor of equal shape."
        )
    new = new.to(old)
    # in another layout of the memory the modules behind would take other kernels, and round differently
    return new if new.stride() == old.stride() else torch.empty_like(old, requires_grad=False).copy_(new)


def _all_fired(model: nn.Module, points: Sequence[HookPoint], fired: set[str] | dict[str, Tensor]) -> None:
    if silent := [point.name for point in points if point.name not in fired]:
        raise MmsaeError(
            f"{', '.join(map(repr, silent))} of {type(model).__name__} did not run in the forward pass, so there is "
            "nothing to read or edit there; unused and fused modules cannot be hooked, hook the module around them."
        )

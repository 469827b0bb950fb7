"""One tensor inside what a module takes or returns: found, and replaced in a container of the same type."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from mmsae.errors import MmsaeError


def find(container: Any, select: int | str | None, place: str) -> tuple[Any, Tensor]:
    """The key and the tensor that a hook point means.

    Args:
        container: A tensor, or a tuple, list, dict or dataclass that holds some.
        select: Key, field or index; None takes the tensor itself or the first one. An index into a dict or a
            dataclass counts its entries.
        place: Name of the hook point, for errors.

    Returns:
        Key for `put` (None for a bare tensor), and the tensor.
    """
    if isinstance(container, Tensor):
        # Never index it: `output[0]` of a plain tensor would be the first example of the batch.
        if select is not None:
            shape = tuple(container.shape)
            raise MmsaeError(f"hook point {place!r} gives a plain tensor of shape {shape}; leave [{select}] out.")
        return None, container
    entries = _entries(container)
    if select is None:
        for key, value in entries.items():
            if isinstance(value, Tensor):
                return key, value
        raise MmsaeError(
            f"hook point {place!r} gives no tensor but {type(container).__name__} ({_kinds(entries)}); hook another "
            "module, or choose an element with [..]."
        )
    key = _key(container, entries, select)
    if not isinstance(entries.get(key), Tensor):
        raise MmsaeError(f"hook point {place!r} gives no tensor at [{select}]; there is {_kinds(entries)}.")
    return key, entries[key]


def put(container: Any, key: Any, tensor: Tensor) -> Any:
    """A copy of the container, of the same type, with `tensor` at the key that `find` returned."""
    if key is None:
        return tensor
    if isinstance(container, tuple):
        values = [tensor if i == key else value for i, value in enumerate(container)]
        return type(container)(*values) if hasattr(container, "_fields") else type(container)(values)
    new = copy.copy(container)
    if isinstance(container, Mapping | list):
        new[key] = tensor  # the output classes of transformers and diffusers keep attribute and entry in step
    else:
        object.__setattr__(new, key, tensor)  # also for frozen dataclasses
    return new


def of_call(args: tuple, kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """The arguments of a call as one dict; the tensor that flows through the module comes first.

    That is the first positional argument, else `hidden_states` (some blocks get nothing but keywords).
    """
    merged: dict[int | str, Any] = {}
    if not (args and isinstance(args[0], Tensor)) and "hidden_states" in kwargs:
        merged["hidden_states"] = kwargs["hidden_states"]
    merged.update(enumerate(args))
    merged.update(kwargs)
    return merged


def put_call(args: tuple, kwargs: dict[str, Any], key: int | str, tensor: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments with `tensor` at the key that `find(of_call(...))` returned."""
    if isinstance(key, int):
        return put(args, key, tensor), kwargs
    return args, {**kwargs, key: tensor}


def _entries(container: Any) -> dict[Any, Any]:
    if isinstance(container, Mapping):
        return dict(container)
    if is_dataclass(container) and not isinstance(container, type):
        return {field.name: getattr(container, field.name) for field in fields(container)}
    if isinstance(container, tuple | list):
        return dict(enumerate(container))
    return {}


def _key(container: Any, entries: dict[Any, Any], select: int | str) -> Any:
    if select in entries:
        return select
    if isinstance(select, str):  # a field of a named tuple
        names = getattr(container, "_fields", ())
        return names.index(select) if select in names else select
    return list(entries)[select] if -len(entries) <= select < len(entries) else select


def _kinds(entries: dict[Any, Any]) -> str:
    return ", ".join(f"[{key}] {type(value).__name__}" for key, value in entries.items()) or "nothing to choose from"

"""Where an intervention acts: functions from the running call to a weight for every position.

They combine: `Generated() & ~TokenIds([0])`, `Box(0, 0, 0.5, 1) & Timesteps(400, 1000) & Conditional()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from mmsae.errors import MmsaeError, checked
from mmsae.steering.context import Context


class Where(ABC):
    """Weight of every position: bool, or float for a part of the change; broadcasts to `[B, T]`.

    A plain function from a `Context` to such a tensor serves as well.
    """

    @abstractmethod
    def __call__(self, context: Context) -> Tensor:
        """Weights of the positions of the running call."""

    def __and__(self, other: Where) -> Where:
        return _Both(self, other)

    def __or__(self, other: Where) -> Where:
        return _Either(self, other)

    def __invert__(self) -> Where:
        return _Not(self)


@dataclass(frozen=True)
class At(Where):
    """Absolute positions, counted from 0 without padding in front; negative ones are not known while generating."""

    positions: Sequence[int]

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        return torch.isin(context.position, torch.tensor(list(self.positions), device=context.device))


@dataclass(frozen=True)
class Between(Where):
    """Absolute positions from `first` to `last`, both included."""

    first: int
    last: int | None = None

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        end = context.position <= self.last if self.last is not None else True
        return (context.position >= self.first) & end


@dataclass(frozen=True)
class Generated(Where):
    """Tokens that the model itself has written; `~Generated()` is the prompt.

    Args:
        prompt_length: Tokens of the prompt, padding included; by default those of the call that finds its KV cache
            empty. Without a cache it has to be given.
    """

    prompt_length: int | None = None

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        length = self.prompt_length
        if length is None:
            if context.call.get("use_cache") is False:
                raise MmsaeError("without a KV cache nobody knows what is generated: give Generated(prompt_length=…).")
            length = context.prompt
        if length is None:
            raise MmsaeError("the steered module runs outside a call with input_ids: nothing is generated there.")
        return context.index >= length


@dataclass(frozen=True)
class TokenIds(Where):
    """Tokens with one of these ids: delimiters, role markers, names."""

    ids: Sequence[int]

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        return torch.isin(context.token_ids, torch.tensor(list(self.ids), device=context.device))


@dataclass(frozen=True)
class ImageTokens(Where):
    """Tokens of a multimodal model that stand for patches; `~ImageTokens()` are the words."""

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        if context.image_token is None:
            raise MmsaeError("the model has no image_token_id, so it has no image tokens.")
        return context.token_ids == context.image_token


@dataclass(frozen=True)
class Box(Where):
    """Patches whose centre lies in a box, given in shares of height and width.

    Args:
        top: Upper edge, 0 to 1.
        left: Left edge.
        bottom: Lower edge.
        right: Right edge.
        grid: Rows and columns of patches where they are no square.
    """

    top: float = 0.0
    left: float = 0.0
    bottom: float = 1.0
    right: float = 1.0
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("top", "left", "bottom", "right"):
            checked(name, getattr(self, name), 0, 1)
        if self.top >= self.bottom or self.left >= self.right:
            raise MmsaeError(f"the box from ({self.top}, {self.left}) to ({self.bottom}, {self.right}) is empty.")

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        row, column = context.places if self.grid is None else context.laid(self.grid)
        return (row >= self.top) & (row < self.bottom) & (column >= self.left) & (column < self.right)


class Mask(Where):
    """Patches by a picture of weights, of any size: what lies at their centre, interpolated.

    Args:
        weights: `[H, W]`, 0 to 1, or bool; or the path of a picture, white where the edit acts.
        grid: Rows and columns of patches where they are no square.
    """

    def __init__(self, weights: Tensor | np.ndarray | str, grid: tuple[int, int] | None = None) -> None:
        if isinstance(weights, str):
            from PIL import Image

            try:
                with Image.open(weights) as image:
                    weights = np.asarray(image.convert("L")) / 255
            except OSError as error:
                raise MmsaeError(f"{weights} is no picture that can be a mask ({error}).") from error
        self.weights = torch.as_tensor(weights).float()
        self.grid = grid
        if self.weights.dim() != 2:
            raise MmsaeError(f"a mask has the axes height and width, not the shape {tuple(self.weights.shape)}.")

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        row, column = context.places if self.grid is None else context.laid(self.grid)
        at = torch.stack([column, row], -1)[:, None].nan_to_num() * 2 - 1  # [B, 1, T, 2]
        weights = self.weights.to(context.device).expand(len(row), 1, *self.weights.shape)
        found = grid_sample(weights, at, mode="bilinear", padding_mode="border", align_corners=False)[:, 0, 0]
        return torch.where(row.isnan(), 0.0, found)


@dataclass(frozen=True)
class Timesteps(Where):
    """Calls of a denoiser with a timestep from `low` to `high`, both included (999 is nearly all noise)."""

    low: float = 0.0
    high: float = float("inf")

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        now = context.time
        inside = (now >= self.low) & (now <= self.high)
        return (inside if len(now) == context.shape[0] else inside[:1])[:, None]


@dataclass(frozen=True)
class Steps(Where):
    """Denoising steps from `first` to `last`, both included, counted from 0; of a pipeline."""

    first: int = 0
    last: int | None = None

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        inside = self.first <= context.step and (self.last is None or context.step <= self.last)
        return torch.tensor([[inside]], device=context.device)


@dataclass(frozen=True)
class Conditional(Where):
    """The half of a guided denoising step that knows the prompt (all of a step without guidance).

    Args:
        opposed: Change the other half by the same in the opposite direction, so that guidance adds both up.
    """

    opposed: bool = False

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        known = context.conditional[:, None]
        return known if not self.opposed else torch.where(known, 1.0, -1.0)


@dataclass(frozen=True)
class Examples(Where):
    """Some examples of the batch, by their number in it."""

    numbers: Sequence[int]

    def __call__(self, context: Context) -> Tensor:
        """See the class."""
        index = torch.arange(context.shape[0], device=context.device)
        return torch.isin(index, torch.tensor(list(self.numbers), device=context.device))[:, None]


@dataclass(frozen=True)
class _Both(Where):
    one: Where
    other: Where

    def __call__(self, context: Context) -> Tensor:
        first, second = self.one(context), self.other(context)
        return first & second if first.dtype == second.dtype == torch.bool else first * second


@dataclass(frozen=True)
class _Either(Where):
    one: Where
    other: Where

    def __call__(self, context: Context) -> Tensor:
        first, second = self.one(context), self.other(context)
        return first | second if first.dtype == second.dtype == torch.bool else torch.maximum(first * 1.0, second * 1.0)


@dataclass(frozen=True)
class _Not(Where):
    one: Where

    def __call__(self, context: Context) -> Tensor:
        found = self.one(context)
        return ~found if found.dtype == torch.bool else 1 - found

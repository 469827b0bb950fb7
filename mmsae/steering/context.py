"""What is known while a steered module runs: which positions, which step of denoising, which half of guidance."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.containers import find, of_call
from mmsae.errors import MmsaeError


@dataclass
class Context:
    """The running call, as masks and edits see it.

    Attributes:
        shape: Examples and positions of the activation at hand, `(B, T)`.
        device: Where it is.
        grid: Rows and columns if it is a feature map.
        start: Positions that came in earlier calls, which a KV cache holds.
        prompt: Positions of the first call, of which no cache knew anything; None outside a model's own call.
        call: Arguments of the running call of the whole model by name.
        scheduler: That of a diffusion pipeline.
        thousandths: Whether the denoiser is told timesteps from 0 to 1 where the scheduler counts to 1000 (Flux).
        prefix: Tokens in front of the patches, where the model tells.
        image_token: Id of the tokens that stand for patches in a multimodal model.
    """

    shape: tuple[int, int]
    device: torch.device
    grid: tuple[int, int] | None = None
    start: int = 0
    prompt: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Any = None
    thousandths: bool = False
    prefix: int | None = None
    image_token: int | None = None

    @cached_property
    def index(self) -> Tensor:
        """Absolute position, padding counted, int64 `[T]`."""
        return self.start + torch.arange(self.shape[1], device=self.device)

    @cached_property
    def position(self) -> Tensor:
        """Absolute position, int64 `[B, T]`: tokens of padding in front do not count, and have -1."""
        mask = self.call.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == self.start + self.shape[1]:
            counted = (mask.to(self.device).long().cumsum(1) - 1)[:, self.start :]
            return counted.masked_fill(mask.to(self.device)[:, self.start :] == 0, -1)
        return self.index.expand(self.shape)

    @cached_property
    def token_ids(self) -> Tensor:
        """Ids of the tokens at the positions, int64 `[B, T]`."""
        ids = self.call.get("input_ids", self.call.get("text"))  # open_clip calls them so
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != self.shape[1]:
            raise MmsaeError(
                "the steered module's positions are no tokens of the model's input_ids; choose positions by number, "
                "mask or box."
            )
        return ids.to(self.device)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of patches as shares of height and width (0..1, their centres), `[B, T]`; NaN elsewhere."""
        B, T = self.shape
        if self.grid is not None:
            return self._laid(torch.ones(B, T, dtype=torch.bool, device=self.device), self.grid)
        if self.image_token is not None and self.call.get("input_ids") is not None:
            ids = self.call["input_ids"]
            if ids.shape[1] == T:
                patches = ids.to(self.device) == self.image_token
                return self._laid(patches, None)
        for first in (0, 1, 5, 2) if self.prefix is None else (self.prefix, 0):  # class token and registers in front
            side = math.isqrt(max(T - first, 0))
            if side > 1 and side * side == T - first:
                there = (torch.arange(T, device=self.device) >= first).expand(B, T)
                return self._laid(there, (side, side))
        raise MmsaeError(f"{T} positions are no square of patches; give the grid, as in Box(…, grid=(rows, columns)).")

    def laid(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As `places`, for the last `rows * columns` positions."""
        B, T = self.shape
        rest = T - grid[0] * grid[1]
        if rest < 0:
            raise MmsaeError(f"grid={grid} has more places than the activation has positions ({T}).")
        return self._laid((torch.arange(T, device=self.device) >= rest).expand(B, T), grid)

    def _laid(self, there: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        number = there.long().cumsum(1) - 1
        if grid is None:
            count = int(there.sum(1).max())
            side = math.isqrt(count)
            if side * side != count:
                raise MmsaeError(f"{count} image tokens are no square of patches; give the grid of the picture.")
            grid = (side, side)
        row, column = number // grid[1] % grid[0], number % grid[1]
        outside = torch.full(there.shape, torch.nan, device=self.device)
        return (
            torch.where(there, (row + 0.5) / grid[0], outside),
            torch.where(there, (column + 0.5) / grid[1], outside),
        )

    @cached_property
    def timestep(self) -> Tensor:
        """Timestep of each example of the denoiser, `[B]` or `[1]`."""
        given = self.call.get("timestep")
        if given is None:
            raise MmsaeError("there is no timestep: steer a diffusion pipeline, or its denoiser, not a part of it.")
        return torch.as_tensor(given, device=self.device).reshape(-1)

    @property
    def time(self) -> Tensor:
        """`timestep` as the scheduler and the rows of a dictionary count it, whatever the denoiser is told."""
        return self.timestep * 1000 if self.thousandths else self.timestep

    @cached_property
    def step(self) -> int:
        """Number of the denoising step, from 0."""
        times = getattr(self.scheduler, "timesteps", None)
        if times is None:
            raise MmsaeError("steps are known of a pipeline only: give the pipeline, or choose by Timesteps.")
        times = times.float().cpu() / (1000 if self.thousandths else 1)
        return int((times - float(self.timestep[0])).abs().argmin())

    @cached_property
    def conditional(self) -> Tensor:
        """Which examples know the prompt, bool `[B]`; all of them without guidance."""
        B = self.shape[0]
        sample = find(of_call((), dict(self.call)), None, "the denoiser")[1] if self.call else None
        known = torch.ones(B, dtype=torch.bool, device=self.device)
        if sample is None or B % 2 or len(sample) != B:
            return known
        first, second = sample.chunk(2)
        if not torch.equal(first, second):  # guidance gives the same latents twice
            return known
        classes = "class_labels" in self.call and self.call["class_labels"] is not None  # DiT: classes come first
        known[B // 2 :] = not classes
        known[: B // 2] = classes
        return known


class Tracker:
    """Follows the calls of a model from outside.

    Args:
        root: The module whose arguments tell about positions and steps.
        scheduler: Of a pipeline.
    """

    def __init__(self, root: nn.Module, scheduler: Any = None) -> None:
        self.root, self.scheduler = root, scheduler
        config = getattr(root, "config", None)
        self.image_token = next(
            (found for name in ("image_token_id", "image_token_index") if (found := getattr(config, name, None))), None
        )
        forward = getattr(root, "forward", None)
        try:
            self.names = [p.name for p in inspect.signature(forward).parameters.values()]  # type: ignore[arg-type]
        except (TypeError, ValueError):
            self.names = []
        self.start = 0
        self.prompt: int | None = None
        self.latest = 0.0  # the largest timestep so far
        self.call: dict[str, Any] = {}

    @contextmanager
    def following(self) -> Iterator[None]:
        """While the `with` is open."""
        with ExitStack() as hooks:
            before = self.root.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
            hooks.callback(before.remove)
            after = self.root.register_forward_hook(self._after, always_call=True)
            hooks.callback(after.remove)
            yield

    def context(self, B: int, T: int, device: torch.device, grid: tuple[int, int] | None) -> Context:
        """Of an activation that has just been computed."""
        times = getattr(self.scheduler, "timesteps", None)
        thousandths = times is not None and len(times) > 0 and self.latest <= 1 < float(times[0])
        prefix = getattr(self.root, "num_prefix_tokens", None)
        known = (self.start, self.prompt, self.call, self.scheduler, thousandths, prefix, self.image_token)
        return Context((B, T), device, grid, *known)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.start = _cached(self.call)
        given = self.call.get("input_ids")
        given = given if isinstance(given, Tensor) else self.call.get("inputs_embeds")
        if self.start == 0 and isinstance(given, Tensor):
            self.prompt = given.shape[1]
        if self.scheduler is not None and self.call.get("timestep") is not None:
            self.latest = max(self.latest, float(torch.as_tensor(self.call["timestep"]).max()))

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.start, self.call = 0, {}


def _cached(call: Mapping[str, Any]) -> int:
    """Positions that the KV cache of a call holds; its argument has had several names."""
    for value in call.values():
        if hasattr(value, "get_seq_length"):
            return int(value.get_seq_length())
    pairs = call.get("past_key_values")  # as older models have it
    return int(pairs[0][0].shape[-2]) if isinstance(pairs, tuple | list) and pairs else 0

"""Editing a picture while it is drawn: features of another prompt put in place of its own, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError, checked
from mmsae.hooks import edit as hooked
from mmsae.layout import to_positions
from mmsae.sources.diffusion import Diffusion
from mmsae.steering.context import Tracker
from mmsae.steering.drawing import Item
from mmsae.steering.edits import LatentEdit, Rows
from mmsae.steering.intervene import modules_of


@dataclass
class Trace:
    """Codes of one drawing at every step, of the half that knows the prompt.

    Attributes:
        codes: `[steps, B, rows, columns, d_latent]`, dense, in half precision.
        times: Of the scheduler, `[steps]`.
        pictures: What was drawn, `[B, 3, H, W]`.
    """

    codes: Tensor
    times: Tensor
    pictures: Tensor


@torch.no_grad()
def trace(
    source: Diffusion, dictionary: SAECore, hook_point: str, items: Sequence[Item], seeds: Sequence[int]
) -> Trace:
    """Draw pictures and keep the codes of a hook point at every step."""
    model, scheduler = modules_of(source)
    tracker = Tracker(model.get_submodule(hook_point.split(".")[0].split(":")[0]), scheduler)
    codes, times = [], []

    def look(tensor: Tensor) -> Tensor:
        x, grid = to_positions(tensor)
        context = tracker.context(x.shape[0], x.shape[1], x.device, grid)
        batch = {"timestep": context.time.expand(len(x))[context.conditional]}
        z = dictionary.to(x.device).encode(x[context.conditional].float(), batch).dense()
        side = grid or _square(z.shape[1])
        codes.append(z[:, -side[0] * side[1] :].reshape(len(z), *side, -1).half().cpu())
        times.append(float(context.time[0]))
        return tensor

    batch = source.collate(list(items))
    batch["noise_seed"] = torch.tensor(list(seeds))
    with tracker.following(), hooked(model, {hook_point: look}):
        pictures = source.draw(batch)
    return Trace(torch.stack(codes), torch.tensor(times), pictures)


def _square(T: int) -> tuple[int, int]:
    side = int(T**0.5)
    if side * side != T:
        raise MmsaeError(f"{T} positions are no square of patches: transplants need a map.")
    return side, side


def transport_scores(edit: Trace, source: Trace, edit_mask: Tensor | None, source_mask: Tensor | None) -> Tensor:
    """How much more active each latent is inside the target object of the edit than inside the one of the source.

    `mean z inside the edit's mask - mean z inside the source's mask`, over all steps and pictures, `[d_latent]`.

    Args:
        edit: Drawn from the edit prompt.
        source: Drawn from the source prompt.
        edit_mask: `[H, W]` of any size in 0..1, where the object of the edit is; None is everywhere.
        source_mask: Where the object of the source is.
    """
    return _inside(edit.codes, edit_mask) - _inside(source.codes, source_mask)


def _inside(codes: Tensor, mask: Tensor | None) -> Tensor:
    z = codes.float().mean((0, 1))  # [H, W, m]
    weights = torch.ones(z.shape[:2]) if mask is None else _fitted(mask, z.shape[:2])
    if not weights.any():
        raise MmsaeError("the mask is empty on the grid of the block: no score inside it.")
    return (z * weights[..., None]).sum((0, 1)) / weights.sum()


def _fitted(mask: Tensor, side: Sequence[int]) -> Tensor:
    """A mask on another grid, each cell the mean of what it covers."""
    return interpolate(mask.float()[None, None], size=tuple(side), mode="area")[0, 0]


class Transplant(LatentEdit):
    """Puts codes of another drawing in place of the present ones, at the same step: features switched on and off.

    The latents that speak most for the edit get its codes, and those that speak most for the source lose theirs, inside
    the source's mask; the region of the edit's mask is stretched to it. Source: the representation-based editing and
    RIEBench of *One-Step is Enough*, arXiv 2410.22366; where it leaves the protocol open, this is ours.

    Args:
        edit: Traced from the edit prompt, with the seeds that will be drawn.
        source: Traced from the source prompt, with the same seeds.
        n: Latents to switch on, and as many to switch off.
        edit_mask: `[H, W]` in 0..1; None is everywhere.
        source_mask: As `edit_mask`; give it to `Mask(...)` as `where`, too.
        strength: 1 puts the codes of the edit there, 0 changes nothing; more exaggerates.
    """

    def __init__(
        self,
        edit: Trace,
        source: Trace,
        n: int = 10,
        edit_mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        score = transport_scores(edit, source, edit_mask, source_mask)
        n = min(int(checked("n", n, 1)), len(score) // 2)
        on = score.topk(n).indices
        off = (-score).topk(n).indices
        on, off = on[score[on] > 0], off[score[off] < 0]
        if not len(on) and not len(off):
            raise MmsaeError("both drawings have the same codes: there is nothing to transplant.")
        super().__init__(torch.cat([on, off]), strength)
        self.score, self.on, self.off = score, on, off
        self.times = edit.times
        taken = edit.codes[..., self.latents].float()
        self.codes = _moved(taken, _box(edit_mask), _box(source_mask))  # [steps, B, H, W, n]

    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """See the class."""
        context = rows.context
        B, T = context.shape
        step = int((self.times - float(context.time[0])).abs().argmin())
        theirs = self.codes[step].flatten(1, 2)  # [B', H * W, n]
        if B % len(theirs) or theirs.shape[1] > T:
            raise MmsaeError(
                f"the transplant has {len(theirs)} pictures and {theirs.shape[1]} positions, the drawing {B} and {T}: "
                "draw the same prompts and seeds in one batch."
            )
        place = rows.place.cpu() - (T - theirs.shape[1])  # words stand in front of patches
        wanted = theirs[rows.example.cpu() % len(theirs), place.clamp_min(0)].to(z)
        new = z + self._amount(z) * (wanted - z)
        return torch.where((place >= 0).to(z.device)[:, None], new, z)


def _box(mask: Tensor | None) -> tuple[float, float, float, float]:
    """Top, left, bottom, right of what is not 0, as shares."""
    if mask is None:
        return 0.0, 0.0, 1.0, 1.0
    rows, columns = (mask > 0).any(1).nonzero()[:, 0], (mask > 0).any(0).nonzero()[:, 0]
    if not len(rows):
        raise MmsaeError("the mask is empty.")
    H, W = mask.shape
    return int(rows[0]) / H, int(columns[0]) / W, (int(rows[-1]) + 1) / H, (int(columns[-1]) + 1) / W


def _moved(maps: Tensor, taken: Sequence[float], put: Sequence[float]) -> Tensor:
    """Maps `[steps, B, H, W, n]` so that the box `taken` of them lies where `put` is."""
    if tuple(taken) == tuple(put):
        return maps
    S, B, H, W, n = maps.shape

    def line(size: int, begin: float, end: float, into: float, to: float) -> Tensor:
        centre = (torch.arange(size) + 0.5) / size
        return 2 * (begin + (centre - into) / (to - into) * (end - begin)) - 1

    ys = line(H, taken[0], taken[2], put[0], put[2])
    xs = line(W, taken[1], taken[3], put[1], put[3])
    grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], -1).expand(S * B, H, W, 2)
    moved = grid_sample(maps.flatten(0, 1).permute(0, 3, 1, 2), grid, "bilinear", "border", align_corners=False)
    return moved.permute(0, 2, 3, 1).reshape(S, B, H, W, n)

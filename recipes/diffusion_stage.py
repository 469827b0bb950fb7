"""What the scripts that steer diffusion models have in common: a model, a dictionary, the unit of its latents."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import datamodules  # noqa: F401  (its imports are the registry)
import mmsae.artifact
from mmsae.cli.main import main
from mmsae.cli.run import datamodule_of
from mmsae.cores.base import SAECore
from mmsae.errors import MmsaeError
from mmsae.latents import LatentStore
from mmsae.sources.diffusion import Diffusion
from mmsae.steering import Box, Conditional, Content, Mask, Timesteps, quantiles
from mmsae.steering.drawing import Item, items_of

HERE = Path(__file__).parent
MINIATURE = "miniature:diffusion"
DEFAULT_RUN = Path("runs/scene_diffusion_text")
DEFAULT_RECIPE = HERE / "scene_diffusion_text_batchtopk.yaml"
UP_RUN, UP_RECIPE = Path("runs/scene_diffusion_up"), HERE / "scene_diffusion_up_batchtopk.yaml"


class Opened(NamedTuple):
    """A model with a dictionary.

    Attributes:
        source: Draws.
        core: The dictionary.
        hook_point: Where it reads and writes.
        latents: Codes of the validation prompts; of the given prompts where there is no run.
        items: The prompts of these codes by `sample_id`.
        factors: Names of the values of each label.
    """

    source: Diffusion
    core: SAECore
    hook_point: str
    latents: LatentStore
    items: list[Item]
    factors: dict[str, list[str]]

    @property
    def scale(self) -> Tensor:
        """The 99th percentile of each latent's codes; of all codes for latents that never fired."""
        own = quantiles(self.latents)
        every = float(np.quantile(np.abs(self.latents.values), 0.99)) if len(self.latents.values) else 1.0
        return torch.where(own > 0, own, every)


def open_run(
    run: str | None,
    sae: str | None,
    model: str | None,
    hook_point: str | None,
    prompts: Sequence[str | int],
    default: tuple[Path, Path] = (DEFAULT_RUN, DEFAULT_RECIPE),
    **settings: Any,
) -> Opened:
    """Open a run of `mmsae fit`, or a dictionary and a model by themselves; train the miniature's if there is nothing.

    Args:
        run: Folder of a run on a diffusion model.
        sae: Folder or hub id of a dictionary, in place of the run's or without a run.
        model: Folder or hub id of a pipeline, in place of the run's.
        hook_point: In place of the one that the dictionary was trained on.
        prompts: What tells the units of strengths where there is no run.
        default: Run and recipe of the miniature.
        **settings: Of `Diffusion`, in place of the run's, where they are not None.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if run is None and sae is None:
        if model not in (None, MINIATURE):
            raise MmsaeError(f"{model} has no dictionary yet: give --run (of mmsae fit) or --sae (a folder or hub id).")
        run = str(default[0])
        if not (default[0] / "sae").is_dir():
            print(f"no dictionary yet: training one, mmsae fit --config {default[1]}")
            main(["fit", "--config", str(default[1])])
    core = mmsae.artifact.load(sae or run)  # type: ignore[arg-type]
    point = hook_point or core.spec.input
    if run is not None:
        data = datamodule_of(Path(run))
        own = data.source
        if not isinstance(own, Diffusion):
            raise MmsaeError(f"{run} was trained on {type(own).__name__}, not on a diffusion model.")
        if model is not None or hook_point is not None or given:
            own = _changed(own, model=model or own.name, hook_points=[point], **given)
        source = own
        items = [dict(data.items("val")[i]) for i in range(len(data.items("val")))]  # type: ignore[arg-type]
        cache = Path(run) / "steering.npz"
        key = mmsae.artifact.identity(sae or run)["sha256"]
        latents = _cached(cache, key)
        if latents is None:
            print(f"encoding {len(items)} prompts of the validation split")
            latents = LatentStore.build(core, data.rows("val"))
            _store(cache, key, latents)
        return Opened(source, core, point, latents, items, data.value_names)
    if model is None:
        raise MmsaeError("a dictionary without its run needs --model, the pipeline that it belongs to.")
    source = Diffusion(model, [point], **given)
    items = items_of(list(prompts))
    batches = [source.read(source.collate([item])) for item in items]
    return Opened(source, core, point, LatentStore.build(core, batches), items, {})


def _changed(source: Diffusion, **new: Any) -> Diffusion:
    """The same source with other arguments; a loaded model is not loaded again for settings of the sampler."""
    if new["model"] == source.name and new["hook_points"] == list(source.hook_points):
        twin = copy.copy(source)
        for name, value in new.items():
            if name not in ("model", "hook_points"):
                setattr(twin, name, value)
        return twin
    kept = {n: getattr(source, n) for n in ("steps", "guidance_scale", "size", "dtype", "revision", "variant")}
    return Diffusion(new.pop("model"), new.pop("hook_points"), **{**kept, **new})


def _cached(path: Path, key: str) -> LatentStore | None:
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as found:
        if str(found["key"]) != key:
            return None
        columns = {name.removeprefix("column "): found[name] for name in found.files if name.startswith("column ")}
        return LatentStore(found["offsets"], found["rows"], found["values"], columns, int(found["n_rows"]))


def _store(path: Path, key: str, latents: LatentStore) -> None:
    columns = {f"column {name}": values for name, values in latents.columns.items()}
    arrays = {"offsets": latents.offsets, "rows": latents.rows, "values": latents.values, "n_rows": latents.n_rows}
    np.savez_compressed(path, key=key, **arrays, **columns)


def place(
    opened: Opened,
    half: str = "both",
    timesteps: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    mask: str | None = None,
    tail: bool = False,
) -> Any:
    """The `where` of an intervention from what the command line says.

    Args:
        opened: Model and dictionary.
        half: "both", "conditional" or "opposed".
        timesteps: Lowest and highest.
        box: Top, left, bottom, right in shares of the picture.
        mask: A picture, white where the edit acts.
        tail: Of a text encoder also what stands behind the words.
    """
    if opened.source.encoder:
        if timesteps:
            raise MmsaeError(
                f"{opened.hook_point} knows words and no steps: --timesteps needs a dictionary of the unet or the "
                "transformer."
            )
        return Content.of(opened.source, tail)  # the empty prompt of the other half has no words
    parts: list[Any] = []
    if half != "both":
        parts.append(Conditional(opposed=half == "opposed"))
    if timesteps:
        if len(timesteps) != 2 or timesteps[0] > timesteps[1]:
            raise MmsaeError(f"--timesteps takes the lowest and the highest, not {list(timesteps)}.")
        parts.append(Timesteps(*timesteps))
    if box:
        if len(box) != 4:
            raise MmsaeError(f"--box takes top, left, bottom, right in 0..1, not {list(box)}.")
        parts.append(Box(*box))
    if mask:
        parts.append(Mask(mask))
    if not parts:
        return None
    joined = parts[0]
    for part in parts[1:]:
        joined = joined & part
    return joined


def area(box: Sequence[float] | None, mask: str | None) -> Tensor | None:
    """The mask of the picture `[H, W]` in 0..1 that a box or a picture stands for; None without them."""
    if box and mask:
        raise MmsaeError("give --box or --mask, not both.")
    if mask:
        return Mask(mask).weights
    if not box:
        return None
    if len(box) != 4:
        raise MmsaeError(f"--box takes top, left, bottom, right in 0..1, not {list(box)}.")
    Box(*box)  # says what is wrong with it
    inside = torch.zeros(256, 256)
    top, left, bottom, right = (round(256 * edge) for edge in box)
    inside[top:bottom, left:right] = 1
    return inside

"""Text-to-image diffusion models of diffusers: what their blocks write at every step of denoising."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from mmsae.containers import find, of_call
from mmsae.errors import MmsaeError, checked
from mmsae.hooks import capture, parse
from mmsae.sources.base import _ONE_AT_A_TIME
from mmsae.sources.items import text_of
from mmsae.sources.pipelines import Mode, Pipeline
from mmsae.sources.positions import DELIMITER, PADDING, PREFIX, grid_places
from mmsae.sources.weights import first_line, hub_or_cache, located, needs, without_logs
from mmsae.spec import ACTS, ActivationSpec, Batch

Guidance = Literal["conditional", "both"]
JOINT = re.compile(r"transformer\.(single_)?transformer_blocks\.\d+")
"""Blocks of SD3 and Flux, whose outputs are words first and picture second."""


class Diffusion(Pipeline):
    """A diffusion pipeline of diffusers, read while it draws or while it looks at noised pictures.

    Rows carry `timestep`, `sigma` (noise by signal; for flow matching the share of the noise), `row` and `column` on
    the grid of the block, and `conditional`: 1 for the half of the batch that knows the prompt, 0 for the other one.
    Items with `prompt_embeds` (and what else the pipeline takes of them) need no text encoder; a DiT reads items with
    `class_label`, or with a text that is a name of a class.

    Args:
        model: Local folder or id on the hub of a pipeline (SD 1.x, SDXL, SDXL-Turbo, DiT, PixArt, SD3, Flux), or
            `miniature:diffusion`.
        hook_points: Modules of the pipeline's parts: `unet.mid_block.attentions.0:delta`,
            `unet.up_blocks.1.attentions.1`, `transformer.transformer_blocks.5:delta[1]` (SD3 and Flux: [0] words, [1]
            picture), `text_encoder.text_model.encoder.layers.9`.
        mode: "generate" runs the sampler on prompts; "noise" adds noise to pictures and looks at each noised one.
        steps: Of the sampler.
        timesteps: Which of them are read. When drawing, the nearest steps of the sampler, None for all; of pictures,
            None for `draws` random ones.
        draws: Random timesteps of each picture.
        guidance_scale: Of the sampler; None is the pipeline's own.
        guidance: Which half of a guided step becomes rows.
        size: Height and width of pictures in pixels; None is the pipeline's own.
        seed: Of the noise, which further depends on the `sample_id` and the text of an item and on nothing else.
        pictures: Whether `render` draws what a prompt gives; without, the page has prompts only.
        dtype: Of the weights.
        revision: Branch, tag or commit on the hub.
        variant: Of the weight files, such as "fp16".
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    modality = "image"

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        mode: Mode = "generate",
        steps: int = 20,
        timesteps: Sequence[int] | None = None,
        draws: int = 1,
        guidance_scale: float | None = None,
        guidance: Guidance = "conditional",
        size: int | None = None,
        seed: int = 0,
        pictures: bool = True,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        revision: str | None = None,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value, options in (("mode", mode, Mode), ("guidance", guidance, Guidance)):
            if value not in get_args(options):
                raise MmsaeError(f"{name}={value!r} is unknown; choose {' or '.join(get_args(options))}.")
        points = [hook_points] if isinstance(hook_points, str) else list(hook_points)
        parts = {parse(point).path.split(".")[0] for point in points}
        self.encoder = next((part for part in parts if part.startswith("text_encoder")), None)
        if self.encoder and len(parts) > 1:
            raise MmsaeError(f"{' and '.join(sorted(parts))} have different positions; extract them separately.")
        self.modality = "text" if self.encoder else "image"
        super().__init__(hook_points, **kwargs)
        self.name = str(model)
        self.mode = mode
        self.steps = checked("steps", steps, 1)
        self.timesteps = None if timesteps is None else [int(checked("timesteps", t, 0)) for t in timesteps]
        if self.timesteps == []:
            raise MmsaeError("timesteps=[] reads nothing; leave it out to read all of them.")
        self.draws = checked("draws", draws, 1)
        self.guidance_scale, self.guidance, self.size = guidance_scale, guidance, size
        self.seed, self.pictures, self.dtype, self.revision, self.variant = seed, pictures, dtype, revision, variant
        self.pipe: Any = None
        self._listener: Callable[[], None] | None = None
        self._times: list[Tensor] = []  # timesteps [B] of the calls on noised pictures
        self._step: tuple[Tensor, Tensor] | None = None  # timestep and sigma of the running call, [B] or [1]
        self._wanted = True  # whether the running call is one to read
        self._last = False  # whether it is the last of these
        self._shape: tuple[int, int] = (0, 0)  # rows and columns of what the denoiser is given
        self._drawn: dict[int, Any] = {}

    # What the model is.

    def load(self) -> nn.Module:
        """The pipeline; the module that is hooked holds those of its parts that are modules."""
        diffusers = needs("diffusers", "Diffusion", "diffusion")
        name = located(self.name)
        index = Path(name) / "model_index.json"
        if Path(name).is_dir() and not index.is_file():
            raise MmsaeError(f"{name} is no pipeline of diffusers: it has no model_index.json.")
        try:
            if index.is_file() and json.loads(index.read_text()).get("_class_name") == "ScenePainter":
                from mmsae.miniatures.scene_diffusion import scene_painter

                self.pipe = scene_painter(name)
            else:
                if not index.is_file():
                    hub_or_cache()
                given = {"torch_dtype": getattr(torch, self.dtype), "revision": self.revision, "variant": self.variant}
                config = diffusers.DiffusionPipeline.load_config(name, revision=self.revision)
                # The checker of Stable Diffusion looks at finished pictures only, and is as large as a text encoder.
                # Parts that the folder leaves out, text encoders say, have to be left out by name.
                absent = [key for key, kind in config.items() if isinstance(kind, list | tuple) and kind[0] is None]
                given |= dict.fromkeys([*absent, *({"safety_checker"} & config.keys())])
                with without_logs():
                    self.pipe = diffusers.DiffusionPipeline.from_pretrained(name, **given)
                self.pipe.set_progress_bar_config(disable=True)
        except MmsaeError:
            raise
        except Exception as error:
            why = first_line(error)
            if index.is_file():
                raise MmsaeError(f"the folder {name!r} holds no pipeline that diffusers can load ({why}).") from error
            raise MmsaeError(
                f"cannot load the pipeline {self.name!r} ({why}); without a connection give the folder of a pipeline "
                "as model."
            ) from error
        parts = nn.Module()
        for key, part in self.pipe.components.items():
            if isinstance(part, nn.Module):
                parts.add_module(key, part)
        self._part = "unet" if hasattr(parts, "unet") else "transformer"
        if not hasattr(parts, self._part):
            raise MmsaeError(f"{type(self.pipe).__name__} has neither a unet nor a transformer to read.")
        return parts

    def describe(self) -> dict[str, Any]:
        """Name, and how it is run."""
        given = ("mode", "steps", "timesteps", "draws", "guidance_scale", "guidance", "size", "seed", "dtype")
        return {"model": self.name, "revision": self.revision, **{name: getattr(self, name) for name in given}}

    @cached_property
    def spec(self) -> ActivationSpec:
        """Widths of the streams, from the first call of the denoiser."""
        acts = self.read({**self.collate(self.example_items()), "only": 0})[ACTS]
        return ActivationSpec({name: rows.shape[1] for name, rows in acts.items()})

    # From items to what the denoiser is called with.

    def forward(self, batch: dict[str, Any]) -> Any:
        """The drawn latents, or of noised pictures `{"predicted", "target"}`, each `[timesteps, B, ...]`."""
        self.model  # noqa: B018, loading sets the pipeline
        with self._each_call(batch):
            return self._generate(batch, "latent") if self.mode == "generate" or self.encoder else self._noised(batch)

    # Following the steps.

    @contextmanager
    def _each_call(self, batch: dict[str, Any]) -> Iterator[None]:
        """Know at every call of the denoiser which step it is, and tell the listener."""
        numbers = count()

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._note(next(numbers), batch, find(of_call(args, kwargs), None, "the denoiser")[1])
            if self._listener is not None:
                self._listener()

        if self.encoder:
            yield
            return
        handle = self.denoiser.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._step, self._wanted, self._last = None, True, False

    def _note(self, number: int, batch: dict[str, Any], sample: Tensor) -> None:
        side = math.isqrt(sample.shape[1])
        self._shape = (side, side) if sample.dim() == 3 else (sample.shape[-2], sample.shape[-1])
        if self.mode == "noise":
            timestep = self._times[number]
            self._step = timestep, self._sigma(timestep)
            self._wanted, self._last = True, number == len(self._times) - 1
            return
        scheduler = self.pipe.scheduler
        times = scheduler.timesteps.cpu()
        if number >= len(times):
            raise MmsaeError(f"{type(self.pipe).__name__} calls its {self._part} more than once in a step.")
        wanted = list(range(len(times)))
        if self.timesteps is not None:
            wanted = sorted({int((times - t).abs().argmin()) for t in self.timesteps})
        if "only" in batch:
            wanted = [batch["only"]]
        self._wanted, self._last = number in wanted, number == wanted[-1]
        timestep = times[number : number + 1]
        sigmas = getattr(scheduler, "sigmas", None)
        self._step = timestep, (sigmas[number : number + 1].cpu() if sigmas is not None else self._sigma(timestep))

    def _recorded(self, batch: dict[str, Any], stop: bool) -> tuple[Batch, Any]:
        """Rows of all wanted calls of the denoiser, one call in memory at a time, and the output of the pipeline."""
        rows: list[Batch] = []
        output = None
        found: dict[str, Tensor] = {}
        step: tuple[Tensor, Tensor] | None = None
        model = self.model

        def finish() -> None:
            nonlocal found
            reading.close()
            if found:
                rows.append(self._as_rows(found, {}, {**batch, "step": step}))
            found = {}

        def listen() -> None:
            nonlocal found, step
            finish()
            step = self._step
            if self._wanted:
                found = reading.enter_context(capture(model, self.points, stop=stop and self._last))

        with _ONE_AT_A_TIME, torch.no_grad():  # the listener too: chunks are read ahead in another thread
            self._listener = listen
            try:
                with ExitStack() as reading:
                    output = self.forward(batch)
                finish()
            finally:
                self._listener = None
        if not rows:
            raise MmsaeError(f"{type(self.pipe).__name__} ran no step that is read.")
        return _joined(rows), output

    def read(self, batch: dict[str, Any], gradients: bool = False) -> Batch:
        """One row per selected position of each step that is read; see `Source.read` for the columns.

        With `gradients` pictures are needed (`mode="noise"`): a sampler cannot be differentiated in one piece.
        """
        if self.encoder:
            return super().read(batch, gradients)
        if not gradients:
            return self._recorded(batch, stop=True)[0]
        if self.mode != "noise":
            raise MmsaeError("gradients need noised pictures, not prompts: set mode=noise.")
        n_calls = self.draws if self.timesteps is None else len(self.timesteps)
        return _joined([super(Diffusion, self).read({**batch, "only": i}, True) for i in range(n_calls)])

    def run(self, batch: dict[str, Any], also: Sequence[str] = ()) -> tuple[Batch, Any, dict[str, Tensor]]:
        """As `Source.run`; of further hook points the first call."""
        if self.encoder:
            return super().run(batch, also)
        with ExitStack() as stack:
            further = stack.enter_context(capture(self.model, also, stop=False)) if also else {}
            rows, output = self._recorded(batch, stop=False)
        return rows, output, further

    @contextmanager
    def spliced(
        self, batch: dict[str, Any], replace: Mapping[str, Callable[[Tensor], Tensor]], also: Sequence[str] = ()
    ) -> Iterator[dict[str, Tensor]]:
        """As `Source.spliced`, at all steps and in the half of the batch that are read."""

        def some(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda rows: change(rows) if len(rows) else rows

        with super().spliced(batch, {name: some(change) for name, change in replace.items()}, also) as found:
            yield found

    # Positions.

    def selected(self, batch: dict[str, Any], acts: Tensor) -> Tensor:
        """Which positions are read: none at a step, and in a half of a guided batch, that is not wanted."""
        n = len(batch["sample_id"])
        halves = self._halves(n, len(acts))
        chosen = super().selected(self._repeated(batch, len(halves) // n), acts)
        if len(halves) > n and self.guidance == "conditional":
            chosen = chosen & halves.to(chosen.device)[:, None].bool()
        return chosen & self._wanted

    def _halves(self, n: int, rows: int) -> Tensor:
        """For each example of a batch whether it knows its prompt, int64 `[rows]`."""
        if rows != 2 * n:
            return torch.ones(n, dtype=torch.int64)
        first = 1 if self._takes("class_labels") else 0  # DiTPipeline puts the classes first, the others last
        return torch.tensor([first, 1 - first]).repeat_interleave(n)

    def _repeated(self, batch: dict[str, Any], times: int) -> dict[str, Any]:
        """The batch as often as guidance repeats it, as far as rows need it."""
        if times == 1:
            return batch
        prompts = list(batch.get("prompt", ()))
        silent = [""] * len(prompts)
        both = [*prompts, *silent] if self._takes("class_labels") else [*silent, *prompts]
        many = {"sample_id": batch["sample_id"].repeat(times), "prompt": both}
        columns = {name: values.repeat(times) for name, values in batch["columns"].items()}
        return {**batch, **many, "columns": columns}

    def _as_rows(self, captured: Mapping[str, Tensor], by_point: Mapping[str, Tensor], batch: dict[str, Any]) -> Batch:
        n = len(batch["sample_id"])
        halves = self._halves(n, len(next(iter(captured.values()))))
        batch = self._repeated(batch, len(halves) // n)
        if len(halves) > n and self.guidance == "conditional":
            kept = halves.bool()
            captured, by_point = ({k: x[kept.to(x.device)] for k, x in of.items()} for of in (captured, by_point))
            batch, halves = {**batch, **_masked(batch, kept)}, halves[kept]
        step = batch.get("step") or self._step_of(batch)
        timestep, sigma = (x.expand(n).repeat(len(halves) // n) for x in step)
        own = {"timestep": timestep.round().long(), "sigma": sigma.float(), "conditional": halves}
        wanted, self._wanted = self._wanted, True
        try:
            return super()._as_rows(captured, by_point, {**batch, "columns": {**batch["columns"], **own}})
        finally:
            self._wanted = wanted

    def _step_of(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Timestep and sigma outside `_recorded`: of the one call that gradients were taken of; words have none."""
        if self.encoder or not self._times:
            return torch.tensor([-1]), torch.tensor([torch.nan])
        return self._times[0], self._sigma(self._times[0])

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Of words: start, words, end, padding; all patches are ordinary."""
        if not self.encoder:
            return super().kinds(batch, T)
        ids, mask = self._tokens(batch, T)
        kinds = torch.zeros_like(ids)
        tokenizer = self._tokenizer
        start, end = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
        if not hasattr(tokenizer, "bos_token_id"):
            start, end = tokenizer.start, tokenizer.end
        kinds[ids == start] = PREFIX
        kinds[ids == end] = DELIMITER
        kinds[mask == 0] = PADDING
        return kinds

    def grid(self, batch: dict[str, Any], T: int) -> tuple[Tensor, Tensor]:
        """Row and column of every patch; words, and words in front of patches, have none."""
        n = len(batch["sample_id"])
        if self.encoder or self._reads_words:
            return grid_places(n, T, 0, 0, 0)
        height, width = self._shape
        while height and width:  # UNets halve the grid from level to level, transformers cut it into patches
            if height * width == T:
                return grid_places(n, T, 0, height, width)
            height, width = height // 2, width // 2
        height, width = (side // self._patch for side in self._shape)
        first = T - height * width
        return grid_places(n, T, first, height, width) if first > 0 else grid_places(n, T, 0, 0, 0)

    def columns(self, batch: dict[str, Any], T: int) -> dict[str, Tensor]:
        """Of words `token_id`."""
        return {"token_id": self._tokens(batch, T)[0]} if self.encoder else {}

    @property
    def _patch(self) -> int:
        return 1 if hasattr(self.pipe, "_pack_latents") else self.denoiser.config.get("patch_size") or 1

    @property
    def _reads_words(self) -> bool:
        """Whether the streams are the words of a block that has words and picture."""
        return all(JOINT.fullmatch(point.path) and point.select == 0 for point in self.points)

    @property
    def _tokenizer(self) -> Any:
        if hasattr(self.pipe, "text_tower"):
            return self.pipe.text_tower.tokenizer
        suffix = (self.encoder or "").removeprefix("text_encoder")
        return getattr(self.pipe, f"tokenizer{suffix}", None)

    @property
    def special_ids(self) -> list[int]:
        """Tokens of the steered text encoder that are no words: start, end, padding."""
        self.model  # noqa: B018, loading sets the tokenizer
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise MmsaeError(f"{type(self.pipe).__name__} has no tokenizer, so its words are not known.")
        if hasattr(self.pipe, "text_tower"):
            return [tokenizer.pad, tokenizer.start, tokenizer.end]
        return list(tokenizer.all_special_ids)

    def _tokens(self, batch: dict[str, Any], T: int) -> tuple[Tensor, Tensor]:
        """Ids and attention mask `[B, T]` as the pipeline makes them."""
        tokenizer = self._tokenizer
        if tokenizer is None or "prompt" not in batch or T == 1:
            empty = torch.zeros(len(batch["sample_id"]), T, dtype=torch.int64)
            return empty - 1, empty + 1
        if hasattr(self.pipe, "text_tower"):
            ids = tokenizer(batch["prompt"])
            return ids, (ids != tokenizer.pad).long()
        coded = tokenizer(
            batch["prompt"], padding="max_length", max_length=T, truncation=True, return_tensors="pt",
            return_attention_mask=True,
        )  # fmt: skip
        return coded["input_ids"], coded["attention_mask"]

    # What is measured and shown.

    def outcomes(self, output: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Of noised pictures `denoising_error`: mean squared error of the prediction over all timesteps."""
        if not isinstance(output, dict):
            return {}
        error = (output["predicted"] - output["target"]).square()
        return {"denoising_error": error.transpose(0, 1).flatten(1).mean(1)}

    def loss(self, output: Any, batch: dict[str, Any]) -> Tensor:
        """The sum over noised pictures and timesteps of the mean squared error of the prediction."""
        if not isinstance(output, dict):
            raise MmsaeError("Diffusion has a loss on noised pictures only: set mode=noise.")
        n = output["predicted"].shape[0] * output["predicted"].shape[1]
        return n * mse_loss(output["predicted"], output["target"])

    def divergence(self, output: Any, clean: Any, batch: dict[str, Any]) -> Tensor:
        """Mean squared difference of the predictions, or of the drawn latents."""
        ours, theirs = (x["predicted"] if isinstance(x, dict) else x for x in (output, clean))
        return mse_loss(ours.float(), theirs.float())

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The prompt and the picture: drawn from it, or the one that is noised; for text encoders the words."""
        text = str(item.get("text") or "")
        if self.encoder:
            tokens = self._shown_tokens(item)
            return {"kind": "text", "tokens": tokens}
        if self.mode == "noise":
            return {"kind": "diffusion", "image": self._fitted(item), "text": text}
        return {"kind": "diffusion", "image": self._picture(item) if self.pictures else None, "text": text}

    def _picture(self, item: dict[str, Any]) -> Any:
        key = int(item["sample_id"])
        if key not in self._drawn:
            with _ONE_AT_A_TIME:
                batch = self.collate([item])
                self._drawn[key] = self._generate(batch, "pil")[0]
            if len(self._drawn) > 512:
                self._drawn.pop(next(iter(self._drawn)))
        return self._drawn[key]

    def _shown_tokens(self, item: dict[str, Any]) -> list[str]:
        self.model  # noqa: B018, loading sets the tokenizer
        tokenizer = self._tokenizer
        if tokenizer is None:
            return str(item.get("text") or "").split()
        T = getattr(tokenizer, "context_length", None) or tokenizer.model_max_length
        ids, mask = self._tokens({"prompt": [text_of(item)], "sample_id": torch.zeros(1)}, T)
        kept = ids[0][mask[0] == 1].tolist()
        if hasattr(tokenizer, "names"):
            return [tokenizer.names[i] + " " for i in kept]
        return [name.replace("</w>", " ").replace("▁", " ") for name in tokenizer.convert_ids_to_tokens(kept)]

    def __getstate__(self) -> dict[str, Any]:
        """Data workers need no weights; they load the pipeline if they have to fit pictures to it."""
        return {**super().__getstate__(), "pipe": None}


def _masked(batch: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    """What rows need of a batch, of some of its examples."""
    columns = {name: values[kept] for name, values in batch["columns"].items()}
    prompts = [p for p, keep in zip(batch["prompt"], kept.tolist(), strict=True) if keep] if batch["prompt"] else []
    return {"sample_id": batch["sample_id"][kept], "columns": columns, "prompt": prompts}


def _joined(parts: list[Batch]) -> Batch:
    """Rows of several steps below one another."""
    if len(parts) == 1:
        return parts[0]
    joined: Batch = {}
    for key, first in parts[0].items():
        if isinstance(first, dict):
            joined[key] = {name: torch.cat([part[key][name] for part in parts]) for name in first}
        else:
            joined[key] = torch.cat([part[key] for part in parts])
    return joined

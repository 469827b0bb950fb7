"""Text-to-image diffusion models of diffusers: what their blocks write at every step of denoising."""

from __future__ import annotations

import inspect
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from mmsae.containers import find, of_call, put_call
from mmsae.errors import MmsaeError, checked
from mmsae.hooks import capture, parse
from mmsae.sources.base import _ONE_AT_A_TIME, Source
from mmsae.sources.items import picture, text_of
from mmsae.sources.positions import DELIMITER, PADDING, PREFIX, grid_places
from mmsae.sources.weights import first_line, located, needs
from mmsae.spec import ACTS, ActivationSpec, Batch

Mode = Literal["generate", "noise"]
Guidance = Literal["conditional", "both"]
EMBEDS = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    "prompt_attention_mask", "negative_prompt_attention_mask",
)  # fmt: skip
JOINT = re.compile(r"transformer\.(single_)?transformer_blocks\.\d+")
"""Blocks of SD3 and Flux, whose outputs are words first and picture second."""


class Diffusion(Source):
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
                given = {"torch_dtype": getattr(torch, self.dtype), "revision": self.revision, "variant": self.variant}
                config = diffusers.DiffusionPipeline.load_config(name, revision=self.revision)
                # The checker of Stable Diffusion looks at finished pictures only, and is as large as a text encoder.
                # Parts that the folder leaves out, text encoders say, have to be left out by name.
                absent = [key for key, kind in config.items() if isinstance(kind, list | tuple) and kind[0] is None]
                given |= dict.fromkeys([*absent, *({"safety_checker"} & config.keys())])
                self.pipe = diffusers.DiffusionPipeline.from_pretrained(name, **given)
                self.pipe.set_progress_bar_config(disable=True)
        except MmsaeError:
            raise
        except Exception as error:
            raise MmsaeError(
                f"cannot load the pipeline {self.name!r} ({first_line(error)}); without a connection give the folder "
                "of a pipeline as model."
            ) from error
        parts = nn.Module()
        for key, part in self.pipe.components.items():
            if isinstance(part, nn.Module):
                parts.add_module(key, part)
        self._part = "unet" if hasattr(parts, "unet") else "transformer"
        if not hasattr(parts, self._part):
            raise MmsaeError(f"{type(self.pipe).__name__} has neither a unet nor a transformer to read.")
        return parts

    @property
    def denoiser(self) -> Any:
        """The network that predicts the noise."""
        return getattr(self.model, self._part)

    def describe(self) -> dict[str, Any]:
        """Name, and how it is run."""
        given = ("mode", "steps", "timesteps", "draws", "guidance_scale", "guidance", "size", "seed", "dtype")
        return {"model": self.name, "revision": self.revision, **{name: getattr(self, name) for name in given}}

    @cached_property
    def spec(self) -> ActivationSpec:
        """Widths of the streams, from the first call of the denoiser."""
        acts = self.read({**self.collate(self.example_items()), "only": 0})[ACTS]
        return ActivationSpec({name: rows.shape[1] for name, rows in acts.items()})

    def example_items(self) -> list[dict[str, Any]]:
        """A prompt, or what stands for one where the pipeline has no text encoder, and a plain picture."""
        from PIL import Image

        item = {"sample_id": 0, "text": "a picture", **({"class_label": 0} if self._takes("class_labels") else {})}
        if self.mode == "noise":
            item["image"] = Image.new("RGB", (self.side, self.side), (90, 100, 120))
        known = [getattr(self.pipe, name, None) for name in ("text_tower", "tokenizer", "tokenizer_2", "tokenizer_3")]
        if any(known) or self._takes("class_labels"):
            return [item]
        config = self.denoiser.config
        names = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
        width = next(config[name] for name in names if config.get(name))
        item["prompt_embeds"] = item["negative_prompt_embeds"] = torch.zeros(8, width)
        pooled = config.get("pooled_projection_dim")
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        if pooled:
            item["pooled_prompt_embeds"] = item["negative_pooled_prompt_embeds"] = torch.zeros(pooled)
        if self._takes("prompt_attention_mask"):
            item["prompt_attention_mask"] = item["negative_prompt_attention_mask"] = torch.ones(8, dtype=torch.int64)
        return [item]

    @property
    def side(self) -> int:
        """Height and width of a picture in pixels."""
        if self.size:
            return self.size
        self.model  # noqa: B018, loading sets the pipeline
        vae = getattr(self.pipe, "vae", None)
        factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else self.pipe.factor
        return (getattr(self.pipe, "default_sample_size", None) or self.denoiser.config.sample_size) * factor

    # From items to what the denoiser is called with.

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`prompt` (list of str), embeddings that stand for it, or `class_label`; `pixels` `[B, 3, H, W]` in 0..1."""
        batch: dict[str, Any] = {}
        if self._takes("class_labels"):
            batch["class_label"] = torch.tensor([self._class(item) for item in items])
        elif "prompt_embeds" in items[0]:
            for key in EMBEDS:
                if key in items[0]:
                    batch[key] = torch.stack([torch.as_tensor(item[key]) for item in items])
        else:
            batch["prompt"] = [str(i.get("text") or "") if self.mode == "noise" else text_of(i) for i in items]
        names = (f"{self.seed} {item['sample_id']} {item.get('text') or ''}" for item in items)
        batch["noise_seed"] = torch.tensor([zlib.crc32(name.encode()) for name in names])
        if self.mode == "noise":
            batch["pixels"] = torch.stack([self._pixels(item) for item in items])
        return batch

    def forward(self, batch: dict[str, Any]) -> Any:
        """The drawn latents, or of noised pictures `{"predicted", "target"}`, each `[timesteps, B, ...]`."""
        self.model  # noqa: B018, loading sets the pipeline
        with self._each_call(batch):
            return self._generate(batch, "latent") if self.mode == "generate" or self.encoder else self._noised(batch)

    def _generate(self, batch: dict[str, Any], output_type: str) -> Any:
        with ExitStack() as stack:
            if torch.is_grad_enabled():  # pipelines draw without gradients, whoever asks for them
                stack.enter_context(torch.no_grad())
            return self.pipe(**self._arguments(batch, steps=self.steps, output_type=output_type)).images

    def _arguments(self, batch: dict[str, Any], steps: int, output_type: str) -> dict[str, Any]:
        """Arguments of the pipeline, those that it takes."""
        given: dict[str, Any] = {
            "num_inference_steps": steps,
            "generator": [torch.Generator().manual_seed(i) for i in batch["noise_seed"].tolist()],
            "output_type": output_type,
            "guidance_scale": self.guidance_scale,
            "height": self.size,
            "width": self.size,
            "use_resolution_binning": False,  # PixArt would draw at the nearest size of a table
        }
        if "prompt" in batch:
            given["prompt"] = list(batch["prompt"])
        if "class_label" in batch:
            given |= {"class_labels": batch["class_label"].tolist()}
            given["output_type"] = "pil" if output_type == "pil" else "pt"  # DiT gives no latents
        dtype = self.denoiser.dtype
        for key in EMBEDS:
            if key in batch:
                values = batch[key].to(self.placed)
                given[key] = values.to(dtype) if values.is_floating_point() else values
        arguments = {key: value for key, value in given.items() if value is not None and self._takes(key)}
        if "negative_prompt_embeds" in arguments and self._takes("negative_prompt"):
            arguments["negative_prompt"] = None  # PixArt's own is "", and it refuses to have both
        return arguments

    def _noised(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The denoiser on the pictures with noise, once for each timestep.

        The pipeline prepares everything else: it is run until it calls the denoiser for the first time.
        """
        clean = self._latents(batch["pixels"].to(self.placed))
        args, kwargs = self._first_call(batch)
        key, sample = find(of_call(args, kwargs), None, "the denoiser")
        noise, drawn = self._noise(batch, clean)
        packed = sample.dim() == 3  # Flux works on rows of four latents each
        flow = self._flow
        predicted, targets = [], []
        for timestep in drawn:  # [B]
            signal, share = (x.view(-1, 1, 1, 1).to(clean) for x in self._schedule(timestep))
            noised = signal * clean + share * noise
            target = noise - clean if flow else noise
            if not flow and self.pipe.scheduler.config.get("prediction_type") == "v_prediction":
                target = signal * noise - share * clean
            if packed:
                noised, target = (self.pipe._pack_latents(x, *x.shape) for x in (noised, target))
            time = timestep.to(sample)  # a timestep for each example
            time = time / 1000 if packed else time
            call = put_call(args, kwargs, key, noised.to(sample))
            call = put_call(*call, 1 if len(args) > 1 else "timestep", time)  # UNets take it by position
            output = self.denoiser(*call[0], **{**call[1], "return_dict": False})[0]
            axis = 2 if packed else 1
            predicted.append(output.narrow(axis, 0, target.shape[axis]).float())  # DiT: behind it is a variance
            targets.append(target.float())
        return {"predicted": torch.stack(predicted), "target": torch.stack(targets)}

    def _first_call(self, batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What the pipeline gives the denoiser at its first step without guidance."""

        def interrupt(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            raise _Prepared(args, kwargs)

        arguments = self._arguments(batch, steps=2, output_type="latent")
        if not self.denoiser.config.get("guidance_embeds"):  # Flux reads its scale as a number
            arguments["guidance_scale"] = 1.0
        handle = self.denoiser.register_forward_pre_hook(interrupt, prepend=True, with_kwargs=True)
        try:
            with torch.no_grad():
                self.pipe(**arguments)
        except _Prepared as prepared:
            return prepared.args
        finally:
            handle.remove()
        raise MmsaeError(f"{type(self.pipe).__name__} did not call its {self._part}.")

    def _noise(self, batch: dict[str, Any], like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Noise of the shape of the latents, and a list of timesteps `[B]`; a function of seed and item."""
        n_steps = self.pipe.scheduler.config.num_train_timesteps
        noises, random = [], []
        for i in batch["noise_seed"].tolist():
            generator = torch.Generator().manual_seed(i)
            noises.append(torch.randn(like.shape[1:], generator=generator))
            random.append(torch.randint(n_steps, (self.draws,), generator=generator))
        if self.timesteps is None:
            drawn = list(torch.stack(random, dim=1))
        else:
            if max(self.timesteps) >= n_steps:
                raise MmsaeError(f"timesteps={max(self.timesteps)} is too high: {self.name} has {n_steps} timesteps.")
            drawn = [torch.full((len(noises),), t) for t in self.timesteps]
        if "only" in batch:
            drawn = [drawn[batch["only"]]]
        self._times = drawn
        return torch.stack(noises).to(like), drawn

    @property
    def _flow(self) -> bool:
        return not hasattr(self.pipe.scheduler, "alphas_cumprod")

    def _schedule(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of picture and of noise at timesteps, float64 of their shape."""
        if self._flow:
            share = timestep.double() / self.pipe.scheduler.config.num_train_timesteps
            return 1 - share, share
        kept = self.pipe.scheduler.alphas_cumprod.double().cpu()[timestep.long().cpu()]
        return kept.sqrt(), (1 - kept).sqrt()

    def _sigma(self, timestep: Tensor) -> Tensor:
        signal, share = self._schedule(timestep)
        return share if self._flow else share / signal.clamp(min=2.0**-12)  # a zero signal has no finite ratio

    def _latents(self, pixels: Tensor) -> Tensor:
        """What the denoiser works on, of pictures in 0..1."""
        if hasattr(self.pipe, "encode"):
            return self.pipe.encode(pixels)
        vae = self.pipe.vae
        with torch.no_grad():
            latents = vae.encode((2 * pixels - 1).to(vae.dtype)).latent_dist.mode()
        return (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor

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
        known = sigmas is not None and len(sigmas) >= len(times)
        self._step = timestep, (sigmas[number : number + 1].cpu() if known else self._sigma(timestep))

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

        self._listener = listen
        try:
            with _ONE_AT_A_TIME, torch.no_grad(), ExitStack() as reading:
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

    def _takes(self, argument: str) -> bool:
        if self.pipe is None:
            self.model  # noqa: B018, loading sets the pipeline
        return argument in inspect.signature(type(self.pipe).__call__).parameters

    def _class(self, item: dict[str, Any]) -> int:
        if "class_label" in item:
            return int(item["class_label"])
        try:
            return int(self.pipe.get_label_ids([text_of(item)])[0])
        except (ValueError, KeyError, AttributeError) as error:
            raise MmsaeError(
                f"item {item.get('sample_id')} has no 'class_label', and its text is no class of the model."
            ) from error

    def _fitted(self, item: dict[str, Any]) -> Any:
        from PIL import Image, ImageOps

        return ImageOps.fit(picture(item), (self.side, self.side), Image.Resampling.BOX)

    def _pixels(self, item: dict[str, Any]) -> Tensor:
        import numpy as np

        return torch.from_numpy(np.array(self._fitted(item))).permute(2, 0, 1) / 255

    def __getstate__(self) -> dict[str, Any]:
        """Data workers need no weights; they load the pipeline if they have to fit pictures to it."""
        return {**super().__getstate__(), "pipe": None}


class _Prepared(BaseException):  # not an Exception: a pipeline's own `except Exception` must not swallow it
    """The first call of the denoiser."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args = (args, kwargs)


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

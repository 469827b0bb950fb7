"""What a pipeline of diffusers is given: prompts and noise to draw from, or noised pictures to look at."""

from __future__ import annotations

import inspect
import zlib
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmsae.containers import find, of_call, put_call
from mmsae.errors import MmsaeError
from mmsae.sources.base import Source
from mmsae.sources.items import picture, text_of

Mode = Literal["generate", "noise"]
EMBEDS = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    "prompt_attention_mask", "negative_prompt_attention_mask",
)  # fmt: skip


class Pipeline(Source):
    """A diffusion pipeline and its inputs; what is read of it is the subclass's (`mmsae.sources.diffusion`)."""

    name: str
    pipe: Any
    mode: Mode
    steps: int
    timesteps: list[int] | None
    draws: int
    guidance_scale: float | None
    size: int | None
    seed: int
    encoder: str | None
    _part: str
    _times: list[Tensor]

    @property
    def denoiser(self) -> Any:
        """The network that predicts the noise."""
        return getattr(self.model, self._part)

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
        if any("negative_prompt" in item for item in items) and self._takes("negative_prompt"):
            batch["negative_prompt"] = [str(item.get("negative_prompt") or "") for item in items]
        names = (f"{self.seed} {item['sample_id']} {item.get('text') or ''}" for item in items)
        batch["noise_seed"] = torch.tensor([zlib.crc32(name.encode()) for name in names])
        if self.mode == "noise":
            batch["pixels"] = torch.stack([self._pixels(item) for item in items])
        return batch

    def _generate(self, batch: dict[str, Any], output_type: str) -> Any:
        with ExitStack() as stack:
            if torch.is_grad_enabled():  # pipelines draw without gradients, whoever asks for them
                stack.enter_context(torch.no_grad())
            return self.pipe(**self._arguments(batch, steps=self.steps, output_type=output_type)).images

    def draw(self, batch: dict[str, Any]) -> Tensor:
        """Finished pictures of a batch of prompts `[B, 3, H, W]` in 0..1, float32 on the CPU."""
        self.model  # noqa: B018, loading sets the pipeline
        drawn = torch.as_tensor(self._generate(batch, "pt"))
        if drawn.shape[-1] == 3 and drawn.shape[1] != 3:  # DiT gives arrays [B, H, W, 3]
            drawn = drawn.permute(0, 3, 1, 2)
        return drawn.float().cpu().clamp(0, 1)

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
        if "negative_prompt" in batch:
            given["negative_prompt"] = list(batch["negative_prompt"])
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


class _Prepared(BaseException):  # not an Exception: a pipeline's own `except Exception` must not swallow it
    """The first call of the denoiser."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args = (args, kwargs)

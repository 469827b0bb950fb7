"""A miniature text-to-image diffusion model of diffusers' own classes that draws scenes; it ships with the package.

`recipes/train_scene_diffusion.py` trains it. Its folder has the layout of diffusers: `model_index.json`, `unet/` and
`scheduler/`. The prompt is read by the text tower of the miniature CLIP, as Stable Diffusion reads it by that of CLIP.

    painter = scene_painter()
    painter(["a red seven at the top left"], generator=torch.Generator().manual_seed(0)).images[0]  # of PIL
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.miniatures.captions import FACTORS, compose
from mmsae.miniatures.clip import scene_clip, zero_shot
from mmsae.miniatures.scenes import Scenes

FOLDER = Path(__file__).parent / "diffusion"
SIDE = 32  # pixels; the scenes have twice as many
BLOCK = 2  # the network sees each square of so many pixels as one position of the channels of all of them
DRAWN = ("digit", "colour", "position")  # what its prompts state
FIXED = {"size": "large", "background": "plain"}  # what is the same in every picture that it was shown


class DrawnScenes:
    """The scenes that the miniature learns: large digits on plain paper, with a caption that states the rest.

    Args:
        split: Which handwritten digits to draw.
        n: Number of scenes.
        seed: Another seed gives other scenes of the same digits.
    """

    def __init__(self, split: Literal["train", "val", "test"], n: int, seed: int = 0) -> None:
        of_all = len(FACTORS["size"]) * len(FACTORS["background"])
        self.scenes = Scenes(split, 2 * of_all * n + 200, seed)  # one of `of_all` has the fixed values
        labels = self.scenes.labels()
        wanted = [labels[factor] == FACTORS[factor].index(value) for factor, value in FIXED.items()]
        self.index = np.flatnonzero(np.all(wanted, axis=0))[:n]
        self.labels = {factor: labels[factor][self.index] for factor in DRAWN}

    def __len__(self) -> int:
        return len(self.index)

    def pixels(self, index: int) -> np.ndarray:
        """The picture, each value the mean over four pixels of the scene: uint8 [SIDE, SIDE, 3]."""
        scene = self.scenes.pixels(int(self.index[index])).astype(np.float32)
        return (scene.reshape(SIDE, 2, SIDE, 2, 3).mean(axis=(1, 3)) + 0.5).astype(np.uint8)

    def caption(self, index: int, place: int = 0) -> str:
        """A caption that states digit, colour and position."""
        return compose({factor: int(self.labels[factor][index]) for factor in DRAWN}, place=place)


class TextTower:
    """The text tower of the miniature CLIP as the condition of a diffusion model.

    What it gives is what Stable Diffusion takes from its CLIP: the states of all tokens after the final norm, before
    one of them is chosen and projected.
    """

    def __init__(self) -> None:
        self.clip, self.preprocess, self.tokenizer = scene_clip()

    @torch.no_grad()
    def __call__(self, prompts: str | Sequence[str]) -> Tensor:
        """States [n, tokens, width] of one prompt or of n prompts."""
        device = next(self.clip.parameters()).device
        with capture(self.clip, ["ln_final"]) as found:
            self.clip(text=self.tokenizer(prompts).to(device))  # a call of the module, so that hooks see the words
        return found["ln_final"]


class ScenePainter:
    """The miniature, called like a pipeline of diffusers.

    Args:
        unet: diffusers' `UNet2DConditionModel`.
        scheduler: A scheduler of diffusers.
        text_tower: What reads the prompts.
    """

    factor = BLOCK  # pixels for each position of the latents

    def __init__(self, unet: nn.Module, scheduler: Any, text_tower: TextTower) -> None:
        self.unet, self.scheduler, self.text_tower = unet, scheduler, text_tower

    @property
    def components(self) -> dict[str, Any]:
        """The parts, as those of a pipeline of diffusers."""
        return {"unet": self.unet, "scheduler": self.scheduler, "text_encoder": self.text_tower.clip}

    def encode(self, pictures: Tensor) -> Tensor:
        """What the network works on, see `encode`."""
        return encode(pictures)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        negative_prompt: str | Sequence[str] = "",
    ) -> SimpleNamespace:
        """Draw one picture for each prompt.

        Args:
            prompt: One or several prompts.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: How far to go from the unconditional prediction; 1 asks for no unconditional one.
            generator: Of the first noise, on the CPU; a list has one for each prompt.
            latents: The first noise itself, `[n, 12, 16, 16]`.
            output_type: PIL pictures, a tensor `[n, 3, 32, 32]` in 0..1, or the latents.
            callback_on_step_end: Called with painter, index of the step, timestep and `{"latents"}`.
            negative_prompt: What to go away from, in place of no prompt; one, or one for each.

        Returns:
            `images`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        unet: Any = self.unet
        device = next(unet.parameters()).device
        guided = guidance_scale != 1
        away = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        context = self.text_tower([*(away if guided else []), *prompts]).to(device)
        if latents is None:
            shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
            if isinstance(generator, list):
                latents = torch.stack([torch.randn(shape, generator=own) for own in generator])
            else:
                latents = torch.randn(len(prompts), *shape, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = latents.to(device) * self.scheduler.init_noise_sigma
        for index, timestep in enumerate(self.scheduler.timesteps):
            both = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, timestep)
            predicted = unet(both, timestep, encoder_hidden_states=context).sample
            if guided:
                without, conditional = predicted.chunk(2)
                predicted = without + guidance_scale * (conditional - without)
            x = self.scheduler.step(predicted, timestep, x).prev_sample
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, index, timestep, {"latents": x}).get("latents", x)
        if output_type == "latent":
            return SimpleNamespace(images=x)
        pictures = decode(x)
        return SimpleNamespace(images=pictures if output_type == "pt" else pil(pictures))


def encode(pictures: Tensor) -> Tensor:
    """What the network works on, `[n, 12, 16, 16]` in -1..1, of pictures `[n, 3, 32, 32]` in 0..1."""
    return pixel_unshuffle(2 * pictures - 1, BLOCK)


def decode(latents: Tensor) -> Tensor:
    """Pictures `[n, 3, 32, 32]` in 0..1 of what the network works on."""
    return (pixel_shuffle(latents, BLOCK) / 2 + 0.5).clamp(0, 1)


def pil(pictures: Tensor) -> list[Image.Image]:
    """Pictures of PIL of a tensor `[n, 3, height, width]` in 0..1."""
    values = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in values]


def scene_painter(folder: str | Path = FOLDER) -> ScenePainter:
    """The trained miniature, in eval mode and float32.

    Args:
        folder: Where `unet/` and `scheduler/` are; by default the ones that ship with the package.
    """
    try:
        from diffusers import DDIMScheduler, UNet2DConditionModel
    except ImportError as error:
        raise MmsaeError("The miniature diffusion model needs diffusers: pip install 'mmsae[diffusion]'.") from error
    if not (Path(folder) / "unet" / "config.json").is_file():
        raise MmsaeError(f"{folder} has no unet/config.json; recipes/train_scene_diffusion.py writes it.")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    return ScenePainter(unet.eval(), DDIMScheduler.from_pretrained(folder, subfolder="scheduler"), TextTower())


@torch.no_grad()
def recovered(tower: TextTower, pictures: Tensor, labels: dict[str, np.ndarray]) -> dict[str, float]:
    """How often the miniature CLIP sees in a picture what its prompt states, of each factor, as a fraction.

    Args:
        tower: Its image tower is the classifier: the zero-shot prompt nearest to the picture.
        pictures: `[n, 3, 32, 32]` in 0..1; they are enlarged to the size that CLIP reads.
        labels: Factor to its true values `[n]`.
    """
    read = torch.cat([torch.stack([tower.preprocess(image) for image in pil(part)]) for part in pictures.split(250)])
    embedded = torch.cat([tower.clip.encode_image(part) for part in read.split(250)])
    accuracy = {}
    for factor, truth in labels.items():
        guess = (embedded @ zero_shot(tower.clip, tower.tokenizer, factor).T).argmax(dim=1)
        accuracy[factor] = float((guess.numpy() == truth).mean())
    return accuracy

"""Train the miniature diffusion model that ships with the package, from nothing, on one CPU core.

    python recipes/train_scene_diffusion.py --out runs/scene_diffusion --threads 1

These are the settings of the weights that ship (88 % of the digits recovered, all colours and positions). Interrupt it
at will: the same command goes on from the last checkpoint; a larger `--steps` trains on.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import diffusers
import jsonargparse
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm
from train_scene_clip import resume, save, state, write

from mmsae.errors import checked
from mmsae.miniatures.scene_diffusion import (
    BLOCK,
    DRAWN,
    FIXED,
    SIDE,
    DrawnScenes,
    ScenePainter,
    TextTower,
    decode,
    encode,
    pil,
    recovered,
    scene_painter,
)


def train(
    out: str,
    steps: int = 1900,
    batch_size: int = 32,
    lr: float = 1e-3,
    n_train: int = 20000,
    seed: int = 0,
    threads: int = 1,
    precision: Literal["bf16", "fp32"] = "bf16",
    checkpoint_every: int = 100,
    look_every: int = 400,
    n_test: int = 500,
    guidance_scale: float = 2.0,
) -> None:
    """Train a miniature diffusion model on scenes and write it in the layout of diffusers.

    The network predicts the velocity (Salimans and Ho 2022) under a cosine schedule of noise; one prompt in ten is
    empty. Timesteps are drawn in proportion to their number: where a digit stands, and which one it is, is settled
    while there is much noise. (With the weights min(SNR, 5) / (SNR + 1) of Hang et al. 2023, which are near zero there,
    positions were still at chance after 800 steps.) What is written is a running mean of the weights.

    Args:
        out: Folder to write to.
        steps: Number of batches.
        batch_size: Scenes in each batch.
        lr: Highest learning rate: it warms up over 100 steps and falls linearly over the last quarter.
        n_train: Different scenes.
        seed: Seed of scenes, noise and first weights.
        threads: CPU threads.
        precision: Precision of the matrix products while training.
        checkpoint_every: Steps between checkpoints.
        look_every: Steps between looks at samples, which are written as `samples_STEP.png`.
        n_test: Number of samples that are measured at the end.
        guidance_scale: Of these samples.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "threads": threads, "n_train": n_train}.items():
        checked(name, value, 1)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    unet = network()
    average = copy.deepcopy(unet).requires_grad_(False)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing",
        clip_sample=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    # Without the number of steps: a longer run goes on where a shorter one ended.
    recipe = {"batch_size": batch_size, "lr": lr, "n_train": n_train, "seed": seed, "precision": precision}

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    first = resume(checkpoint, unet, optimizer, recipe)
    if first:
        means = {n[8:]: tensor for n, tensor in load_file(checkpoint).items() if n.startswith("average.")}
        average.load_state_dict(means)

    tower = TextTower()
    scenes = DrawnScenes("train", n_train, seed)
    latents = encode(pictures_of(scenes, "train"))
    phrases, which = captions_of(scenes)
    contexts = torch.cat([tower(part) for part in batches(phrases, 500)])
    empty = tower("")
    levels = scheduler.alphas_cumprod

    with tqdm(range(first, steps), initial=first, total=steps, mininterval=1) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 100, 4 * (steps - step) / steps)
            random = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
            index = torch.randint(len(scenes), (batch_size,), generator=random)
            clean = latents[index]
            context = contexts[which[index, torch.randint(2, (batch_size,), generator=random)]]
            silent = torch.rand(batch_size, generator=random) < 0.1
            context = torch.where(silent[:, None, None], empty, context)
            noise = torch.randn(clean.shape, generator=random)
            timestep = (len(levels) * torch.rand(batch_size, generator=random).sqrt()).long()
            noised = scheduler.add_noise(clean, noise, timestep)
            target = scheduler.get_velocity(clean, noise, timestep)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                predicted = unet(channels_last(noised), timestep, encoder_hidden_states=context).sample
            loss = mse_loss(predicted.float(), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            follow(average, unet, min(0.995, (1 + step) / (10 + step)))
            bar.set_postfix(loss=f"{loss.item():.4f}")
            done = step + 1
            if done % checkpoint_every == 0 and done < steps:
                means = {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
                metadata = {"step": str(done), "config": json.dumps(recipe)}
                save(checkpoint, state(unet, optimizer) | means, metadata)
            if done % look_every == 0:
                painter = ScenePainter(average.eval(), scheduler, tower)
                seen = recovered(tower, *samples(painter, 64, guidance_scale, folder / f"samples_{done}.png"))
                bar.write(f"step {done}: " + ", ".join(f"{name} {value:.2f}" for name, value in seen.items()))

    write_model(folder, average, scheduler, recipe | {"steps": steps, "threads": threads, **FIXED})
    painter = scene_painter(folder)  # the weights as they are stored
    pictures, labels = samples(painter, n_test, guidance_scale, folder / "samples.png")
    test = DrawnScenes("test", n_test, seed)
    real = recovered(tower, pictures_of(test, "test"), test.labels)
    drawn = recovered(tower, pictures, labels)
    index = json.loads((folder / "model_index.json").read_text())
    index["measured"] = {"samples": n_test, "guidance_scale": guidance_scale, "recovered": drawn, "real_scenes": real}
    write(folder / "model_index.json", index)
    size = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6
    print(f"What CLIP sees in {n_test} samples (in as many real scenes of unseen digits):")
    for factor in DRAWN:
        print(f"  {factor:<12}{drawn[factor]:6.1%}  ({real[factor]:.1%})")
    print(f"Wrote {folder} ({size:.1f} MB).")


def network() -> UNet2DConditionModel:
    """The network with random weights: 4.3 million parameters, attention to the prompt on the 8x8 grid."""
    return UNet2DConditionModel(
        sample_size=SIDE // BLOCK,
        in_channels=3 * BLOCK**2,
        out_channels=3 * BLOCK**2,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=2,  # diffusers' old name of the number of heads
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",  # the pooled prompt joins the timestep: digits are learnt sooner
        addition_embed_type_num_heads=4,
    ).to(memory_format=torch.channels_last)


def pictures_of(scenes: DrawnScenes, what: str) -> Tensor:
    """All pictures, float32 [n, 3, SIDE, SIDE] in 0..1."""
    drawn = np.stack([scenes.pixels(i) for i in tqdm(range(len(scenes)), f"drawing {what}", mininterval=1)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255


def captions_of(scenes: DrawnScenes) -> tuple[list[str], Tensor]:
    """The different captions, and of each scene the index of the two that it has, int64 [n, 2]."""
    pairs = [[scenes.caption(i, place) for place in range(2)] for i in range(len(scenes))]
    number = {caption: index for index, caption in enumerate(dict.fromkeys(c for pair in pairs for c in pair))}
    return list(number), torch.tensor([[number[caption] for caption in pair] for pair in pairs])


def batches(items: list[Any], size: int) -> list[list[Any]]:
    """Lists of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def channels_last(pictures: Tensor) -> Tensor:
    """In the memory layout that convolutions are fastest in."""
    return pictures.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running mean of the weights towards the weights."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def samples(painter: ScenePainter, n: int, guidance_scale: float, path: Path) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Draw n prompts of all factors and write the first 64 as one picture; pictures, and what the prompts state."""
    asked = DrawnScenes("test", n, seed=1)
    prompts = [asked.caption(i) for i in range(n)]
    random = torch.Generator().manual_seed(0)
    parts = [
        painter(part, guidance_scale=guidance_scale, generator=random, output_type="latent").images
        for part in batches(prompts, 100)
    ]
    pictures = decode(torch.cat(parts))
    rows = [torch.cat(list(row), dim=2) for row in pictures[:64].split(8)]
    pil(torch.cat([row for row in rows if row.shape[2] == rows[0].shape[2]], dim=1)[None])[0].save(path)
    return pictures, asked.labels


def write_model(folder: Path, unet: UNet2DConditionModel, scheduler: DDIMScheduler, training: dict[str, Any]) -> None:
    """Write network and scheduler as diffusers reads them, the weights in half precision."""
    copy.deepcopy(unet).half().save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").chmod(0o644)
    content = {
        "_class_name": "ScenePainter", "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"],
        "training": training,
    }  # fmt: skip
    write(folder / "model_index.json", content)


if __name__ == "__main__":
    jsonargparse.auto_cli(train, as_positional=False)

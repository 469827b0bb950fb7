"""Train the miniature CLIP that ships with the package, from nothing, in about half an hour on one or two CPU cores.

    python recipes/train_scene_clip.py --out runs/scene_clip --threads 1

These are the settings of the weights that ship (91.7 % zero-shot on unseen digits, 99.6 % or more on the rest).

Interrupt it at will: the same command goes on from the last checkpoint, to the same weights.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Literal

import jsonargparse
import numpy as np
import open_clip
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from mmsae.errors import MmsaeError, checked
from mmsae.miniatures.captions import FACTORS, vocabulary, zero_shot_prompts
from mmsae.miniatures.clip import build, scene_clip, zero_shot_accuracy
from mmsae.miniatures.scenes import Scenes, mentions

PROMPTS = [prompt for factor in FACTORS for prompt in zero_shot_prompts(factor)]


def train(
    out: str,
    steps: int = 2000,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    width: int = 192,
    layers: int = 4,
    seed: int = 0,
    threads: int = 2,
    precision: Literal["bf16", "fp32"] = "bf16",
    checkpoint_every: int = 100,
    n_test: int = 2000,
) -> None:
    """Train a miniature CLIP on the embedded scenes and write `config.json` and `model.safetensors`.

    Args:
        out: Folder to write to.
        steps: Number of batches.
        batch_size: New scenes in each batch; hardly a scene is seen twice.
        lr: Highest learning rate; it warms up over a fifteenth of the steps and falls along a cosine.
        weight_decay: Weight decay of the matrices.
        width: Width of the vision transformer, a multiple of 32.
        layers: Number of its blocks.
        seed: Seed of the scenes and of the first weights.
        threads: CPU threads.
        precision: Precision of the matrix products while training; bf16 halves the time where the CPU has it.
        checkpoint_every: Steps between checkpoints, each with a look at the validation scenes.
        n_test: Number of test scenes for the accuracy at the end.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "threads": threads, "layers": layers}.items():
        checked(name, value, 1)
    if width % 32:
        raise MmsaeError(f"width={width} is not a multiple of 32, the width of an attention head.")
    recipe = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "seed": seed,
        "threads": threads, "precision": precision,
    }  # fmt: skip
    config = {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 64, "patch_size": 8, "width": width, "layers": layers, "head_width": 32},
            "text_cfg": {"context_length": 20, "width": 128, "heads": 4, "layers": 2},
        },
        "preprocess_cfg": {"mean": [0.30, 0.29, 0.28], "std": [0.25, 0.25, 0.25]},
        "vocabulary": vocabulary(),
        "training": recipe,
    }
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model, preprocess, tokenizer = build(config)
    with torch.no_grad():
        # open_clip's own start is so small that the patches drown it: where things are would be learnt very late.
        model.visual.positional_embedding[1:] = waves(side=8, width=width)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    first = resume(checkpoint, model, optimizer, config)
    scenes = Scenes("train", steps * batch_size, seed)
    easy = easy_ones(scenes)
    val = Scenes("val", min(n_test, 500), seed)
    prompts = tokenizer(PROMPTS)

    with tqdm(range(first, steps), initial=first, total=steps, mininterval=1) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps)
            examples = [scenes[i] for i in lesson(step, steps, batch_size, easy)]
            pixels = preprocess.batch(np.stack([example["image"] for example in examples]))
            texts = torch.cat([tokenizer([example["text"] for example in examples]), prompts])
            labels = facts([example["labels"] for example in examples])
            stated = facts([mentions(example["text"]) for example in examples])
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                image = model.encode_image(pixels, normalize=True).float()
                text = model.encode_text(texts, normalize=True).float()
            scale = model.logit_scale.exp()
            loss = contrast(scale * image @ text.T, labels, stated)
            loss = loss + spread(scale * text[batch_size:] @ text[batch_size:].T)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.logit_scale.data.clamp_(max=math.log(100))
            if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                save(checkpoint, state(model, optimizer), {"step": str(step + 1), "config": json.dumps(config)})
                seen = zero_shot_accuracy(model.eval(), preprocess, tokenizer, val)
                model.train()
                bar.set_postfix(loss=f"{loss.item():.3f}", **{name: f"{value:.2f}" for name, value in seen.items()})

    save(folder / "model.safetensors", {name: tensor.half() for name, tensor in model.state_dict().items()})
    config["versions"] = {"torch": torch.__version__, "open_clip_torch": open_clip.__version__}
    write(folder / "config.json", config)
    test = Scenes("test", n_test, seed)
    config["zero_shot_accuracy"] = zero_shot_accuracy(*scene_clip(folder), test)  # of the weights as they are stored
    config["zero_shot_scenes"] = n_test
    write(folder / "config.json", config)
    checkpoint.unlink(missing_ok=True)

    size = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"Zero-shot accuracy on {n_test} test scenes (chance in brackets):")
    for factor, accuracy in config["zero_shot_accuracy"].items():
        print(f"  {factor:<12}{accuracy:6.1%}  ({1 / len(FACTORS[factor]):.1%})")
    print(f"Wrote {folder / 'model.safetensors'} ({size:.1f} MB) and {folder / 'config.json'}.")


def easy_ones(scenes: Scenes) -> np.ndarray:
    """Indices of the scenes with a large digit in the centre, where digits are told apart soonest."""
    labels = scenes.labels()
    large, centre = FACTORS["size"].index("large"), FACTORS["position"].index("centre")
    return np.flatnonzero((labels["size"] == large) & (labels["position"] == centre))


def lesson(step: int, steps: int, batch_size: int, easy: np.ndarray) -> list[int]:
    """The scenes of one step: the next ones, but half of them easy ones during the first quarter of the steps.

    A transformer that has yet to learn what a stroke is gets a weak signal from small digits in nine places.
    """
    batch = list(range(step * batch_size, (step + 1) * batch_size))
    if step < steps // 4 and len(easy):
        half = batch_size // 2
        batch[:half] = easy.take(range(step * half, (step + 1) * half), mode="wrap").tolist()
    return batch


def contrast(logits: Tensor, labels: Tensor, stated: Tensor) -> Tensor:
    """Cross entropy in which every caption that is true of a scene counts as its positive.

    Captions leave factors out, so many captions of a batch are true of a scene that they were not written for; one
    positive for each scene, as in CLIP, would teach the model that "a seven" is false of most sevens.

    Args:
        logits: Scene against captions of the batch, then the prompts of each factor [batch, batch + n_prompts].
        labels: Values of the scenes' factors [batch, n_factors].
        stated: Values that the captions state, -1 where they are silent [batch, n_factors].
    """
    n = len(labels)
    true = ((stated[None] == labels[:, None]) | (stated[None] < 0)).all(dim=-1).float()  # [scenes, captions]
    captions, *prompts = logits.split([n, *map(len, FACTORS.values())], dim=1)
    loss = cross_entropy(captions, true / true.sum(dim=1, keepdim=True))
    loss = loss + cross_entropy(captions.T, true.T / true.T.sum(dim=1, keepdim=True))
    for index, prompt_logits in enumerate(prompts):  # of the prompts of one factor exactly one is true
        loss = loss + cross_entropy(prompt_logits, labels[:, index])
    return loss / (2 + len(prompts))


def waves(side: int, width: int) -> Tensor:
    """Sines and cosines of the row and of the column of each patch [side * side, width]."""
    frequency = 30.0 ** -torch.linspace(0, 1, width // 4)
    angle = torch.arange(side)[:, None] * frequency  # [side, width / 4]
    one = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = one.repeat_interleave(side, dim=0), one.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


def spread(logits: Tensor) -> Tensor:
    """Cross entropy that keeps the prompts of one factor apart.

    At the start all captions have nearly the same embedding. Colours part by themselves, for they are easy to see;
    the digits did not: without words that differ no gradient tells the image tower to look at strokes, and without
    strokes none parts the words (cosine 0.996 between the digits' prompts, and chance accuracy, after 500 steps).

    Args:
        logits: Prompts of all factors against one another [n_prompts, n_prompts].
    """
    sizes = [len(values) for values in FACTORS.values()]
    blocks = [rows.split(sizes, dim=1)[i] for i, rows in enumerate(logits.split(sizes))]
    return sum(cross_entropy(block, torch.arange(len(block))) for block in blocks) / len(blocks)


def facts(known: list[dict[str, int]]) -> Tensor:
    """Factor values as int64 [n, n_factors], with -1 for an unknown one."""
    return torch.tensor([[values.get(factor, -1) for factor in FACTORS] for values in known])


def schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate: linear up over a fifteenth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 15)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that the next step depends on besides its number."""
    moments = optimizer.state_dict()["state"]
    tensors = {f"optimizer.{i}.{name}": tensor for i, entry in moments.items() for name, tensor in entry.items()}
    return tensors | {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def resume(checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict) -> int:
    """Load a checkpoint if there is one; the number of steps that are done."""
    if not checkpoint.exists():
        return 0
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    if json.loads(metadata["config"]) != config:
        raise MmsaeError(f"{checkpoint} was made with other settings: give the same ones, or another --out.")
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is either the old one or the new one, whenever the process dies."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.chmod(0o644)  # safetensors leaves it readable for its owner only, and it is to be packaged
    os.replace(partial, path)


def write(path: Path, content: dict) -> None:
    """The same for JSON."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(train, as_positional=False)
    except MmsaeError as error:
        raise SystemExit(f"Error: {error}") from None

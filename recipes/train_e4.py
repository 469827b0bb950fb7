"""Train the miniature wristband encoder that ships with the package, from nothing, in some two minutes on one CPU core.

    python recipes/train_e4.py --out runs/e4 --threads 1

It is pre-trained without labels, by masked reconstruction (E4SelfLearning, arXiv 2311.04215), on simulated E4 windows;
logistic regressions on its tokens then tell how well they know what unseen wearers did. Interrupt it at will: the same
command goes on from the last checkpoint, to the same weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from train_ecg_jepa import resume, save, schedule, standardised, state  # of this folder

from mmsae.encoders import MaskedReconstruction, SignalTransformer, read_encoder, write_encoder
from mmsae.errors import MmsaeError, checked
from mmsae.miniatures.ecgs import probe_auc
from mmsae.miniatures.wristbands import CHANNELS, FACTORS, UNIT, Wristbands

RATE, SECONDS, CLIP = 32, 16.0, 5.0  # Hz; of a window; standard deviations


def train(
    out: str,
    steps: int = 700,
    batch_size: int = 16,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    share: float = 0.15,
    run: float = 3.0,
    variance: float = 0.5,
    covariance: float = 0.01,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    n_train: int = 4000,
    n_test: int = 800,
    seed: int = 0,
    threads: int = 1,
    checkpoint_every: int = 100,
) -> None:
    """Pre-train an encoder of E4 windows and write `config.json` and `model.safetensors`.

    Args:
        out: Folder to write to.
        steps: Number of batches.
        batch_size: Windows in each.
        lr: Highest learning rate; it warms up over a tenth of the steps and falls along a cosine.
        weight_decay: Weight decay of the matrices.
        share: Of the seconds of a channel that are masked.
        run: Mean length of a masked stretch, seconds.
        variance: Weight of the term that keeps the tokens' deviations up, see `mmsae.encoders.MaskedReconstruction`.
        covariance: Weight of the term that keeps their numbers from saying the same.
        dim: Width of the encoder.
        depth: Blocks of the encoder.
        heads: Attention heads.
        n_train: Simulated windows to pre-train on, without their labels.
        n_test: Windows for the probes, 200 of which they see with their labels.
        seed: Seed of the first weights, of the batches and of the masks.
        threads: CPU threads.
        checkpoint_every: Steps between checkpoints.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "threads": threads, "n_train": n_train}.items():
        checked(name, value, 1)
    recipe = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "share": share, "run": run,
        "variance": variance, "covariance": covariance, "n_train": n_train, "seed": seed, "threads": threads,
    }  # fmt: skip
    torch.set_num_threads(threads)
    signals, _ = Wristbands("train", n_train, seconds=SECONDS, rate=RATE).arrays()
    mean, std = signals.mean((0, 2)), signals.std((0, 2))
    shape = {"n_channels": len(CHANNELS), "patch": RATE, "dim": dim, "depth": depth, "heads": heads}
    content: dict[str, Any] = {
        "model": "SignalTransformer",
        "config": {**shape, "tokens": "channels", "n_registers": 0},
        "preprocess": {
            "rate": RATE, "channels": list(CHANNELS), "unit": UNIT, "mean": mean.tolist(), "std": std.tolist(),
            "clip": CLIP,
        },
        "training": recipe,
    }  # fmt: skip
    x = standardised(signals, content)
    torch.manual_seed(seed)
    objective = MaskedReconstruction(SignalTransformer(**content["config"]), share, run, variance, covariance)
    untrained = copy.deepcopy(objective.encoder)
    first, last = pretrain(objective, x, recipe, Path(out), json.dumps(content), checkpoint_every)
    content["masked_rmse"] = {"first": first, "last": last}

    content["versions"] = {"torch": torch.__version__}
    write_encoder(out, objective.encoder, content)
    encoder, _ = read_encoder(out)  # as it is stored
    signals, labels = Wristbands("test", n_test, seconds=SECONDS, rate=RATE).arrays()
    test = standardised(signals, content)
    features = {
        "random": pooled(untrained, test), "trained": pooled(encoder, test), "moments": moments(test),
    }  # fmt: skip
    content["probe_auc"] = {
        name: {factor: round(probe_auc(found, labels[factor], seeds=(0, 1, 2)), 4) for factor in FACTORS}
        for name, found in features.items()
    }
    content["probe_windows"] = n_test
    write_encoder(out, objective.encoder, content)
    (Path(out) / "checkpoint.safetensors").unlink(missing_ok=True)

    print(f"Masked error: {first:.3f} at the start, {last:.3f} at the end, in standard deviations.")
    print(f"Macro AUC, 200 of {n_test} windows of unseen wearers labelled, mean of probe seeds 0, 1, 2:")
    for name, found in content["probe_auc"].items():
        print(f"  {name:<10}" + "  ".join(f"{factor} {value:.3f}" for factor, value in found.items()))
    print(f"Wrote {Path(out) / 'model.safetensors'} and {Path(out) / 'config.json'}.")


def pretrain(
    objective: MaskedReconstruction, x: Tensor, recipe: dict[str, Any], folder: Path, described: str, every: int
) -> tuple[float, float]:
    """Train in place on signals `[n, C, T]`; the masked error before and after."""
    matrices = [p for p in objective.parameters() if p.ndim > 1]
    others = [p for p in objective.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], betas=(0.9, 0.99), eps=1e-6)
    folder.mkdir(parents=True, exist_ok=True)
    before = error(objective, x)
    checkpoint = folder / "checkpoint.safetensors"
    first, steps = resume(checkpoint, objective, optimizer, described), recipe["steps"]
    with tqdm(range(first, steps), initial=first, total=steps, mininterval=1) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = recipe["lr"] * schedule(step, steps)
            g = torch.Generator().manual_seed(recipe["seed"] * 1_000_003 + step)
            loss = objective(x[torch.randint(len(x), (recipe["batch_size"],), generator=g)], g)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % every == 0 and step + 1 < steps:
                save(checkpoint, state(objective, optimizer), {"step": str(step + 1), "described": described})
                bar.set_postfix(loss=f"{loss.item():.4f}")
    objective.eval()
    return before, error(objective, x)


@torch.no_grad()
def error(objective: MaskedReconstruction, x: Tensor) -> float:
    """That of what is masked in the first 256 windows, always with the same masks."""
    return round(float(objective.error(x[:256], torch.Generator().manual_seed(1))[0]), 4)


@torch.no_grad()
def pooled(encoder: nn.Module, x: Tensor) -> np.ndarray:
    """Mean and deviation over time of the tokens of every channel, side by side, `[n, 2 C dim]`."""
    found = []
    for part in x.split(50):
        tokens = encoder(part)[:, encoder.n_registers :].unflatten(1, (x.shape[1], -1))  # [B, C, N, dim]
        found.append(torch.cat([tokens.mean(2), tokens.std(2)], -1).flatten(1))
    return torch.cat(found).numpy()


def moments(x: Tensor) -> np.ndarray:
    """What needs no network: mean, deviation, least, most and line length of every channel, `[n, 5 C]`."""
    length = x.diff(dim=2).abs().mean(2)
    return torch.cat([x.mean(2), x.std(2), x.amin(2), x.amax(2), length], 1).numpy()


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(train, as_positional=False)
    except MmsaeError as error_:
        raise SystemExit(f"Error: {error_}") from None

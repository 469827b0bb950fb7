"""Train the miniature ECG-JEPA that ships with the package, from nothing, in some three minutes on one CPU core.

    python recipes/train_ecg_jepa.py --out runs/ecg_jepa --threads 1

It is pre-trained without labels on simulated ECGs; a logistic regression on the mean of its tokens then tells how well
they know the class of records that were not trained on. The paper's objective alone leaves tokens in two directions
(`--variance 0 --covariance 0`, see docs/modality_signal.md), so the terms of VICReg are added. Interrupt it at will:
the same command goes on from the last checkpoint, to the same weights.
"""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import jsonargparse
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from mmsae.encoders import ECGJEPA, JEPA, read_encoder, write_encoder
from mmsae.errors import MmsaeError, checked
from mmsae.miniatures.ecgs import LEADS, ECGs, probe_auc

RATE, CLIP = 100, 5.0  # Hz; standard deviations


def train(
    out: str,
    steps: int = 800,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    momentum: float = 0.99,
    variance: float = 0.05,
    covariance: float = 0.0005,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    n_train: int = 4000,
    n_test: int = 1200,
    seed: int = 0,
    threads: int = 1,
    checkpoint_every: int = 100,
) -> None:
    """Pre-train ECG-JEPA on simulated ECGs and write `config.json` and `model.safetensors`.

    Args:
        out: Folder to write to.
        steps: Number of batches.
        batch_size: Records in each.
        lr: Highest learning rate; it warms up over a tenth of the steps and falls along a cosine.
        weight_decay: Weight decay of the matrices.
        momentum: Of the target encoder at the start; it rises to .9995 at the end.
        variance: Weight of the term that keeps the tokens' deviations up, see `mmsae.encoders.JEPA`.
        covariance: Weight of the term that keeps their numbers from saying the same.
        dim: Width of the encoder; that of the predictor is half of it.
        depth: Blocks of the encoder, and of the predictor.
        heads: Attention heads of both.
        n_train: Simulated records to pre-train on, without their labels.
        n_test: Records for the probe, 200 of which it sees with their labels.
        seed: Seed of the first weights, of the batches and of the masks.
        threads: CPU threads.
        checkpoint_every: Steps between checkpoints.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "threads": threads, "n_train": n_train}.items():
        checked(name, value, 1)
    recipe = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "momentum": momentum,
        "variance": variance, "covariance": covariance, "n_train": n_train, "seed": seed, "threads": threads,
    }  # fmt: skip
    torch.set_num_threads(threads)
    signals, _ = ECGs("train", n_train, rate=RATE).arrays()
    mean, std = signals.mean((0, 2)), signals.std((0, 2))
    content = {
        "model": "ECGJEPA",
        "config": {"n_channels": len(LEADS), "patch": RATE // 10, "dim": dim, "depth": depth, "heads": heads},
        "preprocess": {
            "rate": RATE, "channels": list(LEADS), "unit": "mV", "mean": mean.tolist(), "std": std.tolist(),
            "clip": CLIP,
        },
        "training": recipe,
    }  # fmt: skip
    x = standardised(signals, content)
    torch.manual_seed(seed)
    jepa = JEPA(
        ECGJEPA(**content["config"]), dim // 2, depth, heads, min_block=3, variance=variance, covariance=covariance
    )
    untrained = copy.deepcopy(jepa.context)
    pretrain(jepa, x, recipe, Path(out), json.dumps(content), checkpoint_every)

    content["versions"] = {"torch": torch.__version__}
    write_encoder(out, jepa.context, content)
    encoder, _ = read_encoder(out)  # as it is stored
    signals, labels = ECGs("test", n_test, rate=RATE).arrays()
    test = standardised(signals, content)
    encoders = {"random": untrained, "context": encoder, "target": jepa.target, "context_fp32": jepa.context}
    content["probe_auc"] = {
        name: [round(probe_auc(pooled(model, test), labels, seeds=(s,)), 4) for s in (0, 1, 2)]
        for name, model in encoders.items()
    }
    content["probe_auc"]["raw"] = [round(probe_auc(test.flatten(1).numpy(), labels, seeds=(s,)), 4) for s in (0, 1, 2)]
    content["probe_records"] = n_test
    write_encoder(out, jepa.context, content)
    (Path(out) / "checkpoint.safetensors").unlink(missing_ok=True)

    print(f"Macro AUC of the five classes, 200 of {n_test} records labelled, probe seeds 0, 1, 2:")
    for name, found in content["probe_auc"].items():
        print(f"  {name:<14}{np.mean(found):.3f}  ({', '.join(f'{value:.3f}' for value in found)})")
    print(f"Wrote {Path(out) / 'model.safetensors'} and {Path(out) / 'config.json'}.")


def pretrain(jepa: JEPA, x: Tensor, recipe: dict, folder: Path, described: str, checkpoint_every: int) -> None:
    """Train in place on signals `[n, C, T]`; what is drawn in a step depends on the seed and its number alone."""
    matrices = [p for p in jepa.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in jepa.parameters() if p.requires_grad and p.ndim <= 1]
    decay = recipe["weight_decay"]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], betas=(0.9, 0.99), eps=1e-6)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    first, steps = resume(checkpoint, jepa, optimizer, described), recipe["steps"]
    with tqdm(range(first, steps), initial=first, total=steps, mininterval=1) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = recipe["lr"] * schedule(step, steps)
            g = torch.Generator().manual_seed(recipe["seed"] * 1_000_003 + step)
            loss = jepa(x[torch.randint(len(x), (recipe["batch_size"],), generator=g)], g)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            jepa.follow(recipe["momentum"] + (0.9995 - recipe["momentum"]) * step / max(steps - 1, 1))
            if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                save(checkpoint, state(jepa, optimizer), {"step": str(step + 1), "described": described})
                bar.set_postfix(loss=f"{loss.item():.4f}")
    jepa.eval()


def standardised(signals: np.ndarray, content: dict) -> Tensor:
    """Every lead by its own mean and deviation, clipped, float32 `[n, C, T]`."""
    mean, std = (np.array(content["preprocess"][key], np.float32)[:, None] for key in ("mean", "std"))
    return torch.from_numpy(np.clip((signals - mean) / std, -CLIP, CLIP))


@torch.no_grad()
def pooled(encoder: nn.Module, x: Tensor) -> np.ndarray:
    """Mean of the tokens of each record, without the register, `[n, dim]`."""
    return torch.cat([encoder(part)[:, encoder.n_registers :].mean(1) for part in x.split(100)]).numpy()


def schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate: linear up over a tenth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def state(jepa: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that the next step depends on besides its number."""
    moments = optimizer.state_dict()["state"]
    tensors = {f"optimizer.{i}.{name}": tensor for i, entry in moments.items() for name, tensor in entry.items()}
    return tensors | {f"model.{name}": tensor for name, tensor in jepa.state_dict().items()}


def resume(checkpoint: Path, jepa: nn.Module, optimizer: torch.optim.Optimizer, described: str) -> int:
    """Load a checkpoint if there is one; the number of steps that are done."""
    if not checkpoint.exists():
        return 0
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    if metadata["described"] != described:
        raise MmsaeError(f"{checkpoint} was made with other settings: give the same ones, or another --out.")
    jepa.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that is either the old one or the new one, whenever the process dies."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    os.replace(partial, path)


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(train, as_positional=False)
    except MmsaeError as error:
        raise SystemExit(f"Error: {error}") from None

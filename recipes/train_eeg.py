"""Train an EEG model of braindecode on the trials of EDF recordings, so that there is something to read.

    python recipes/train_eeg.py --root RECORDINGS --out runs/eeg
    mmsae fit --config recipes/eeg_motor_imagery_batchtopk.yaml --data.root=RECORDINGS \
      --data.source.checkpoint=runs/eeg/model.safetensors

Channels, rate, length of a trial and classes are those of the EEG Motor Movement/Imagery Database and of the recipe of
the dictionary, which must be changed together. The accuracy on held-out trials is printed beside that of the most
frequent class. Some minutes on one CPU core.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from datamodules import EDFRecordings
from mmsae.errors import MmsaeError, checked
from mmsae.sources import Signal


def train(
    root: str,
    out: str,
    model: str = "EEGConformer",
    hook_point: str = "transformer.5",
    rate: float = 160.0,
    window_s: float = 4.0,
    stride_s: float = 0.5,
    split_by: Literal["subject", "recording", "time"] = "subject",
    subject_pattern: str | None = None,
    steps: int = 100,
    batch_size: int = 16,
    lr: float = 5e-4,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Train a classifier of trials and write `model.safetensors` and `config.json`.

    Args:
        root: Folder of .edf or .bdf files whose annotations are the classes.
        out: Folder to write to.
        model: Class of braindecode.
        hook_point: Where the dictionary will read; checked before the training.
        rate: Samples per second.
        window_s: Length of a trial, seconds.
        stride_s: From the start of a training window to that of the next within a longer trial, seconds.
        split_by: What is not cut; "time" for recordings of one person.
        subject_pattern: Regular expression that finds the subject in the name of a file.
        steps: Number of batches.
        batch_size: Trials in each.
        lr: Highest learning rate, falling along a cosine.
        config: Further arguments of the class.
        seed: Of the first weights and of the batches.
        threads: CPU threads.
    """
    checked("steps", steps, 1)
    torch.set_num_threads(checked("threads", threads, 1))
    given: dict[str, Any] = {"rate": rate, "window_s": window_s, "split_by": split_by, "standardise": "train"}
    given |= {"windows": "events"} | ({} if subject_pattern is None else {"subject_pattern": subject_pattern})
    probe = EDFRecordings(root, stride_s=stride_s, source=Signal(model, [hook_point], device="cpu"), **given)
    classes = probe.factors.get("class", ())
    if len(classes) < 2:
        raise MmsaeError(f"the annotations of {root} name {len(classes)} classes; a classifier needs at least two.")
    channels = probe.items("train")[0]["channels"]
    shape = {"n_chans": len(channels), "n_times": round(window_s * rate), "n_outputs": len(classes), "sfreq": rate}
    arguments = {**shape, **(config or {})}
    torch.manual_seed(seed)
    source = Signal(model, [hook_point], config=arguments, device="cpu")
    network = copy.deepcopy(source.model).requires_grad_(True)
    x, y = trials(probe, source, "train")
    held = EDFRecordings(root, source=source, **given)
    sets = {split: trials(held, source, split) for split in ("val", "test")}
    fit(network, x, y, steps, batch_size, lr, seed)

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in network.state_dict().items()}, folder / "model.safetensors")
    found = {split: (accuracy(network, *pair), share(y, pair[1])) for split, pair in sets.items()}
    told = {"model": model, "config": arguments, "classes": list(classes), "channels": channels, "accuracy": found}
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    print(f"{len(x)} training windows of {', '.join(classes)}.")
    for split, (right, chance) in found.items():
        print(
            f"{split}: {right:.1%} of {len(sets[split][0])} trials right; always the most frequent class: {chance:.1%}."
        )
    print(f"Wrote {folder / 'model.safetensors'}; config of the source: {json.dumps(arguments)}")


def trials(data: EDFRecordings, source: Signal, split: Literal["train", "val", "test"]) -> tuple[Tensor, Tensor]:
    """Signals as the model reads them `[n, C, T]`, and their classes `[n]`."""
    items = data.items(split)
    batch = source.collate([items[i] for i in range(len(items))])  # type: ignore[arg-type]
    return batch["input"], batch["columns"]["label.class"]


def fit(network: nn.Module, x: Tensor, y: Tensor, steps: int, batch_size: int, lr: float, seed: int) -> None:
    """Train in place; every class is drawn as often."""
    weight = 1.0 / torch.bincount(y).clamp(min=1)[y].double()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = torch.Generator().manual_seed(seed)
    network.train()
    with tqdm(range(steps), mininterval=1) as bar:
        for step in bar:
            chosen = torch.multinomial(weight, batch_size, replacement=True, generator=g)
            loss = cross_entropy(network(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of trials whose class is the likeliest."""
    logits = torch.cat([network(part) for part in x.split(64)])
    return round(float((logits.argmax(1) == y).double().mean()), 4)


def share(train_y: Tensor, y: Tensor) -> float:
    """Accuracy of naming the class that is most frequent in training."""
    return round(float((y == train_y.bincount().argmax()).double().mean()), 4)


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(train, as_positional=False)
    except MmsaeError as error:
        raise SystemExit(f"Error: {error}") from None

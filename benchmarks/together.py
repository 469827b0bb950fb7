"""What several dictionaries cost when they are trained in one pass, against the sum of what each costs alone.

    python benchmarks/together.py --ks 16,32,64

Activations are made live by the embedded miniature CLIP on the embedded scenes; runs take turns. Below 1 is a gain.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import lightning as L
import torch
from rich.console import Console

from datamodules import Scenes
from mmsae.cores import TopK
from mmsae.kernels import fast_precision
from mmsae.sources import SceneCLIP
from mmsae.training.module import SAEModule


def seconds(data: Scenes, ks: list[int], d_latent: int, steps: int, precision: str) -> float:
    """CPU time of one run with a dictionary for each k."""
    cores = {str(k): partial(TopK, d_latent=d_latent, k=k) for k in ks}
    first, *others = cores
    module = SAEModule(cores[first], data.spec, also={name: cores[name] for name in others})
    trainer = L.Trainer(
        max_steps=steps,
        limit_val_batches=0,
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    trainer.fit(module, datamodule=data)
    return time.process_time() - start


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ks", default="16,32,64", help="one dictionary for each, with commas")
    parser.add_argument("--d-latent", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ks, precision = [int(k) for k in args.ks.split(",")], fast_precision("cpu")
    source = SceneCLIP(hook_points=["visual.transformer.resblocks.3"], positions="all")
    data = Scenes(source=source, batch_size=args.batch, chunk_rows=8 * args.batch)
    run = partial(seconds, data, d_latent=args.d_latent, precision=precision)
    run(ks, steps=2)  # loads what it will need
    ratios = []
    for _ in range(args.rounds):
        alone = sum(run([k], steps=args.steps) for k in ks)
        ratios.append(run(ks, steps=args.steps) / alone)
    Console(soft_wrap=True).print(
        f"{len(ks)} dictionaries in one pass cost {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) of what they cost one by one."
    )


if __name__ == "__main__":
    main()

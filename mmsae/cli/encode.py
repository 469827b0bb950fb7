"""`mmsae encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from datamodules.base import SPLITS
from mmsae.cli.base import predictor, quiet
from mmsae.cli.messages import Parser
from mmsae.cli.run import datamodule_of
from mmsae.errors import checked
from mmsae.store import CodeStore
from mmsae.training.encode import EncodeModule


def encode(
    run: str,
    sae: str | None = None,
    split: Literal["train", "val", "test", "all"] = "test",
    out: str | None = None,
    store: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    rows_per_shard: int = 65536,
    n_top: int = 16,
    accelerator: str = "auto",
    devices: int | str = "auto",
    threads: int | None = None,
) -> None:
    """Write the codes of a trained dictionary to disk; the same command goes on where it was interrupted.

    Args:
        run: Folder of a `mmsae fit` run.
        sae: Another dictionary to encode the data of that run with: a folder or a hub id.
        split: Split to encode, or all.
        out: Folder of the codes; each split gets one below it. Default: codes in the run.
        store: Folder of stored activations instead of the run's own.
        dtype: How codes are stored; float16 takes a third less disk and keeps three digits.
        rows_per_shard: Activation rows per file.
        n_top: Strongest rows of each latent to list beside the codes; 0 leaves that out.
        accelerator: Of Lightning's Trainer.
        devices: Of Lightning's Trainer; each writes its own shards.
        threads: CPU threads of torch; default: its own.
    """
    checked("n_top", n_top, 0)
    trainer = predictor(accelerator, devices, threads)
    folder = Path(out) if out else Path(run) / "codes"
    splits = SPLITS if split == "all" else (split,)
    module = EncodeModule(sae or run, datamodule_of(Path(run), store), folder, splits, dtype, rows_per_shard)
    trainer.predict(module, return_predictions=False)
    if not trainer.is_global_zero:
        return
    for name in splits:
        codes = CodeStore(folder / name)
        if n_top:
            codes.top(n_top)
        print(f"codes: {codes.folder} ({len(codes):,} rows, {codes.n_pairs / len(codes):.1f} codes each)")
    print(f"next:  mmsae evaluate --run {run}{f' --sae {sae}' if sae else ''} --codes {folder}")


def run(args: list[str]) -> None:
    """Parse and run."""
    quiet()
    auto_cli(encode, args=args[1:], as_positional=False, parser_class=Parser)

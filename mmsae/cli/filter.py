"""`mmsae filter`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli

import mmsae.artifact
from datamodules import Conversations
from mmsae.cli.base import quiet
from mmsae.cli.messages import Parser
from mmsae.cli.run import datamodule_of
from mmsae.cli.scoring import Scores, ranked, weights_of, write_kept, write_table
from mmsae.errors import MmsaeError, checked
from mmsae.metrics.cross_modal_weight import SCORES

Score = Literal["cosine_co", "cosine", "co_l0", "l0", "l1", "co_occurrence", "random"]


def filter_conversations(
    run: str,
    path: str,
    images: str | None = None,
    keep: float = 0.5,
    score: Score = "cosine_co",
    normalise: Literal["none", "tokens"] = "none",
    out: str = "kept.jsonl",
    table: str | None = None,
    without_picture: Literal["refuse", "keep", "drop"] = "refuse",
    sae: str | None = None,
    split: Literal["train", "val", "test"] = "train",
    n: int = 16,
    delta: float = 0.1,
    max_rows: int = 200_000,
    examples_per_forward: int | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Rank conversations about pictures by how well words and picture go together, and keep the best (SAE-V).

    All scores of all conversations are computed in one pass of the model and kept with the run: another `keep` or
    `score` takes seconds, and an interrupted pass goes on where it stopped.

    Args:
        run: Folder of a `mmsae fit` run on a multimodal model (VisionLanguage), on text and image tokens.
        path: A .jsonl file of conversations, a folder, or a glob, as `--data=Conversations` reads them.
        images: Folder that paths of pictures are relative to; by default that of their file.
        keep: Share of the conversations that is kept.
        score: What they are ranked by, see docs/sae_v.md.
        normalise: "tokens" divides scores by the number of tokens, for conversations of very different length.
        out: File of the kept conversations, their lines unchanged and in their order.
        table: CSV file with the scores of all conversations; default: beside `out`.
        without_picture: What to do with conversations that have no picture and so no score.
        sae: Another dictionary: a folder or a hub id.
        split: Split of the run's own data on which the weights of the latents are found, once.
        n: Text and image tokens of each latent that its weight is made of (K).
        delta: Share of a latent's 99.9th percentile that a code must exceed to count as firing.
        max_rows: Activation rows on which the weights are found.
        examples_per_forward: Conversations per forward pass; default: that of the run.
        seed: Of the score "random".
        threads: CPU threads of torch; default: its own.
    """
    if not 0 < keep <= 1:
        raise MmsaeError(f"keep={keep:g} is out of range: it is a share above 0 and at most 1.")
    if threads:
        torch.set_num_threads(checked("threads", threads, 1))
    data = datamodule_of(Path(run))
    talks = Conversations(path, images, val_share=0, test_share=0, source=data.source, store=data.store)
    scores = Scores(Path(run), sae or run, data.source, talks, without_picture)
    core = mmsae.artifact.load(sae or run)
    weights = weights_of(Path(run), core, mmsae.artifact.identity(sae or run), data, split, n, delta, max_rows)
    rows = scores.all(core, weights, examples_per_forward or data.examples_per_forward)
    order = ranked(rows, score, normalise, keep, without_picture == "keep", seed)
    file = Path(table) if table else Path(out).with_suffix(".scores.csv")
    write_table(file, talks, rows, order, seed)
    kept = write_kept(Path(out), talks, order)
    print(f"kept:   {out} ({kept:,} of {len(rows):,} conversations, the best by {score})")
    print(f"scores: {file} ({', '.join(SCORES)})")
    print(f"next:   read it with --data=Conversations --data.path={out} --data.images={images or Path(path).parent}")


def run(args: list[str]) -> None:
    """Parse and run."""
    quiet()
    auto_cli(filter_conversations, args=args[1:], as_positional=False, parser_class=Parser)

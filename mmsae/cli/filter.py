"""`mmsae filter`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse import auto_cli

import mmsae.artifact
from datamodules import Conversations
from mmsae.cli.base import quiet
from mmsae.cli.messages import Parser
from mmsae.cli.run import datamodule_of
from mmsae.cli.scoring import Scores, ranking, refuse, weights_of, write_kept, write_table
from mmsae.errors import MmsaeError, checked

Score = Literal["cosine_co", "cosine", "co_l0", "l0", "l1", "co_occurrence", "association", "random"]


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
        score: What they are ranked by, see docs/sae_v.md; association where no latent is of both words and pictures.
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
    folder, dictionary = Path(run), sae or run
    data = datamodule_of(folder)
    refuse(data.source)
    talks = Conversations(path, images, val_share=0, test_share=0, source=data.source)
    scores = Scores(folder, dictionary, data.source, talks, without_picture)
    core, identity = mmsae.artifact.load(dictionary), mmsae.artifact.identity(dictionary)
    weights = weights_of(folder, core, identity, data, split, n, delta, max_rows)
    columns = scores.columns(core, weights, examples_per_forward or data.examples_per_forward, seed)
    best = np.argsort(-ranking(columns, score, normalise), kind="stable")  # of equal ones the earlier
    places = np.flatnonzero(scores.pictured)
    kept = np.logical_not(scores.pictured) if without_picture == "keep" else np.zeros(len(scores.pictured), np.bool_)
    kept[places[best[: max(round(keep * len(places)), 1)]]] = True
    file = Path(table) if table else Path(out).with_suffix(".scores.csv")
    write_table(file, talks, scores.pictured, columns, kept)
    n_kept = write_kept(Path(out), talks, kept)
    print(f"kept:   {out} ({n_kept:,} of {len(kept):,} conversations, the best by {score})")
    print(f"scores: {file}")
    where = images or (path if Path(path).is_dir() else Path(path).parent)
    print(f"next:   mmsae fit --data=Conversations --data.path={out} --data.images={where} ..., or fine-tune on it")


def run(args: list[str]) -> None:
    """Parse and run."""
    quiet()
    auto_cli(filter_conversations, args=args[1:], as_positional=False, parser_class=Parser)

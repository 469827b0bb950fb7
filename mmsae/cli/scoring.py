"""Scores of conversations, computed once and kept with a run: what `mmsae filter` ranks by."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import mmsae.artifact
from datamodules import ActivationDataModule, Conversations
from mmsae.analyses.strongest_tokens import KINDS, CrossModal, strongest_tokens
from mmsae.cores import SAECore
from mmsae.errors import MmsaeError
from mmsae.files import replacing, sha256
from mmsae.metrics.association import association
from mmsae.metrics.cross_modal_weight import SCORES, firing, per_token, sample_scores
from mmsae.spec import in_float32

Column = dict[str, np.ndarray]
WEIGHTS = "cross_modal.safetensors"
COUNTS = ("text_tokens", "image_tokens")
COLUMNS = (*SCORES, "association", "random", *COUNTS)
"""Of the table of scores."""
ASSOCIATED = 1024  # latents of each kind of token that the association looks at
COMMON = 0.2  # share of tokens from which a latent tells little


def weights_of(
    run: Path,
    core: SAECore,
    identity: dict[str, Any],
    data: ActivationDataModule,
    split: Literal["train", "val", "test"],
    n: int,
    delta: float,
    max_rows: int,
) -> CrossModal:
    """Weights of the latents on the run's own data: those stored with the run, or found and stored now."""
    about = {
        "dictionary": identity, **data.origin(split), "split": split, "n": n, "delta": delta, "max_rows": max_rows,
    }  # fmt: skip
    data.spec.require(core.spec.input, core.spec.d_in)
    found = CrossModal.load(run / WEIGHTS, about)
    if found is None:
        found = strongest_tokens(core, data.rows(split), n, delta, max_rows)
        found.save(run / WEIGHTS, about)
    return found


class Scores:
    """Scores of all conversations of a file, appended to files below the run as they are computed.

    `scores/KEY.jsonl` has one line for each conversation with a picture, `scores/KEY.u8` the counts of tokens on which
    latents fire, for the association. The key stands for dictionary, model, data and weights.

    Args:
        run: Folder of the run.
        sae: The dictionary.
        source: The model.
        talks: The conversations.
        without_picture: "refuse" raises where a conversation has no picture.
    """

    def __init__(self, run: Path, sae: str, source: Any, talks: Conversations, without_picture: str) -> None:
        self.run, self.source, self.talks = run, source, talks
        items: Any = talks.items("train")
        self.items, self.pictured = items, np.zeros(len(items), dtype=np.bool_)
        files = set()
        for i, line in enumerate(talks.lines()):
            files.add(line.file)
            self.pictured[i] = bool({"image", "images"} & self.items[i].keys())
            if not self.pictured[i] and without_picture == "refuse":
                raise MmsaeError(
                    f"{line.file}, line {line.number}: this conversation has no picture, so there is nothing to "
                    "compare its words with; give --without_picture=drop, or keep."
                )
        if not self.pictured.any():
            raise MmsaeError(f"no conversation of {talks.path} has a picture, so none can be scored.")
        self.about = {
            "dictionary": mmsae.artifact.identity(sae), "source": source.identity, "images": str(talks.images),
            "files": {str(file): sha256(file) for file in sorted(files)},
        }  # fmt: skip

    def columns(self, core: SAECore, weights: CrossModal, examples_per_forward: int, seed: int) -> Column:
        """All scores and counts of the conversations with a picture, in order; what was computed before is read.

        Args:
            core: The dictionary.
            weights: Of its latents.
            examples_per_forward: Conversations per forward pass.
            seed: Of the score "random".
        """
        latents = informative(weights)
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode())
        digest.update(weights.weights.numpy().tobytes() + weights.threshold.numpy().tobytes())
        path = self.run / "scores" / f"{digest.hexdigest()[:16]}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        done = resume(path, sum(map(len, latents)))
        places = np.flatnonzero(self.pictured)
        with (
            open(path, "ab") as scores,
            open(path.with_suffix(".u8"), "ab") as counts,
            tqdm(total=len(places), initial=done, desc="scoring", unit=" talks", disable=None) as bar,
        ):
            for start in range(done, len(places), examples_per_forward):
                chosen = places[start : start + examples_per_forward]
                found, fires = self._scored(core, weights, latents, chosen.tolist())
                counts.write(fires.tobytes())
                counts.flush()  # before the scores, which say how many are done
                scores.write("".join(json.dumps(row) + "\n" for row in found).encode())
                scores.flush()
                bar.update(len(chosen))
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        columns = {name: np.array([row[name] for row in rows]) for name in (*SCORES, *COUNTS)}
        fires = np.fromfile(path.with_suffix(".u8"), np.uint8).reshape(len(rows), -1)
        shares = [
            torch.from_numpy(part) / torch.from_numpy(columns[count]).clamp_min(1)[:, None]
            for part, count in zip(np.split(fires, [len(latents[0])], axis=1), COUNTS, strict=True)
        ]
        columns["association"] = association(shares[0], shares[1]).double().numpy()
        columns["random"] = np.random.default_rng(seed).random(len(rows))
        return columns

    @torch.no_grad()
    def _scored(
        self, core: SAECore, weights: CrossModal, latents: list[Tensor], chosen: list[int]
    ) -> tuple[list[dict[str, float]], np.ndarray]:
        """Scores of some conversations, and on how many of their tokens the latents fire (255 at most)."""
        items = [{**self.items[i], "sample_id": place} for place, i in enumerate(chosen)]
        batch = in_float32(self.source.read(self.source.collate(items)))
        codes = core.encode(core.inputs(batch).cpu(), batch)
        found = firing(codes, batch["token_type"].cpu(), batch["sample_id"].cpu(), len(chosen), weights.threshold)
        table = sample_scores(found, weights.weights) | dict(zip(COUNTS, (found.n_text, found.n_image), strict=True))
        rows = zip(*([round(v, 6) for v in values.double().tolist()] for values in table.values()), strict=True)
        fires = torch.cat([found.text[:, latents[0]], found.image[:, latents[1]]], 1).clamp_max(255)
        return [dict(zip(table, row, strict=True)) for row in rows], fires.to(torch.uint8).numpy()


def informative(weights: CrossModal) -> list[Tensor]:
    """For each kind of token the latents that fire most often without firing nearly everywhere."""
    chosen = []
    for kind in KINDS:
        firings = weights.firings[kind].clone()
        firings[firings > COMMON * weights.n_tokens[kind]] = 0
        found = firings.topk(min(ASSOCIATED, len(firings)))
        chosen.append(found.indices[found.values > 0].sort().values)
    return chosen


def resume(path: Path, width: int) -> int:
    """How many conversations both files hold; what an interrupt left behind them is cut off."""
    counts = path.with_suffix(".u8")
    if not path.is_file() or not counts.is_file():
        path.unlink(missing_ok=True)
        counts.unlink(missing_ok=True)
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    done = min(len(lines), counts.stat().st_size // width) if width else len(lines)
    for file, size in ((path, sum(map(len, lines[:done]))), (counts, done * width)):
        with open(file, "r+b") as opened:
            opened.truncate(size)
    return done


def ranking(columns: Column, score: str, normalise: str) -> np.ndarray:
    """What conversations are ranked by, `[n]`."""
    if normalise == "none" or score not in SCORES:
        return columns[score]
    values, n_text, n_image = (torch.from_numpy(columns[name]) for name in (score, *COUNTS))
    return per_token(score, values, n_text, n_image).numpy()


def write_table(path: Path, talks: Conversations, pictured: np.ndarray, columns: Column, kept: np.ndarray) -> None:
    """All scores, one line per conversation, with the file and the line where it stands."""
    rows = zip(*(columns[name].tolist() for name in COLUMNS), strict=True)
    with replacing(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(["file", "line", "kept", *COLUMNS])
        for line, seen, own in zip(talks.lines(), pictured, kept, strict=True):
            values = [f"{value:.6g}" for value in next(rows)] if seen else [""] * len(COLUMNS)
            writer.writerow([line.file, line.number, int(own), *values])
        text.detach()


def write_kept(path: Path, talks: Conversations, kept: np.ndarray) -> int:
    """The kept lines, byte by byte; only a last line of a file without an end is given one if another follows."""
    n, before = 0, b"\n"
    with replacing(path) as file:
        for line, own in zip(talks.lines(), kept, strict=True):
            if own:
                file.write((b"" if before.endswith(b"\n") else b"\n") + line.data)
                n, before = n + 1, line.data
    return n


def refuse(source: Any) -> None:
    """Only a multimodal model, read at all tokens of its language model, can compare words and pictures."""
    why = "it was trained on stored activations alone" if source is None else ""
    if source is not None and not hasattr(source, "image_id"):
        why = f"its source is {type(source).__name__}"
    elif source is not None and (source.sees or source.tokens != "all" or source.positions == "mean"):
        why = "it does not read both kinds of tokens"
    if why:
        raise MmsaeError(
            f"this run cannot score conversations, for {why}: train one with data.source=VisionLanguage at "
            "model.language_model.layers.N and tokens=all."
        )

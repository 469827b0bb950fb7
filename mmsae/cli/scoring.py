"""Scores of conversations, computed once and kept with a run: what `mmsae filter` ranks by."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import mmsae.artifact
from datamodules import ActivationDataModule, Conversations
from mmsae.analyses.strongest_tokens import CrossModal, strongest_tokens
from mmsae.cores import SAECore
from mmsae.errors import MmsaeError
from mmsae.files import replacing, sha256
from mmsae.metrics.cross_modal_weight import SCORES, firing, per_token, sample_scores
from mmsae.spec import in_float32

Row = dict[str, float]
"""Scores of a conversation, and its `text_tokens` and `image_tokens`; empty if it has no picture."""
WEIGHTS = "cross_modal.safetensors"


def weights_of(
    run: Path,
    core: SAECore,
    identity: dict[str, Any],
    data: ActivationDataModule,
    split: Any,
    n: int,
    delta: float,
    max_rows: int,
) -> CrossModal:
    """Weights of the latents on the run's own data: those stored with the run, or found and stored now."""
    about = {
        "dictionary": identity, **data.origin(split), "split": split, "n": n, "delta": delta, "max_rows": max_rows,
    }  # fmt: skip
    found = CrossModal.load(run / WEIGHTS, about)
    if found is None:
        data.spec.require(core.spec.input, core.spec.d_in)
        found = strongest_tokens(core, data.rows(split), n, delta, max_rows)
        found.save(run / WEIGHTS, about)
    return found


class Scores:
    """Scores of all conversations of a file, one line of JSON each, appended as they are computed.

    Args:
        run: Folder of the run; they are kept below it.
        sae: The dictionary.
        source: The model.
        talks: The conversations.
        without_picture: "refuse" raises where a conversation has no picture.
    """

    def __init__(self, run: Path, sae: str, source: Any, talks: Conversations, without_picture: str) -> None:
        self.source, self.talks = source, talks
        refuse(source)
        self.items = talks.items("train")
        self.pictured = []
        for i, line in enumerate(talks.lines()):
            item = self.items[i]
            if "image" in item or "images" in item:
                self.pictured.append(i)
            elif without_picture == "refuse":
                raise MmsaeError(
                    f"{line.file}, line {line.number}: this conversation has no picture, so there is nothing to "
                    "compare its words with; give --without_picture=drop, or keep."
                )
        if not self.pictured:
            raise MmsaeError(f"no conversation of {talks.path} has a picture, so none can be scored.")
        files = {str(line.file) for line in talks.lines()}
        self.about = {
            "dictionary": mmsae.artifact.identity(sae), "source": source.identity, "images": str(talks.images),
            "files": {name: sha256(Path(name)) for name in sorted(files)},
        }  # fmt: skip
        self.run = run

    def file(self, weights: CrossModal) -> Path:
        """Where the scores are kept; another dictionary, model, data or weights have another file."""
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode())
        digest.update(weights.weights.numpy().tobytes() + weights.threshold.numpy().tobytes())
        return self.run / "scores" / f"{digest.hexdigest()[:16]}.jsonl"

    def all(self, core: SAECore, weights: CrossModal, examples_per_forward: int) -> list[Row]:
        """One entry per conversation, in order; what was computed before is read."""
        path = self.file(weights)
        path.parent.mkdir(parents=True, exist_ok=True)
        done = finished(path)
        todo = self.pictured[len(done) :]
        bar = tqdm(total=len(self.pictured), initial=len(done), desc="scoring", unit=" talks", disable=None)
        with open(path, "ab") as file, bar:
            for start in range(0, len(todo), examples_per_forward):
                chosen = todo[start : start + examples_per_forward]
                new = self.scored(core, weights, chosen)
                file.write("".join(json.dumps(row) + "\n" for row in new).encode())
                file.flush()
                done += new
                bar.update(len(new))
        rows: list[Row] = [{} for _ in range(len(self.items))]  # type: ignore[arg-type]
        for i, row in zip(self.pictured, done, strict=True):
            rows[i] = row
        return rows

    @torch.no_grad()
    def scored(self, core: SAECore, weights: CrossModal, chosen: list[int]) -> list[Row]:
        """Scores of some conversations."""
        items = [{**self.items[i], "sample_id": place} for place, i in enumerate(chosen)]
        batch = in_float32(self.source.read(self.source.collate(items)))
        codes = core.encode(core.inputs(batch).cpu(), batch)
        found = firing(codes, batch["token_type"].cpu(), batch["sample_id"].cpu(), len(chosen), weights.threshold)
        columns = sample_scores(found, weights.weights)
        columns |= {"text_tokens": found.n_text, "image_tokens": found.n_image}
        return [dict(zip(columns, values, strict=True)) for values in zip(*map(_plain, columns.values()), strict=True)]


def _plain(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.double().tolist()]


def refuse(source: Any) -> None:
    """Only a multimodal model, read at all tokens of its language model, can compare words and pictures."""
    why = "it was trained on stored activations" if source is None else ""
    if source is not None and not hasattr(source, "image_id"):
        why = f"its source is {type(source).__name__}"
    elif source is not None and (source.sees or source.tokens != "all" or source.positions == "mean"):
        why = "it does not read both kinds of tokens"
    if why:
        raise MmsaeError(
            f"this run cannot score conversations, for {why}: train one with data.source=VisionLanguage at "
            "model.language_model.layers.N, tokens=all."
        )


def finished(path: Path) -> list[Row]:
    """Scores that a file holds; a line that was torn by an interrupt is cut off."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def ranked(rows: list[Row], score: str, normalise: str, keep: float, keep_others: bool, seed: int) -> np.ndarray:
    """Which conversations are kept, bool `[n]`: the best of those with a score; the earlier of equal ones."""
    scored = np.array([i for i, row in enumerate(rows) if row])
    values = values_of([rows[i] for i in scored], score, normalise, seed)
    kept = np.zeros(len(rows), bool)
    kept[scored[np.argsort(-values, kind="stable")[: max(round(keep * len(scored)), 1)]]] = True
    if keep_others:
        kept[[i for i, row in enumerate(rows) if not row]] = True
    return kept


def values_of(rows: list[Row], score: str, normalise: str, seed: int) -> np.ndarray:
    """What conversations are ranked by, `[n]`."""
    if score == "random":
        return np.random.default_rng(seed).random(len(rows))
    values, n_text, n_image = (
        torch.tensor([row[name] for row in rows]) for name in (score, "text_tokens", "image_tokens")
    )
    return (per_token(score, values, n_text, n_image) if normalise == "tokens" else values).double().numpy()


def write_table(path: Path, talks: Conversations, rows: list[Row], kept: np.ndarray, seed: int) -> None:
    """All scores, one line per conversation, with the file and the line where it stands."""
    names = [*SCORES, "text_tokens", "image_tokens"]
    chance = np.random.default_rng(seed).random(sum(bool(row) for row in rows)).tolist()
    with replacing(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(["file", "line", "kept", *names, "random"])
        for line, row, own in zip(talks.lines(), rows, kept, strict=True):
            last = f"{chance.pop(0):.6f}" if row else ""
            writer.writerow([line.file, line.number, int(own), *(row.get(name, "") for name in names), last])
        text.flush()
        text.detach()


def write_kept(path: Path, talks: Conversations, kept: np.ndarray) -> int:
    """The kept lines, byte by byte; only the last line of a file is given an end where another one follows."""
    n, before = 0, b"\n"
    with replacing(path) as file:
        for line, own in zip(talks.lines(), kept, strict=True):
            if own:
                file.write((b"" if before.endswith(b"\n") else b"\n") + line.data)
                n, before = n + 1, line.data
    return n

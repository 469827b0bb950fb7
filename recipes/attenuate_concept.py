"""Remove a concept from the miniature language model: APP against masking, at equal removal.

    mmsae fit --config recipes/stories_batchtopk.yaml
    python recipes/attenuate_concept.py --run runs/version_0 --label animal --values dog,horse --out runs/app

Source of the claim: *Evaluating Sparse Autoencoders for Monosemantic Representation*, arXiv 2508.15094. Removal is the
share of the probability of the concept's words at their further mentions that is gone; damage the increase of the
cross-entropy, in nats per token, on stories that do not speak of the concept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import datamodules  # noqa: F401
from mmsae.cli.evaluate import show
from mmsae.cli.run import datamodule_of, dictionary_of, hook_point_of
from mmsae.cores import SAECore
from mmsae.errors import MmsaeError, nearest
from mmsae.latents import LatentStore
from mmsae.results import Plot, Result, Table
from mmsae.spec import rows_of
from mmsae.steering import Attenuate, ConceptPosterior, Edit, Suppress, SuppressRange, mean_difference, steer

NUMBERS = (1, 3, 10, 30)
SHARES = (0.25, 0.5, 0.75, 1.0)
SELECTIONS = ("most active", "most different")


class Stories:
    """Test stories of a concept and of others, and what the model makes of them.

    Args:
        source: The language model.
        items: Test stories.
        words: Tokens of the concept.
        chosen: Which stories speak of it, bool.
    """

    def __init__(self, source: Any, items: list[dict[str, Any]], words: Sequence[int], chosen: np.ndarray) -> None:
        self.source = source
        self.words = torch.tensor(list(words))
        self.speaking = source.collate([i for i, c in zip(items, chosen, strict=True) if c])
        self.silent = source.collate([i for i, c in zip(items, chosen, strict=True) if not c])

    @torch.no_grad()
    def measure(self) -> tuple[float, float, float]:
        """Probability of further mentions; nats per token of the other tokens there; nats per token elsewhere."""
        ids, mask = self.speaking["input_ids"], self.speaking["attention_mask"].bool()
        nats = self._nats(self.speaking)
        named = torch.isin(ids, self.words) & mask
        again = named & (named.cumsum(1) > 1)
        rest = mask[:, 1:] & ~named[:, 1:]
        other = self._nats(self.silent)[self.silent["attention_mask"][:, 1:].bool()]
        return float((-nats[again[:, 1:]]).exp().mean()), float(nats[rest].mean()), float(other.mean())

    def _nats(self, batch: dict[str, Any]) -> Tensor:
        logits = self.source.forward(batch).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")


def single(source: Any, word: str) -> int:
    """The token of a word."""
    ids = source.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise MmsaeError(f"{word!r} is not a single token of this model, so its mentions cannot be measured.")
    return int(ids[0])


def edits_of(core: SAECore, store: LatentStore, ids: Tensor, concept: np.ndarray, value: int) -> dict[str, list[Edit]]:
    """Each way of removing a value with these latents; of masking several shares, so that one can interpolate."""
    z = torch.tensor(np.stack([store.at(int(i), np.arange(store.n_rows)) for i in ids], 1))
    own = z[torch.as_tensor(concept == value)]
    known = torch.as_tensor(concept)
    posterior = ConceptPosterior(z, known, ids)
    return {
        "APP": [Attenuate(posterior, value)],
        "range": [SuppressRange(ids, own.mean(0), own.std(0))],
        "masking": [Suppress(ids, share) for share in SHARES],
    }


def concepts_of(store: LatentStore, tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """Of each row the value that its token, or the next one, names, int64 `[n_rows]`; one more for none.

    Both count: what speaks of a dog fires at "dog", and what makes the model say it fires at the word before.
    """
    ids, sample = store.columns["token_id"], store.columns["sample_id"]
    found = np.full(store.n_rows, len(tokens))
    for value, own in enumerate(tokens):
        named = np.isin(ids, own)
        found[named] = value
        before = named[1:] & (sample[1:] == sample[:-1]) & (found[:-1] == len(tokens))
        found[:-1][before] = value
    return found


def salient(store: LatentStore, labels: np.ndarray, rows: np.ndarray, value: int, way: str, n: int) -> Tensor:
    """Latents of a value: those with the largest mean code in its rows, as in the paper, or the most different ones."""
    if way == "most active":
        mean = np.asarray(store.codes.tocsr()[np.flatnonzero(rows == value)].mean(0))[0]
        return torch.as_tensor(np.argsort(-mean, kind="stable")[:n].copy())
    return mean_difference(store, labels == value, n=n).ids


def at_equal_removal(path: Sequence[tuple[float, float]], removal: float) -> float | None:
    """Damage where a path of removals and damages, which begins at nothing, first removes so much; None: it never does.

    Args:
        path: Neighbouring settings: growing shares, or growing numbers of latents.
        removal: To reach.
    """
    before = (0.0, 0.0)
    for now in path:
        if before[0] <= removal <= now[0] and now[0] > before[0]:
            return before[1] + (now[1] - before[1]) * (removal - before[0]) / (now[0] - before[0])
        before = now
    return None


def compare(run: str, sae: str | None, label: str, values: Sequence[str], n_stories: int, max_rows: int) -> Result:
    """All values, both selections, all numbers of latents."""
    data = datamodule_of(Path(run))
    core = dictionary_of(sae or run)
    point = hook_point_of(core, data)
    source = data.source
    assert source is not None
    names = data.value_names
    if label not in names or any(value not in names[label] for value in values):
        raise MmsaeError(f"the data have no {label} with {', '.join(values)}; nearest: {nearest(label, names)}.")
    batches, n = [], 0
    for batch in data.rows("train"):
        batches.append(batch)
        n += rows_of(batch)
        if n >= max_rows:
            break
    store = LatentStore.build(core, batches, max_rows, "train")
    said = getattr(data, "said", {}).get(label) or [(name,) for name in names[label]]
    tokens = [[single(source, word) for word in words] for words in said]
    labels, rows = store.labels()[label], concepts_of(store, tokens)
    test = data.items("test")
    found: dict[tuple[str, str], list[tuple[float, float, float, int]]] = {}
    table, curves = [], {}
    total = len(values) * len(SELECTIONS) * len(NUMBERS) * (2 + len(SHARES))
    with tqdm(total=total, desc="removing", disable=None) as bar:
        for name in values:
            value = names[label].index(name)
            items = [test[i] for i in range(len(test))]  # type: ignore[arg-type]
            own = [item for item in items if item["labels"][label] == value][:n_stories]
            other = [item for item in items if item["labels"][label] != value][:n_stories]
            stories = Stories(source, own + other, tokens[value], np.arange(len(own) + len(other)) < len(own))
            clean = stories.measure()
            for way in SELECTIONS:
                points: dict[str, list[tuple[float, float, float, int]]] = {}
                for number in NUMBERS:
                    ids = salient(store, labels, rows, value, way, number)
                    for edit, variants in edits_of(core, store, ids, rows, value).items():
                        for one in variants:
                            with steer(source, core, point, one):
                                p, rest, elsewhere = stories.measure()
                            points.setdefault(edit, []).append(
                                (1 - p / clean[0], elsewhere - clean[2], rest - clean[1], number)
                            )
                            bar.update()
                for edit, measured in points.items():
                    found.setdefault((way, edit), []).extend(measured)
                full = [(r, d) for r, d, _, _ in points["masking"][len(SHARES) - 1 :: len(SHARES)]]
                for removal, damage, rest, number in points["APP"]:
                    partial = [(r, d) for r, d, _, n in points["masking"] if n == number]
                    equal = [at_equal_removal(path, removal) for path in (partial, full)]
                    table.append([name, way, number, removal, damage, *equal, rest])
                curves[(name, way)] = points
    return _result(table, curves, label, values)


def _result(table: list[list[Any]], curves: dict[Any, Any], label: str, values: Sequence[str]) -> Result:
    numbers, summary = {}, []
    for way in SELECTIONS:
        for kind, place in (("the same latents in part", 5), ("fewer latents in full", 6)):
            rows = [row for row in table if row[1] == way and row[3] >= 0.1 and row[place] is not None]
            if rows:
                wins = float(np.mean([row[4] < row[place] for row in rows]))
                app, mask = (float(np.mean([row[i] for row in rows])) for i in (4, place))
                numbers |= {f"{way}/{kind}/{n}": v for n, v in (("wins", wins), ("APP", app), ("masking", mask))}
                summary.append([way, kind, len(rows), app, mask, wins])
    columns = [label, "latents", "number", "removed", "APP, nats", "masked in part", "masked in full",
               "APP, rest of the story"]  # fmt: skip
    heads = ["latents", "masking of", "comparisons", "APP, nats ↓", "masking at equal removal, nats ↓",
             "APP is gentler ↑"]  # fmt: skip
    plots = []
    for way in SELECTIONS:
        lines = []
        for edit in ("APP", "masking", "range"):
            best = sorted((r, d) for value in values for r, d, _, _ in curves[(value, way)][edit])
            lines.append({"label": edit, "x": [r for r, _ in best], "y": [d for _, d in best]})
        plots.append(Plot(f"latents that are {way}: damage against removal", "removed, share of the probability",
                          "damage, nats per token", lines, kind="points"))  # fmt: skip
    title = "; ".join(f"{row[0]}, {row[1]}: APP is gentler in {row[5]:.0%}" for row in summary) or "nothing removed"
    tables = [Table("APP against masking at equal removal", heads, summary), Table("Each", columns, table)]
    return Result(name=f"Attenuation-{label}", title=title, numbers=numbers, tables=tables, plots=plots)


def main(args: list[str] | None = None) -> None:
    """Measure, print, and write `results/Attenuation-LABEL.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run of mmsae fit on Stories")
    parser.add_argument("--sae", help="another dictionary than the run's own")
    parser.add_argument("--label", default="animal")
    parser.add_argument("--values", default="dog,horse,goat")
    parser.add_argument("--stories", type=int, default=60, help="with the concept, and as many without")
    parser.add_argument("--max-rows", type=int, default=60_000)
    parser.add_argument("--out", help="folder; default: the run")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(args)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        result = compare(given.run, given.sae, given.label, given.values.split(","), given.stories, given.max_rows)
    except MmsaeError as error:
        raise SystemExit(str(error)) from None
    path = result.save(Path(given.out or given.run) / "results")
    show([result])
    print(f"results: {path}")


if __name__ == "__main__":
    main()

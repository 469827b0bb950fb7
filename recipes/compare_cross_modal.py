"""Compare dictionaries for pairs at equal width and L0 on pairs whose factors are known: one table, and what it shows.

    python recipes/compare_cross_modal.py --out runs/compare_cross_modal --seeds 0 1 2

Scenes with captions and sounds with captions, through the miniature CLIP and CLAP. Group-sparse autoencoders, VL-SAE
and its baselines, TopK, BatchTopK and Matryoshka on the union of both streams, a TopK for each stream with latents
matched afterwards, and group-sparse autoencoders trained on shuffled pairs. Interrupt it at will: the same command goes
on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from cross_modal_report import Job, Results, judge, show, write
from paired_worlds import SIZES, factors, pairs
from paired_worlds import Pairs as World
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mmsae.analyses.cross_modal_measures import alike, dense_numbers, measure, random_coder
from mmsae.analyses.pairs import Pairs
from mmsae.analyses.per_stream import Matched, StreamCoder, Union, encoded
from mmsae.cores import VLSAE, BatchTopK, GroupSparse, Matryoshka, SAECore, TopK
from mmsae.errors import MmsaeError, nearest
from mmsae.files import write_atomic
from mmsae.spec import ACTS, ActivationSpec, Batch
from mmsae.training.module import SAEModule

Acts = dict[str, Tensor]


class Settings(NamedTuple):
    """What every run has in common; results of other settings are not mixed with these."""

    steps: int
    batch_size: int
    lr: float
    d_latent: int
    k: int
    group: float
    sizes: tuple[int, int, int] | None


class Contender(NamedTuple):
    """A dictionary and the way it is shown the pairs.

    Attributes:
        make: Builds the core from the spec and the settings.
        shown: As "pairs"; as the "union" of the streams; "centred", the union of streams less their means; "apart", a
            core for each stream; or as pairs that are "shuffled".
        unit: Whether it reads embeddings of length 1, or as they are projected.
        centred: Whether the mean of each stream is subtracted before, and folded into the dictionary.
    """

    make: Callable[[ActivationSpec, Settings], SAECore]
    shown: str
    unit: bool = True
    centred: bool = False


def group(masked: float, price: float | None = None) -> Callable[[ActivationSpec, Settings], SAECore]:
    """GSAE, or MGSAE with this probability, at the price of the settings or another."""
    return lambda spec, s: GroupSparse(spec, s.d_latent, s.k, s.group if price is None else price, masked)


def vl(encoder: Any = "distance", shared_encoder: bool = True, shared_decoder: bool = False) -> Any:
    """VL-SAE or one of its baselines."""
    return lambda spec, s: VLSAE(spec, s.d_latent, s.k, encoder, shared_encoder, shared_decoder)


def plain(cls: type[SAECore], **arguments: Any) -> Any:
    """A core of one stream, without AuxK, which the others have not either."""
    return lambda spec, s: cls(spec, s.d_latent, k=s.k, aux_coefficient=0.0, **arguments)  # type: ignore[call-arg]


CONTENDERS: dict[str, Contender] = {
    "GSAE": Contender(group(0.0), "pairs"),
    "GSAE, price .05": Contender(group(0.0, 0.05), "pairs"),
    "MGSAE, price .05": Contender(group(0.2, 0.05), "pairs"),
    "VLSAE": Contender(vl(), "pairs", unit=False),
    "VLSAE, centred": Contender(vl(), "pairs", unit=False, centred=True),
    "SAE-S": Contender(vl("linear", shared_decoder=True), "pairs", unit=False),
    "SAE-D": Contender(vl("linear", shared_encoder=False), "pairs", unit=False),
    "TopK": Contender(plain(TopK), "union"),
    "TopK, centred": Contender(plain(TopK), "centred"),
    "BatchTopK": Contender(plain(BatchTopK), "union"),
    "Matryoshka": Contender(plain(Matryoshka), "union"),
    "TopK per stream, matched": Contender(plain(TopK), "apart"),
    "GSAE, shuffled pairs": Contender(group(0.0), "shuffled"),
    "GSAE, price .05, shuffled pairs": Contender(group(0.0, 0.05), "shuffled"),
}
BASELINES = ("random", "embeddings", "embeddings, centred")
"""What is not trained."""


class Rows(IterableDataset):
    """Batches of rows in memory, drawn with replacement."""

    def __init__(self, acts: Acts, settings: Settings, seed: int, rows: int) -> None:
        self.acts, self.settings, self.seed, self.rows = acts, settings, seed, rows

    def __len__(self) -> int:
        return self.settings.steps

    def __iter__(self) -> Iterator[Batch]:
        g = torch.Generator().manual_seed(self.seed)
        n = len(next(iter(self.acts.values())))
        for _ in range(len(self)):
            chosen = torch.randint(0, n, (self.rows,), generator=g)
            yield {ACTS: {stream: x[chosen] for stream, x in self.acts.items()}}


def fit(contender: Contender, acts: Acts, settings: Settings, seed: int) -> SAECore:
    """Train one dictionary; a core of one stream sees as many embeddings a step as one of two streams."""
    torch.manual_seed(300 + seed)
    core = contender.make(ActivationSpec({stream: x.shape[1] for stream, x in acts.items()}), settings)
    rows = settings.batch_size * (1 if len(acts) > 1 else 2)
    module = SAEModule(
        core,
        normalise="center" if contender.centred else "none",
        sample_rows=8192,
        lr_warmup_steps=max(1, settings.steps // 15),
        gradient_clip=0.0,
        optimizer=partial(torch.optim.Adam, lr=settings.lr),
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=settings.steps, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=settings.steps + 1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Rows(acts, settings, 400 + seed, rows), batch_size=None))
    return module.export()


def train(contender: Contender, world: World, settings: Settings, seed: int) -> StreamCoder:
    """The dictionary as a coder of streams."""
    acts = world.unit() if contender.unit else scaled(world.acts)
    names, shown = list(acts), contender.shown
    if shown == "shuffled":
        order = torch.randperm(len(acts[names[1]]), generator=torch.Generator().manual_seed(500 + seed))
        acts = {names[0]: acts[names[0]], names[1]: acts[names[1]][order]}
    if shown in ("pairs", "shuffled"):
        return fit(contender, acts, settings, seed)  # type: ignore[return-value]
    if shown == "apart":
        cores = {name: fit(contender, {name: x}, settings, seed) for name, x in acts.items()}
        return Matched.on_pairs(cores, acts)
    means = {name: x.mean(0) for name, x in acts.items()} if shown == "centred" else None
    rows = torch.cat([x if means is None else x - means[name] for name, x in acts.items()])
    return Union(fit(contender, {"x": rows}, settings, seed), names, means)


def scaled(acts: Acts) -> Acts:
    """Embeddings as they are projected, divided by the mean norm of all, so that one step size suits all."""
    norm = torch.cat([x.norm(dim=-1) for x in acts.values()]).mean()
    return {name: x / norm for name, x in acts.items()}


def shown_to(contender: Contender, world: World) -> Pairs:
    """Pairs as the dictionary reads them."""
    acts = world.unit() if contender.unit else scaled(world.acts)
    return Pairs(acts, world.labels, world.stated, torch.arange(len(next(iter(acts.values())))).numpy())


def run(job: Job, settings: Settings, folder: Path) -> dict[str, float]:
    """The figures of one contender on one world."""
    held = pairs(job.world, job.seed, folder, settings.sizes)
    values = {name: len(known) for name, known in factors(job.world).items()}
    contender = CONTENDERS.get(job.name, Contender(group(0.0), "pairs"))
    val, test = (shown_to(contender, held[split]) for split in ("val", "test"))
    if job.name.startswith("embeddings"):
        found = dense_numbers(val, test, values)
        if job.name == "embeddings, centred":
            return {name: found[f"{name}_centred"] for name in ("r@1", "mrr")}
        return found
    if job.name == "random":
        width = next(iter(test.acts.values())).shape[1]
        train_pairs = shown_to(contender, held["train"])
        coder: StreamCoder = random_coder(width, settings.d_latent, settings.k, train_pairs, 12345 + job.seed)
    else:
        coder = train(contender, held["train"], settings, job.seed)
    learnt = shown_to(contender, held["train"])  # many latents fire on too few of the test pairs for a concept set
    codes = {name: encoded(coder, x, name) for name, x in learnt.acts.items()}
    sets = alike(codes, {name: learnt.features(values, name) for name in codes})
    found = measure(coder, val, test, values, seed=job.seed).numbers
    return found | {f"{name}_train": value for name, value in sets.items()}


def load(path: Path, settings: Settings) -> dict[str, dict[str, float]]:
    """Finished results with the same settings."""
    if not path.exists():
        return {}
    held = json.loads(path.read_text())
    if held["settings"] != json.loads(json.dumps(settings._asdict())):
        raise MmsaeError(f"{path} holds results of other settings ({held['settings']}): give another --out.")
    return held["results"]


def compare(worlds: list[str], names: list[str], seeds: list[int], settings: Settings, out: Path) -> Results:
    """Train and measure what is missing; every result is on disk as soon as it is there."""
    path = out / "results.json"
    held = load(path, settings)
    jobs = [Job(world, name, seed) for seed in seeds for world in worlds for name in names]
    for job in jobs:
        if job.key not in held:
            found = run(job, settings, out / "data")
            held[job.key] = {name: float(v) for name, v in found.items() if math.isfinite(v)}
            write_atomic(path, json.dumps({"settings": settings._asdict(), "results": held}, indent=1).encode())
            print(
                f"{job.key}: " + ", ".join(f"{k} {v:.3f}" for k, v in held[job.key].items() if k in SHOWN), flush=True
            )
    return Results({job: held[job.key] for job in jobs})


SHOWN = ("fvu", "l0", "both", "dead", "r@1", "mrr", "cross_recovery", "intra", "inter", "jaccard")


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if every claim shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/compare_cross_modal")
    parser.add_argument("--worlds", nargs="+", default=list(SIZES))
    parser.add_argument("--contenders", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=128, help="pairs")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--d_latent", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--group", type=float, default=0.005, help="price of the group norm; chosen on seed 10")
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    given = parser.parse_args(arguments)
    known = [*CONTENDERS, *BASELINES]
    for name in [*(given.contenders or ()), *given.worlds]:
        if name not in [*known, *SIZES]:
            raise MmsaeError(f"there is no {name!r}; nearest: {nearest(name, [*known, *SIZES])}.")
    names = [name for name in known if given.contenders is None or name in given.contenders]
    sizes = (64, 48, 48) if given.quick else None
    steps = 20 if given.quick else given.steps
    settings = Settings(steps, given.batch_size, given.lr, given.d_latent, given.k, given.group, sizes)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    out = Path(given.out)
    results = compare(given.worlds, names, given.seeds, settings, out)
    judged = [] if given.quick else judge(results, given.worlds, given.seeds)
    write(results, names, given.worlds, given.seeds, settings._asdict(), judged, out)
    show(results, names, given.worlds, judged)
    print(f"written: {out / 'table.md'}")
    return int(not all(verdict.holds or verdict.known for verdict in judged))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except MmsaeError as error:
        raise SystemExit(f"Error: {error}") from None

"""Compare all cores at equal sparsity on data whose features are known: one table, one plot, and what they show.

    python recipes/compare_cores.py --out runs/compare_cores

Each core is trained by `SAEModule` and Lightning's `Trainer` on each world of `mmsae.miniatures.worlds`, with as many
latents as there are features and as many of them active as there are features on (k, or a price that is moved until
L0 is there). Interrupt it at will: the same command goes on with what is missing.
Cores that see the same batches are trained in one pass.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from cores_report import FRONT, FRONT_SCALES, FRONT_WORLD, Job, Results, judge, show, write
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mmsae.cores import SAECore, SharedDictionary
from mmsae.errors import MmsaeError, checked, nearest
from mmsae.files import write_atomic
from mmsae.metrics import Fidelity, ground_truth
from mmsae.miniatures.worlds import WORLDS, Draw, World
from mmsae.spec import ACTS, TARGET, ActivationSpec, Batch
from mmsae.subclasses import subclasses
from mmsae.training.module import MAIN, SAEModule


class Settings(NamedTuple):
    """What every run has in common; results of other settings are not mixed with these."""

    steps: int
    batch_size: int
    lr: float
    n_train: int
    n_test: int


class Data(NamedTuple):
    """A world and rows of it."""

    world: World
    k: int
    train: Tensor
    test: Draw


@lru_cache(maxsize=2)
def data(world: str, seed: int, n_train: int, n_test: int) -> Data:
    """Made once for all cores."""
    made = WORLDS[world](seed)
    return Data(made, made.k, made.rows(n_train, 100 + seed), made.draw(n_test, 200 + seed))


# ---- what a core is built with


class Price(NamedTuple):
    """Arguments that decide together how much fires; `sign` is -1 where more of them means more."""

    names: tuple[str, ...]
    sign: int = 1


PRICES = (
    Price(("l1_coefficient",)),
    Price(("sparsity_coefficient",)),
    Price(("highest_frequency", "lowest_frequency"), -1),
)
OWN: dict[str, Callable[[int, int, int, Settings], dict[str, Any]]] = {  # of width, d_latent, k and the settings
    "Archetypal": lambda d, m, k, s: {"delta": 0.1},
    "Crosscoder": lambda d, m, k, s: {"l1_coefficient": 1.0},
    "FeatureChoice": lambda d, m, k, s: {"warmup_rows": s.steps * s.batch_size // 10},
    "GroupBias": lambda d, m, k, s: {"n_groups": min(8, m), "highest_frequency": 0.3, "lowest_frequency": 0.003,
                                     "every": max(1, s.steps // 200), "rate": 0.05},
    "GroupMax": lambda d, m, k, s: {"d_latent": math.ceil(m / k) * k},
    "ICA": lambda d, m, k, s: {"d_latent": min(d, m), "max_iterations": 1000},
    "Matryoshka": lambda d, m, k, s: {"prefixes": (round(m / 8) / m, round(3 * m / 8) / m, 1.0)},
    "MultiTopK": lambda d, m, k, s: {"multiple": 2},
    "NMF": lambda d, m, k, s: {"max_rows": 4096, "max_iterations": 500},
    "Neurons": lambda d, m, k, s: {"d_latent": d},
    "PAnneal": lambda d, m, k, s: {"anneal_start": max(1, s.steps // 5), "anneal_end": s.steps + 20,
                                   "n_updates": max(2, min(10, s.steps // 15))},
    "PCA": lambda d, m, k, s: {"d_latent": min(d, m)},
    "PolySAE": lambda d, m, k, s: {"rank": min(d, m), "rank2": 2 * min(d, m) // 3, "rank3": 0},
    "RandomDictionary": lambda d, m, k, s: {"seed": 12345},  # no world's: 0 would begin as the features of world 0 do
    "ReLU": lambda d, m, k, s: {"l1_coefficient": 1.0},
    "SemiNMF": lambda d, m, k, s: {"neurons": 1.0, "n_starts": 1, "max_iterations": 300, "max_rows": 4096},
    "Variational": lambda d, m, k, s: {"kl_coefficient": 0.03, "sigma": 0.3},
}  # fmt: skip
"""Arguments of single cores: sizes, and what their acceptance tests in `tests/cores` use."""
NORMALISE = {"NMF": "none", "SemiNMF": "none", "Atoms": "scale"}
"""What is done to the rows where it is not `center_scale`: what the docstring of the core asks for."""


def build(cls: type[SAECore], spec: ActivationSpec, k: int, d_latent: int, settings: Settings) -> SAECore:
    """A core for these data, with about `k` active latents."""
    width = sum(spec.streams.values()) if reads_several(cls) else spec.d_in
    arguments: dict[str, Any] = {
        "d_latent": d_latent,
        "k": k,
        "k_max": k,
        "target_l0": k,
        "dead_after": 20 * settings.batch_size,
    }
    if cls.__name__ in OWN:
        arguments |= OWN[cls.__name__](width, d_latent, k, settings)
    known = inspect.signature(cls.__init__).parameters
    return cls(spec, **{name: value for name, value in arguments.items() if name in known})


def reads_several(cls: type[SAECore]) -> bool:
    """Whether a core reads several streams."""
    return cls.inputs is not SAECore.inputs


def transcodes(cls: type[SAECore]) -> bool:
    """Whether a core refuses data without a target."""
    return cls.__name__.endswith("Transcoder")


def refused(cls: type[SAECore], world: World) -> str:
    """Why a core cannot run on a world; empty if it can."""
    if cls.needs:
        return f"needs {', '.join(sorted(cls.needs))}, which no world has"
    if issubclass(cls, SharedDictionary):
        return "needs pairs of one space, and measures of each stream (docs/cross_modal_cores.md)"
    if (reads_several(cls) or transcodes(cls)) and not world.streams:
        return "needs two streams"
    return ""


def streams(cls: type[SAECore], world: World, x: Tensor) -> dict[str, Tensor]:
    """Rows of a world as a core reads them: several streams side by side, apart, or one as the target of the other."""
    if reads_several(cls):
        return world.by_stream(x)
    if transcodes(cls):
        source, target = world.by_stream(x).values()
        return {"x": source, TARGET: target}
    return {"x": x}


# ---- training


class Rows(IterableDataset):
    """Batches of rows in memory, drawn with replacement."""

    def __init__(self, acts: dict[str, Tensor], settings: Settings, seed: int) -> None:
        self.acts, self.settings, self.seed = acts, settings, seed

    def __len__(self) -> int:
        return self.settings.steps

    def __iter__(self) -> Iterator[Batch]:
        g = torch.Generator().manual_seed(self.seed)
        n = len(next(iter(self.acts.values())))
        for _ in range(len(self)):
            chosen = torch.randint(0, n, (self.settings.batch_size,), generator=g)
            yield {ACTS: {stream: x[chosen] for stream, x in self.acts.items()}}


class AtL0(SAEModule):
    """SAEModule that moves prices until the running mean of L0 is the one wanted.

    A price changes by `rate` a step, after the warm-up and until the learning rate falls, so that what is compared is
    how well cores do with equally many active latents.
    """

    def __init__(self, prices: dict[str, Price], target_l0: float, rate: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.prices, self.target_l0, self.rate = prices, target_l0, rate
        self._l0: dict[str, float] = {}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, then the prices."""
        super().optimizer_step(*args, **kwargs)
        assert self.total_steps is not None
        moving = self.lr_warmup_steps < self.global_step <= (1 - self.lr_decay) * self.total_steps
        for core, price in self.prices.items():
            now = float(self._codes[core].l0().float().mean())
            self._l0[core] = 0.9 * self._l0.get(core, now) + 0.1 * now
            if not moving:
                continue
            dearer = (self._l0[core] > self.target_l0) == (price.sign > 0)
            for name in price.names:
                value = getattr(self.cores[core], name) * (1 + self.rate if dearer else 1 / (1 + self.rate))
                setattr(self.cores[core], name, min(value, 0.9) if price.sign < 0 else value)  # 0.9: a frequency


def passes(jobs: list[Job], worlds: dict[str, World]) -> list[list[Job]]:
    """Jobs that see the same batches, and so are trained in one pass."""
    together: dict[Any, list[Job]] = {}
    for job in jobs:
        cls = subclasses(SAECore)[job.core]
        alike = (job.seed, job.world, job.scale, NORMALISE.get(job.core), cls.gradient_free,
                 *streams(cls, worlds[job.world], worlds[job.world].features))  # fmt: skip
        together.setdefault(alike, []).append(job)
    return list(together.values())


def train(jobs: list[Job], settings: Settings, each_step: Callable[[int], None] | None = None) -> list[SAECore]:
    """Dictionaries that take raw activations, all of one pass; first weights do not depend on the company."""
    world, first, seed, scale = jobs[0]
    given, cls = data(world, seed, settings.n_train, settings.n_test), subclasses(SAECore)[first]
    k, d_latent = max(1, round(given.k * scale)), len(given.world.features)
    acts = streams(cls, given.world, given.train)
    spec = ActivationSpec({stream: x.shape[1] for stream, x in acts.items()})
    cores: dict[str, SAECore] = {}
    prices: dict[str, Price] = {}
    for job in jobs:
        torch.manual_seed(300 + seed)
        name, cls = job.core if cores else MAIN, subclasses(SAECore)[job.core]
        cores[name] = build(cls, spec, k, d_latent, settings)
        known = inspect.signature(cls.__init__).parameters
        price = next((p for p in PRICES if p.names[0] in known and not {"k", "k_max"} & set(known)), None)
        if price is not None:
            prices[name] = price
    module = AtL0(
        prices, k, math.exp(math.log(100) / (settings.steps / 2)) - 1,  # a hundredfold in half of the steps
        core=cores.pop(MAIN), also=cores, normalise=NORMALISE.get(first, "center_scale"), sample_rows=8192,
        lr_warmup_steps=max(1, settings.steps // 15), optimizer=partial(torch.optim.Adam, lr=settings.lr),
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=settings.steps, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=settings.steps + 1,
        callbacks=[Steps(each_step)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(Rows(acts, settings, 400 + seed), batch_size=None))
    return [module.export(name) for name in (MAIN, *cores)]


class Steps(L.Callback):
    """Tells a progress bar."""

    def __init__(self, tell: Callable[[int], None] | None) -> None:
        self.tell = tell

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, i: int) -> None:
        """One more."""
        if self.tell is not None and (i + 1) % 10 == 0:
            self.tell(i + 1)


# ---- measuring


@torch.no_grad()
def measure(core: SAECore, given: Data) -> dict[str, float]:
    """Fidelity and sparsity on rows not seen, and how right the dictionary is."""
    world, cls = given.world, type(core)
    acts = streams(cls, world, given.test.x)
    codes = core.encode(acts if reads_several(cls) else acts["x"])
    out = torch.cat(list(core.by_stream(core.decode(codes)).values()), -1)
    fidelity = Fidelity(out.shape[1], core.d_latent)
    fidelity.update(torch.cat([acts[stream] for stream in core.outputs], -1), out, codes)
    numbers = fidelity.numbers()
    dictionaries = getattr(core, "dictionaries", None)
    dictionary = core.dictionary if dictionaries is None else torch.cat(list(dictionaries.values()), -1)
    features, on, bipolar = world.features, given.test.on, world.bipolar or core.signed
    if transcodes(cls):  # features of the target that the source has as well
        source, features = world.by_stream(features).values()
        both = (source.norm(dim=1) > 0) & (features.norm(dim=1) > 0)
        features, on = features[both] / features[both].norm(dim=1, keepdim=True), on[:, both]
    live = dictionary[codes.firings() > 0]
    split = ground_truth.splitting(live, features, bipolar=bipolar)
    found = {
        "fvu": numbers["fvu"], "l0": numbers["l0"], "dead": numbers["dead_fraction"],
        "matched": float(ground_truth.match(dictionary, features, bipolar).cosine.mean()),
        "found": ground_truth.recovery_rate(dictionary, features, bipolar=bipolar),
        "f1": float(ground_truth.feature_f1(codes, on).f1.nanmean()),
        "split": float(split[split > 0].float().mean()) if split.any() else 0.0,
        "composed": ground_truth.composition(live, features, on, bipolar=bipolar).share(),
    }  # fmt: skip
    if world.parents is not None:
        absorbed = ground_truth.absorption(codes, dictionary, features, given.test.coefficients, world.parents, bipolar)
        found |= {"absorbed": float(absorbed.rate.nanmean()), "silent": float(absorbed.silent.nanmean())}
    if world.streams and not transcodes(cls):
        leak = ground_truth.leak(dictionary, features, world.streams, bipolar)
        found |= {"leak": leak.private, "told_apart": leak.told_apart}
    return found


# ---- the run


def pick(kind: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """Those asked for, all of which must be known; by default all."""
    for name in wanted or ():
        if name not in known:
            raise MmsaeError(f"there is no {kind} {name!r}; nearest: {nearest(name, known)}.")
    return [name for name in known if wanted is None or name in wanted]


def load(path: Path, settings: Settings) -> dict[str, dict[str, Any]]:
    """Finished results with the same settings."""
    if not path.exists():
        return {}
    try:
        held = json.loads(path.read_text())
        same, results = held["settings"] == settings._asdict(), held["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise MmsaeError(f"{path} cannot be read ({error}); delete it, or give another --out.") from error
    if not same:
        raise MmsaeError(f"{path} holds results of other settings ({held['settings']}): give another --out.")
    return results


def compare(worlds: list[str], names: list[str], seeds: list[int], settings: Settings, out: Path) -> Results:
    """Train and measure what is missing; every result is on disk as soon as it is there."""
    console, known = Console(), subclasses(SAECore)
    path = out / "results.json"
    held = load(path, settings)
    made = {world: WORLDS[world](0) for world in worlds}
    for name in names:
        reasons = {refused(known[name], made[world]) for world in worlds} - {""}
        for reason in sorted(reasons):
            n = sum(refused(known[name], made[world]) == reason for world in worlds)
            console.print(f"skipped: {name} on {n} of {len(worlds)} worlds: {reason}", highlight=False)
    jobs = [Job(world, name, seed) for seed in seeds for world in worlds for name in names
            if not refused(known[name], made[world])]  # fmt: skip
    if FRONT_WORLD in worlds:
        jobs += [Job(FRONT_WORLD, name, seed, scale)
                 for seed in seeds for name in FRONT if name in names for scale in FRONT_SCALES]  # fmt: skip
    jobs.sort(key=lambda job: seeds.index(job.seed))  # a seed is whole before the next begins
    todo = [job for job in jobs if job.key not in held]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("comparing", total=len(jobs), completed=len(jobs) - len(todo))
        done = len(jobs) - len(todo)
        for group in passes(todo, made):
            job, n = group[0], len(group)
            what = f"{job.world}, seed {job.seed}: " + (job.core if n == 1 else f"{n} cores")
            bar.update(task, description=what)
            before = done

            def moved(step: int, before: int = before, n: int = n) -> None:
                bar.update(task, completed=before + n * step / settings.steps)

            begin = time.perf_counter()
            cores = train(group, settings, moved)
            seconds = (time.perf_counter() - begin) / n
            given = data(job.world, job.seed, settings.n_train, settings.n_test)
            for job, core in zip(group, cores, strict=True):
                held[job.key] = {**measure(core, given), "seconds": seconds}
            write_atomic(path, json.dumps({"settings": settings._asdict(), "results": held}).encode())
            done += n
            bar.update(task, completed=done)
        bar.update(task, description="comparing")
    return Results({job: held[job.key] for job in jobs})


def main(args: list[str] | None = None) -> int:
    """Compare, write, show, judge; 1 if a claim does not show, unless that is documented."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", help=f"default: all of {' '.join(WORLDS)}")
    parser.add_argument("--cores", nargs="+", help="default: every core that is installed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of worlds, rows and first weights")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each dictionary")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--n_train", type=int, default=30_000, help="rows, drawn with replacement")
    parser.add_argument("--n_test", type=int, default=10_000, help="rows that are measured on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="40 steps on two worlds: whether it runs, not what it shows"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare_cores"))
    given = parser.parse_args(args)
    torch.set_num_threads(checked("threads", given.threads, 1))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # a line about devices for each of hundreds of runs
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="(NMF presumes|.*did not converge)")
    names = pick("core", given.cores, list(subclasses(SAECore)))
    worlds = pick("world", given.worlds, list(WORLDS))
    if given.quick:
        settings = Settings(40, 64, given.lr, 2000, 1000)
        worlds = worlds if given.worlds else ["zipf", "modalities"]
    else:
        settings = Settings(given.steps, given.batch_size, given.lr, given.n_train, given.n_test)
    for name, value in settings._asdict().items():
        checked(name, value, 0 if name == "lr" else 30)
    results = compare(worlds, names, given.seeds, settings, given.out)
    judged = [] if given.quick else judge(results)
    said = (f"{settings.steps} steps of {settings.batch_size} rows, learning rate {settings.lr:g}; "
            f"means over seeds {', '.join(map(str, given.seeds))}.")  # fmt: skip
    write(given.out, results, names, {world: WORLDS[world](0).k for world in worlds}, judged, said)
    show(results, names, worlds, judged)
    if judged:
        print(f"{sum(v.holds for v in judged)} of {len(judged)} claims show")
    print(f"written: {given.out / 'table.md'}, table.json, results.json, compare_cores.png")
    return 1 if any(not v.holds and not v.known for v in judged) else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except MmsaeError as error:
        raise SystemExit(f"Error: {error}") from None

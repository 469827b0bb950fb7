"""The table of `compare_cross_modal.py` and the claims that it is judged by."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from mmsae.files import write_atomic

COLUMNS = {
    "fvu": "FVU ↓", "l0": "L0", "both": "in both ↑", "balanced": "balanced ↑", "dead": "dead ↓", "jaccard": "Jaccard ↑",
    "r@1": "R@1 ↑", "mrr": "MRR ↑", "gap": "gap ↓", "cross_recovery": "cross AUROC ↑", "cross_found": "≥ .9 ↑",
    "same_recovery": "own AUROC ↑", "sets_train": "sets", "intra_train": "intra ↑", "inter_train": "inter ↓",
    "mms": "MMS ↑", "control": "control ↑", "control_random": "random",
}  # fmt: skip
LESS = {"fvu", "dead", "gap", "inter_train"}


class Job(NamedTuple):
    """One contender on one world."""

    world: str
    name: str
    seed: int

    @property
    def key(self) -> str:
        """In the file of results."""
        return f"{self.world}/{self.name}/{self.seed}"


class Results(NamedTuple):
    """Figures of every job."""

    of: dict[Job, dict[str, float]]

    def values(self, world: str, name: str, metric: str) -> list[float]:
        """Of each seed, in their order."""
        found = [(job.seed, figures[metric]) for job, figures in self.of.items()
                 if (job.world, job.name) == (world, name) and metric in figures]  # fmt: skip
        return [value for _, value in sorted(found)]

    def mean(self, world: str, name: str, metric: str) -> float | None:
        """Over the seeds."""
        values = self.values(world, name, metric)
        return statistics.fmean(values) if values else None


class Claim(NamedTuple):
    """That a contender is better than another by a metric, on every seed.

    Attributes:
        says: The claim.
        name: The contender.
        rival: Whom it beats.
        metric: By what; less is better for some.
        slack: The ratio up to which it may be worse, 1 for none.
        known: Worlds on which it is known not to show; see the docs.
    """

    says: str
    name: str
    rival: str
    metric: str
    slack: float = 1.0
    known: tuple[str, ...] = ()


DEAR = ("scenes", "sounds")
CLAIMS: tuple[Claim, ...] = (
    *(
        claim
        for name in ("GSAE", "GSAE, price .05", "MGSAE, price .05")
        for claim in (
            Claim("more latents fire in both streams", name, "TopK", "both"),
            Claim("fewer are dead", name, "TopK", "dead", known=("scenes",) if name.startswith("M") else ()),
            Claim("latents chosen in one stream know the factor in the other", name, "TopK", "cross_recovery"),
            Claim("at no more than 5 % more FVU", name, "TopK", "fvu", 1.05, DEAR if "price" in name else ()),
            Claim("its codes find partners", name, "TopK", "r@1"),
        )
    ),
    *(
        Claim("its codes find partners more often than after training on shuffled pairs", name,
              f"{name}, shuffled pairs", "r@1")
        for name in ("GSAE", "GSAE, price .05")
    ),
    Claim("concept sets agree more across streams", "VLSAE", "TopK", "intra_train"),
    Claim("concept sets of different latents are less alike", "VLSAE", "TopK", "inter_train"),
    Claim("concept sets agree more across streams than with a linear encoder", "VLSAE", "SAE-S", "intra_train"),
    Claim("and more with a shared encoder than with two", "SAE-S", "SAE-D", "intra_train"),
)  # fmt: skip
"""Written down before the first figure; `known` was added after."""


class Verdict(NamedTuple):
    """A claim on one world."""

    claim: Claim
    world: str
    mine: float
    theirs: float
    wins: int
    n: int

    @property
    def holds(self) -> bool:
        """On the mean, and on most seeds."""
        return self.wins * 2 > self.n and better(self.mine, self.theirs, self.claim)

    @property
    def known(self) -> bool:
        """Whether it is known not to show here."""
        return self.world in self.claim.known

    @property
    def mark(self) -> str:
        """In words."""
        return "holds" if self.holds else "known not to hold" if self.known else "does not hold"


def better(mine: float, theirs: float, claim: Claim) -> bool:
    """Whether one figure beats another."""
    if claim.metric in LESS:
        return mine <= claim.slack * theirs if claim.slack > 1 else mine < theirs
    return mine > theirs


def judge(results: Results, worlds: list[str], seeds: list[int]) -> list[Verdict]:
    """Every claim on every world that has the figures."""
    found = []
    for world in worlds:
        for claim in CLAIMS:
            mine = results.values(world, claim.name, claim.metric)
            theirs = results.values(world, claim.rival, claim.metric)
            if len(mine) == len(theirs) == len(seeds):
                wins = sum(better(a, b, claim) for a, b in zip(mine, theirs, strict=True))
                means = statistics.fmean(mine), statistics.fmean(theirs)
                found.append(Verdict(claim, world, *means, wins, len(seeds)))
    return found


def short(value: float | None) -> str:
    """Two or three digits."""
    if value is None:
        return "–"
    if abs(value) >= 9.95:
        return f"{value:.1f}"
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def markdown(results: Results, names: list[str], worlds: list[str], judged: list[Verdict]) -> str:
    """The tables and the claims."""
    lines = []
    for world in worlds:
        lines += [f"### {world.capitalize()}", "", "| | " + " | ".join(COLUMNS.values()) + " |"]
        lines.append("|---|" + "---:|" * len(COLUMNS))
        for name in names:
            cells = [short(results.mean(world, name, metric)) for metric in COLUMNS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    if judged:
        lines += ["### Claims", "", "| claim | world | | seeds | |", "|---|---|---:|---:|---|"]
        for v in judged:
            metric = COLUMNS[v.claim.metric].split()[0] if v.claim.metric != "cross_recovery" else "cross AUROC"
            seen = f"{short(v.mine)} / {short(v.theirs)}"
            lines.append(
                f"| {v.claim.name}: {v.claim.says} ({metric} against {v.claim.rival}) | {v.world} | {seen} | "
                f"{v.wins} of {v.n} | {v.mark} |"
            )
        lines.append("")
    return "\n".join(lines)


def write(
    results: Results,
    names: list[str],
    worlds: list[str],
    seeds: list[int],
    settings: dict[str, Any],
    judged: list[Verdict],
    out: Path,
) -> None:
    """`table.md` and `table.json`."""
    head = (
        f"{settings['d_latent']} latents, k {settings['k']}, {settings['steps']} steps of {settings['batch_size']} "
        f"pairs, learning rate {settings['lr']:g}; means over seeds {', '.join(map(str, seeds))}.\n\n"
    )
    write_atomic(out / "table.md", (head + markdown(results, names, worlds, judged)).encode())
    rows = {world: {name: {m: results.values(world, name, m) for m in COLUMNS} for name in names} for world in worlds}
    write_atomic(
        out / "table.json", json.dumps({"settings": settings, "seeds": seeds, "rows": rows}, indent=1).encode()
    )


def show(results: Results, names: list[str], worlds: list[str], judged: list[Verdict]) -> None:
    """The tables and the claims, in the terminal."""
    console = Console()
    console.width = max(console.width, 180)
    for world in worlds:
        table = Table(title=world, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for heading in COLUMNS.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for name in names:
            table.add_row(name, *(short(results.mean(world, name, metric)) for metric in COLUMNS))
        console.print(table)
    for v in judged:
        line = f"{v.mark}: {v.world}, {v.claim.name}: {v.claim.says} ({v.claim.metric} {short(v.mine)}, " \
               f"{v.claim.rival} {short(v.theirs)}; {v.wins} of {v.n} seeds)"  # fmt: skip
        console.print(line, style="" if v.holds or v.known else "bold red", highlight=False)

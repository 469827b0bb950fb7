"""The bench: success against collateral change over strengths, for the latents of some values, with controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from mmsae.errors import MmsaeError, checked
from mmsae.results import Result
from mmsae.steering.context import Context
from mmsae.steering.dose import DoseResponse
from mmsae.steering.edits import Add, Clamp, Edit, Swap
from mmsae.steering.experiment import SELECTED, Experiment, experiment, halves
from mmsae.steering.fragility import Confounded, confounded, confusion
from mmsae.steering.judges import Judge, axbench
from mmsae.steering.ledger import Ledger
from mmsae.steering.sweep import STRENGTHS, Site, sweep
from mmsae.steering.targets import Contexts, Layer, writes
from mmsae.steering.word_readouts import ContinuationReadout

EDITS: dict[str, Callable[[int, float], Edit]] = {"add": Add, "clamp": Clamp}
SWAP = "swap"
SPREAD_ROWS = 2000


@dataclass
class Found:
    """What the bench measured.

    Attributes:
        names: Of the values.
        all_names: Of all values of the label.
        experiments: Of the first layer, by value.
        confounders: Of the latents chosen there.
        matrix: Confusion of them over all values, where all are benched.
        layers: Name of each layer to the curves of its chosen latents, one for each value.
        judged: Arm to ratings, by value.
    """

    names: list[str]
    all_names: list[str]
    experiments: list[Experiment] = field(default_factory=list)
    confounders: list[Confounded] = field(default_factory=list)
    matrix: np.ndarray | None = None
    layers: dict[str, list[DoseResponse]] = field(default_factory=dict)
    judged: dict[str, list[dict[str, np.ndarray]]] = field(default_factory=dict)


@dataclass
class SteeringBench:
    """Settings of a bench.

    Attributes:
        values: Numbers of the values of the label.
        strengths: In units of the 99th percentile of each latent's codes.
        edit: "add", "clamp", or "swap": the codes of the latents of all other values go over to the one that steers.
        where: Weight of every position.
        select: "difference" takes the latents that tell a value from the others; "output", of language models, those
            whose decoder rows write its words.
        candidates: Latents tried for each value; the control has as many tries.
        seed: Of halves, controls and resamples.
        n_boot: Resamples for intervals.
    """

    values: Sequence[int]
    strengths: Sequence[float] = STRENGTHS
    edit: str = "add"
    where: Callable[[Context], Any] | None = None
    select: Literal["difference", "output"] = "difference"
    candidates: int = 3
    seed: int = 0
    n_boot: int = 1000

    def __post_init__(self) -> None:
        if self.edit not in (*EDITS, SWAP):
            raise MmsaeError(f"edit={self.edit!r} is unknown; choose {', '.join(EDITS)} or {SWAP}.")
        if len({checked("strength", float(a), 0) for a in self.strengths} - {0.0}) < 2:
            raise MmsaeError(f"strengths={list(self.strengths)}: a bench compares at least two strengths above 0.")
        checked("candidates", self.candidates, 1)
        checked("n_boot", self.n_boot, 1)

    def run(
        self, layers: Sequence[Layer], contexts: Contexts, ledger: Ledger | None = None, judge: Judge | None = None
    ) -> Result:
        """Measure, first layer first.

        Args:
            layers: The first with all controls; of the others the chosen latents, for the grid of layers and strengths.
            contexts: Where it is measured.
            ledger: Measurements that are there already, and where new ones go.
            judge: Rates continuations; only of models that write.
        """
        from mmsae.steering.bench_result import result_of

        if judge is not None and not writes(contexts.data.source):
            raise MmsaeError("a judge rates texts, and the model writes none: leave judge out.")
        if self.select == "output":
            contexts.toward(self.values[0])
        ledger = Ledger() if ledger is None else ledger
        found = Found([contexts.names[contexts.label][v] for v in self.values], contexts.names[contexts.label])
        n_strengths = len({0.0, *map(float, self.strengths)})
        total = len(self.values) * n_strengths * (2 * self.candidates + 2 + self.candidates * (len(layers) - 1))
        with tqdm(total=total, desc=f"steering {contexts.label}", unit="run", disable=None) as bar:
            for value in self.values:
                readout = contexts.readout(value)
                for layer in layers:
                    self._one(layer, layers[0], value, readout, contexts, found, ledger, bar)
        self._confused(layers[0], contexts, found)
        if judge is not None:
            self._judged(layers[0], contexts, found, judge)
        return result_of(found, self, contexts, layers)

    def _edit(self, layer: Layer, contexts: Contexts, value: int) -> Callable[[int, float], Edit]:
        if self.edit != SWAP:
            return EDITS[self.edit]
        others = [v for v in range(len(contexts.names[contexts.label])) if v != value]
        chosen = [layer.choose(contexts.label, v, self.candidates, self.seed)[0].ids.tolist() for v in others]
        sources = {i for ids in chosen for i in ids}
        return lambda i, strength: Swap(i, sorted(sources - {i}), strength)

    def _site(self, layer: Layer, model: Any) -> Site:
        return Site(model, layer.core, layer.name, self.where, layer.scale)

    def _one(
        self, layer: Layer, main: Layer, value: int, readout: Any, contexts: Contexts, found: Found, ledger: Ledger,
        bar: Any,
    ) -> None:  # fmt: skip
        name = contexts.names[contexts.label][value]
        site = self._site(layer, contexts.data.source)
        toward = contexts.toward(value) if self.select == "output" else None
        selection, control = layer.choose(contexts.label, value, self.candidates, self.seed, toward)
        make = self._edit(layer, contexts, value)
        rows = layer.x[:SPREAD_ROWS]
        if layer is main:
            one = experiment(
                selection, make, readout, control, site=site, strengths=self.strengths, rows=rows, n_boot=self.n_boot,
                beside=layer.directions(contexts.label, value, selection), seed=self.seed, ledger=ledger,
                context=f"{contexts.label}={name}", tick=bar.update,
            )  # fmt: skip
            found.experiments.append(one)
            found.layers.setdefault(layer.name, []).append(one.arms[SELECTED].curve)
            labels = layer.held_out.labels()[contexts.label]
            found.confounders.append(confounded(layer.held_out, int(one.arms[SELECTED].chosen), labels, value))
            bar.set_postfix(score=f"{one.score(SELECTED).mean:.2f}")
            return
        best, top = None, -1.0
        chosen = ~halves(readout.groups, self.seed)
        for i in selection.ids.tolist():
            curve = sweep(
                site, lambda strength, i=i: make(i, strength), self.strengths, readout, None, [i], ledger,  # type: ignore
                f"{layer.name} {i}", f"{contexts.label}={name}", bar.update,
            )  # fmt: skip
            if curve.scores(chosen).max() > top:
                best, top = curve, float(curve.scores(chosen).max())
        assert best is not None
        found.layers.setdefault(layer.name, []).append(best)

    def _confused(self, layer: Layer, contexts: Contexts, found: Found) -> None:
        if len(self.values) < 2:
            return
        labels = layer.held_out.labels()[contexts.label]
        among = np.full_like(labels, -1)
        for place, value in enumerate(self.values):
            among[labels == value] = place
        found.matrix = confusion(layer.held_out, [int(e.arms[SELECTED].chosen) for e in found.experiments], among)

    def _judged(self, layer: Layer, contexts: Contexts, found: Found, judge: Judge) -> None:
        site = self._site(layer, contexts.data.source)
        for value, one in zip(self.values, found.experiments, strict=True):
            readout = contexts.readout(value)
            assert isinstance(readout, ContinuationReadout)
            told = ", ".join(contexts.telling(contexts.label, value))
            for name, arm in one.arms.items():
                edits = arm.make(arm.strength) if arm.strength else None
                with nullcontext() if edits is None else site.steered(edits):
                    begun, texts = readout.texts(one.held_out)
                found.judged.setdefault(name, []).append(axbench(judge, told, begun, texts))


def settings_of(bench: SteeringBench, contexts: Contexts) -> Mapping[str, Any]:
    """What the measurements depend on, for the name of a ledger."""
    return {
        "label": contexts.label, "others": contexts.others, "n": contexts.n, "edit": bench.edit,
        "select": bench.select, "seed": bench.seed,
        "where": str(bench.where), "samples": contexts.n_samples, "tokens": contexts.max_new_tokens,
        "words": contexts.words, "probe": contexts.n_probe,
    }  # fmt: skip

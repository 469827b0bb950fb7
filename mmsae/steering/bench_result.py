"""What a bench found, as numbers, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsae.results import Plot, Result, Table
from mmsae.steering.dose import DoseResponse, Interval, resamples
from mmsae.steering.experiment import CONTROL, SELECTED, Experiment
from mmsae.steering.fragility import diagonal_mass
from mmsae.steering.targets import Contexts, Layer

if TYPE_CHECKING:
    from mmsae.steering.bench import Found, SteeringBench


def result_of(found: Found, bench: SteeringBench, contexts: Contexts, layers: Sequence[Layer]) -> Result:
    """The result of a bench.

    Args:
        found: What was measured.
        bench: With these settings.
        contexts: In these contexts.
        layers: Of these dictionaries.
    """
    arms = list(found.experiments[0].arms)
    scores = {arm: together(found.experiments, arm, bench.n_boot, bench.seed) for arm in arms}
    gap = difference(found.experiments, bench.n_boot, bench.seed)
    means = {arm: {what: _mean(found.experiments, arm, what) for what in WHATS} for arm in arms}
    best = scores[SELECTED]
    label = contexts.label
    numbers = {f"{arm}/{what}": value for arm in arms for what, value in means[arm].items()}
    for arm in arms:
        numbers |= {f"{arm}/score": scores[arm].mean, f"{arm}/low": scores[arm].low, f"{arm}/high": scores[arm].high}
    numbers |= {"difference": gap.mean, "difference/low": gap.low, "difference/high": gap.high}
    tables = [_arms(arms, scores, means, gap), _values(found, label), _fragility(found, label)]
    if len(found.layers) > 1:
        tables.append(_layers(found))
    if found.judged:
        tables.append(_judged(found))
        numbers |= {f"{arm}/judge": float(np.mean([r["overall"].mean() for r in of])) for arm, of in
                    found.judged.items()}  # fmt: skip
    tables.append(_examples(found, label))
    if found.matrix is not None:
        numbers["diagonal_mass"] = diagonal_mass(found.matrix)
    return Result(
        name=f"Steering-{label}",
        title=f"steering {label} succeeds in {means[SELECTED]['success']:.0%} of contexts, a random latent in "
        f"{means[CONTROL]['success']:.0%}",
        numbers={name: value for name, value in numbers.items() if np.isfinite(value)},
        tables=tables,
        plots=_plots(found, arms, scores, label),
        settings={
            "contexts": contexts.n, "measured in": int(found.experiments[0].held_out.sum()),
            "candidates": bench.candidates, "edit": bench.edit, "select": bench.select, "seed": bench.seed,
            "layer": layers[0].name, "others": ", ".join(contexts.others),
            "headline": [{"label": f"steering score ({label})", "value": f"{best.mean:.2f}",
                          "note": f"random latent: {scores[CONTROL].mean:.2f}"}],
        },
    )  # fmt: skip


WHATS = ("success", "effect", "damage", "changed")


def together(experiments: Sequence[Experiment], arm: str, n: int, seed: int) -> Interval:
    """Mean score of an arm over values, with its bootstrap over the groups of each."""
    drawn, means = [], []
    for i, one in enumerate(experiments):
        found = one.arms[arm]
        weights = resamples(found.curve.groups[one.held_out], n, seed + i)
        drawn.append(found.curve.resampled(found.best, weights, one.held_out))
        means.append(found.curve.scores(one.held_out)[found.best])
    low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975))
    return Interval(float(np.mean(means)), float(low), float(high))


def difference(experiments: Sequence[Experiment], n: int, seed: int) -> Interval:
    """Mean over values of the score of the selection less that of the control."""
    drawn, means = [], []
    for i, one in enumerate(experiments):
        ours, theirs = one.arms[SELECTED], one.arms[CONTROL]
        weights = resamples(ours.curve.groups[one.held_out], n, seed + i)
        drawn.append(
            ours.curve.resampled(ours.best, weights, one.held_out)
            - theirs.curve.resampled(theirs.best, weights, one.held_out)
        )
        means.append(one.difference.mean)
    low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975))
    return Interval(float(np.mean(means)), float(low), float(high))


def _mean(experiments: Sequence[Experiment], arm: str, what: str) -> float:
    values = [getattr(e.arms[arm].curve, what)[e.arms[arm].best, e.held_out] for e in experiments]
    return float(np.mean([v.mean() for v in values]))


def _none(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _range(found: Interval) -> str:
    return f"{found.low:.2f} to {found.high:.2f}"


def _arms(arms: list[str], scores: dict[str, Interval], means: dict[str, Any], gap: Interval) -> Table:
    rows: list[list[Any]] = [
        [
            arm,
            *(_none(means[arm][what]) for what in WHATS),
            scores[arm].mean,
            _range(scores[arm]),
        ]
        for arm in arms
    ]
    rows.append(["difference", None, None, None, None, gap.mean, _range(gap)])
    headings = ["", "success ↑", "effect ↑", "damage ↓", "changed ↓", "score ↑", "95 %"]
    return Table("Steering at the best strength, mean over values, in contexts held out", headings, rows)


def _values(found: Found, label: str) -> Table:
    rows: list[list[Any]] = []
    for name, one in zip(found.names, found.experiments, strict=True):
        arm, held = one.arms[SELECTED], one.held_out
        rows.append([
            name, str(arm.chosen), arm.strength, float(arm.curve.success[0, held].mean()),
            *(_none(one.mean(SELECTED, w).mean) for w in ("success", "damage", "changed")),
            one.score(SELECTED).mean, _range(one.difference),
        ])  # fmt: skip
    headings = [
        label, "latent", "at", "before", "success ↑", "damage ↓", "changed ↓", "score ↑", "over control",
    ]  # fmt: skip
    return Table("Success against collateral change, value by value", headings, rows)


def _fragility(found: Found, label: str) -> Table:
    rows: list[list[Any]] = []
    for i, (name, one, near) in enumerate(zip(found.names, found.experiments, found.confounders, strict=True)):
        arm = one.arms[SELECTED]
        window = arm.curve.window(chosen=one.held_out)
        diagonal = None if found.matrix is None else float(found.matrix[i, i])
        misses = ", ".join(found.all_names[m] for m in near.misses)
        rows.append([
            name, f"{'' if window.closed else '≥ '}{window.octaves:.1f}", _none(arm.curve.variation(arm.best)),
            arm.curve.spread[arm.best], near.auroc, near.near, misses, diagonal,
        ])  # fmt: skip
    headings = [label, "octaves ↑", "variation ↓", "spread ↓", "AUROC ↑", "near ↑", "near miss", "own share ↑"]
    chance = "" if found.matrix is None else f", own share by chance {1 / len(found.names):.2f}"
    n = len(found.experiments[0].held_out)
    return Table(f"Fragility: usable window, {n} contexts, near misses and neighbours{chance}", headings, rows)


def _layers(found: Found) -> Table:
    strengths = found.experiments[0].arms[SELECTED].curve.strengths
    rows: list[list[Any]] = []
    for name, curves in found.layers.items():
        mean = np.mean([c.scores() for c in curves], 0)
        octaves = np.mean([c.window().octaves for c in curves])
        rows.append([name, *(float(v) for v in mean), float(octaves)])
    return Table("Score by layer and strength", ["layer", *(f"{a:g}" for a in strengths), "window (octaves)"], rows)


def _judged(found: Found) -> Table:
    rows: list[list[Any]] = [
        [
            arm,
            *(
                float(np.mean([r[what].mean() for r in of]))
                for what in ("concept", "instruction", "fluency", "overall")
            ),
        ]
        for arm, of in found.judged.items()
    ]
    return Table("Ratings of a judge, 0 to 2", ["", "concept ↑", "instruction ↑", "fluency ↑", "overall ↑"], rows)


def _examples(found: Found, label: str) -> Table:
    rows: list[list[Any]] = []
    for name, one in zip(found.names, found.experiments, strict=True):
        curve = one.arms[SELECTED].curve
        for place in (0, one.arms[SELECTED].best):
            rows.append([name, curve.strengths[place], " | ".join(curve.shown[place][:3])])
    return Table("Examples", [label, "strength", "answers"], rows)


def _plots(found: Found, arms: list[str], scores: dict[str, Interval], label: str) -> list[Plot]:
    strengths = found.experiments[0].arms[SELECTED].curve.strengths

    def mean(arm: str, what: str) -> list[float]:
        curves = [(one.arms[arm].curve, one.held_out) for one in found.experiments]
        if what == "score":
            return [float(v) for v in np.mean([c.scores(h) for c, h in curves], 0)]
        return [float(v) for v in np.mean([getattr(c, what)[:, h].mean(1) for c, h in curves], 0)]

    def lines(what: str) -> list[dict[str, Any]]:
        return [{"label": arm, "x": strengths[1:], "y": mean(arm, what)[1:]} for arm in arms]

    best = strengths[int(np.argmax(mean(SELECTED, "score")))]
    unit = "strength (99th percentiles of the latent)"
    plots = [
        Plot(f"{label}: the score is best at a strength of {best:g}", unit, "score", lines("score"), log="x"),
        Plot(
            f"{label}: success by strength",
            unit,
            "success, share of contexts",
            lines("success"),
            log="x",
        ),
        Plot(f"{label}: damage by strength", unit, "damage, nats", lines("damage"), log="x"),
    ]
    if np.isfinite(mean(SELECTED, "changed")).all():
        pairs = [{"label": arm, "x": mean(arm, "changed"), "y": mean(arm, "success")} for arm in arms]
        plots.append(Plot(f"{label}: success against collateral change, strength by strength",
                          "other decisions changed, share", "success, share of contexts", pairs))  # fmt: skip
    if len(found.layers) > 1:
        rows = [
            {"label": name.rpartition("layers.")[2] or name, "x": [f"{a:g}" for a in strengths],
             "y": [float(v) for v in np.mean([c.scores() for c in curves], 0)]}
            for name, curves in found.layers.items()
        ]  # fmt: skip
        plots.append(Plot(f"{label}: score by layer and strength", unit, "layer", rows, kind="heat"))
    if found.matrix is not None:
        cells = [{"label": name, "x": found.names, "y": [float(v) for v in row]} for name, row in
                 zip(found.names, found.matrix, strict=True)]  # fmt: skip
        title = f"{label}: latents are {diagonal_mass(found.matrix):.0%} active for their own value"
        plots.append(Plot(title, "value of the sample", "latent chosen for", cells, kind="heat"))
    return plots


def curve_table(curve: DoseResponse, title: str) -> Table:
    """One curve, strength by strength."""
    rows: list[list[Any]] = [
        [a, *(_none(float(getattr(curve, w)[i].mean())) for w in WHATS), curve.spread[i], float(curve.scores()[i])]
        for i, a in enumerate(curve.strengths)
    ]
    return Table(title, ["strength", "success", "effect", "damage", "collateral", "spread", "score"], rows)

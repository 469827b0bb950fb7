"""Do concepts raise zero-shot accuracy? `score = cos(x, t) + alpha cos(h(x), h(t))` on held-out scenes and sounds.

    python recipes/zero_shot_concepts.py --out runs/compare_cross_modal --seeds 0 1 2

The scenes once more with noise in the pictures, which the miniature CLIP was not trained on. alpha is chosen for each
factor on the validation split and scored on the test split, for VL-SAE, group-sparse autoencoders and TopK of
`compare_cross_modal.py`, and for a random dictionary and principal components as controls.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from compare_cross_modal import CONTENDERS, Settings, scaled, shown_to, train
from paired_worlds import factors, noised, pairs, source
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.analyses.cross_modal_measures import random_coder
from mmsae.analyses.per_stream import StreamCoder
from mmsae.analyses.zero_shot_concepts import Decided, components, decide
from mmsae.files import write_atomic
from mmsae.miniatures import captions, sounds

NAMES = ("VLSAE", "GSAE", "GSAE, price .05", "TopK")
CONTROLS = ("random", "PCA")


@lru_cache
def prompts(world: str) -> dict[str, Tensor]:
    """A prompt for each value of each factor, as it is projected."""
    of = captions.zero_shot_prompts if world == "scenes" else sounds.zero_shot_prompts
    it = source(world)
    return {factor: it.embed_texts(of(factor)).float() for factor in factors(world)}


@lru_cache
def coder_for(world: str, name: str, seed: int, settings: Settings, folder: Path) -> StreamCoder:
    """One dictionary, trained once for clean and for noised pictures."""
    held = pairs(world, seed, folder, settings.sizes)
    if name in CONTENDERS:
        return train(CONTENDERS[name], held["train"], settings, seed)
    learnt = shown_to(CONTENDERS["TopK"], held["train"])
    if name == "PCA":
        return components(learnt, settings.k)
    width = next(iter(learnt.acts.values())).shape[1]
    return random_coder(width, settings.d_latent, settings.k, learnt, 777 + seed)


def decided(world: str, name: str, seed: int, settings: Settings, folder: Path) -> dict[str, Decided]:
    """Decisions of one dictionary on every factor."""
    world, _, noise = world.partition(" with noise of ")
    held = pairs(world, seed, folder, settings.sizes)
    held = noised(held, seed, folder, float(noise)) if noise else held
    contender = CONTENDERS.get(name, CONTENDERS["TopK"])
    val, test = (shown_to(contender, held[split]) for split in ("val", "test"))
    stream, coder = next(iter(val.acts)), coder_for(world, name, seed, settings, folder)
    texts = prompts(world)
    if contender.unit:
        texts = {factor: normalize(x, dim=-1) for factor, x in texts.items()}
    else:  # the codes of VL-SAE do not depend on the length
        texts = {factor: scaled({"text": x})["text"] for factor, x in texts.items()}
    return {
        factor: decide(coder, val.acts[stream], test.acts[stream], x, val.labels[factor], test.labels[factor], stream)
        for factor, x in texts.items()
    }


def row(name: str, found: list[dict[str, Decided]], factor: str | None) -> str:
    """One line of the table: means over the seeds; the interval is of the mean gain over all inputs of all seeds."""
    chosen = [[d for f, d in one.items() if factor in (None, f)] for one in found]
    base = np.mean([[d.base.mean() for d in one] for one in chosen])
    ours = np.mean([[d.with_concepts.mean() for d in one] for one in chosen])
    alone = np.mean([[d.alone.mean() for d in one] for one in chosen])
    gains = np.concatenate([np.mean([d.with_concepts.astype(float) - d.base for d in one], axis=0) for one in chosen])
    half = 1.96 * gains.std() / math.sqrt(len(gains))
    each = [100 * np.mean([d.with_concepts.mean() - d.base.mean() for d in one]) for one in chosen]
    by_seed = ", ".join(f"{gain:+.2f}" for gain in each)
    alphas = ", ".join(f"{d.alpha:g}" for one in chosen for d in one) if factor else ""
    return (
        f"| {name} | {base:.4f} | {ours:.4f} | {100 * (ours - base):+.2f} ± {100 * half:.2f} | {by_seed} | {alphas} | "
        f"{alone:.4f} |"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/compare_cross_modal")
    parser.add_argument("--worlds", nargs="+", default=["scenes", "scenes with noise of 40", "sounds"])
    parser.add_argument("--names", nargs="+", default=list(NAMES), choices=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=128)
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    settings = Settings(given.steps, given.batch_size, 1e-3, 512, 16, 0.005, None)
    lines: list[str] = []
    for world in given.worlds:
        found = {
            name: [decided(world, name, seed, settings, Path(given.out) / "data") for seed in given.seeds]
            for name in (*given.names, *CONTROLS)
        }
        hardest = min(found["random"][0], key=lambda f: np.mean([one[f].base.mean() for one in found["random"]]))
        for title, factor in ((f"{world}, mean over the factors", None), (f"{world}, {hardest}", hardest)):
            head = "embeddings | with concepts ↑ | gain, points (95 %) | by seed | alpha | codes alone"
            lines += [f"### {title.capitalize()}", "", f"| | {head} |", "|---|---:|---:|---:|---|---|---:|"]
            lines += [row(name, found[name], factor) for name in found]
            lines.append("")
        write_atomic(Path(given.out) / "zero_shot.md", "\n".join(lines).encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Paired embeddings with known factors: scenes with captions and sounds with captions, through the miniatures.

python recipes/paired_worlds.py --out runs/compare_cross_modal --seeds 0 1 2     # made once, kept in safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import normalize

from datamodules import Scenes, Sounds
from mmsae.errors import MmsaeError
from mmsae.files import write_atomic
from mmsae.miniatures import captions, sounds
from mmsae.miniatures.scenes import Scenes as SceneSet
from mmsae.sources import CLAP, PairedEmbeddings, SceneCLIP
from mmsae.spec import ACTS

SPLITS = ("train", "val", "test")
SIZES = {"scenes": (4000, 800, 800), "sounds": (3000, 800, 800)}
STREAMS = {"scenes": ("image", "text"), "sounds": ("audio", "text")}


class Pairs(NamedTuple):
    """Pairs of one split.

    Attributes:
        acts: Stream to embeddings as they are projected, `[n, width]`; a row of each belongs to the same pair.
        labels: Factor to the index of its value, `[n]`.
        stated: Factor to whether the caption says it, bool `[n]`.
    """

    acts: dict[str, Tensor]
    labels: dict[str, np.ndarray]
    stated: dict[str, np.ndarray]

    def unit(self) -> dict[str, Tensor]:
        """The embeddings at length 1, as the models compare them."""
        return {name: normalize(x, dim=-1) for name, x in self.acts.items()}


def source(world: str) -> PairedEmbeddings:
    """The miniature of a world, both towers."""
    if world == "scenes":
        return PairedEmbeddings(SceneCLIP(["visual"], device="cpu"))
    return PairedEmbeddings(CLAP("miniature:clap", ["audio_model.audio_encoder.norm"], device="cpu"))


def factors(world: str) -> dict[str, tuple[str, ...]]:
    """The values of each factor."""
    return captions.FACTORS if world == "scenes" else sounds.FACTORS


def datamodule(world: str, seed: int, sizes: tuple[int, int, int] | None = None) -> Scenes | Sounds:
    """Scenes or sounds of a seed; seed 0 of scenes are those that the miniature CLIP was trained on, see the docs."""
    train, val, test = sizes or SIZES[world]
    given: dict[str, Any] = {"n_train": train, "n_val": val, "n_test": test, "source": source(world)}
    return Scenes(scene_seed=seed, **given) if world == "scenes" else Sounds(sound_seed=seed, **given)


def pairs(world: str, seed: int, folder: Path, sizes: tuple[int, int, int] | None = None) -> dict[str, Pairs]:
    """The pairs of every split; embedded when they are not on disk."""
    if world not in SIZES:
        raise MmsaeError(f"there is no world {world!r}; there are {', '.join(SIZES)}.")
    path = folder / f"{world}_{seed}_{'_'.join(map(str, sizes or SIZES[world]))}.safetensors"
    if not path.exists():
        write_atomic(path, save(_embedded(datamodule(world, seed, sizes), world)))
    held = load_file(path)

    def part(split: str) -> Pairs:
        own = {key.removeprefix(f"{split}."): value for key, value in held.items() if key.startswith(f"{split}.")}
        return Pairs(
            {name: own[f"acts.{name}"] for name in STREAMS[world]},
            {name: own[f"label.{name}"].numpy() for name in factors(world)},
            {name: own[f"stated.{name}"].numpy() for name in factors(world)},
        )

    return {split: part(split) for split in SPLITS}


def noised(held: dict[str, Pairs], seed: int, folder: Path, level: float) -> dict[str, Pairs]:
    """Scenes whose validation and test pictures have Gaussian noise of so many grey levels; kept on disk."""
    path = folder / f"scenes_{seed}_noise_{level:g}_{len(held['test'].acts['image'])}.safetensors"
    if not path.exists():
        rng, it, found = np.random.default_rng(seed), source("scenes").inner, {}
        for split in ("val", "test"):
            data = SceneSet(split, len(held[split].acts["image"]), seed)  # type: ignore[arg-type]
            parts = []
            for start in range(0, len(data), 50):
                items = [data[i] for i in range(start, min(start + 50, len(data)))]
                for item in items:
                    pixels = np.asarray(item["image"], np.float32)
                    pixels = pixels + level * rng.standard_normal(pixels.shape)
                    item["image"] = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                parts.append(it.forward(it.collate(items)).detach())
            found[split] = torch.cat(parts)
        write_atomic(path, save(found))
    acts = load_file(path)
    return {
        split: one._replace(acts={**one.acts, "image": acts[split]}) if split in acts else one
        for split, one in held.items()
    }


def _embedded(data: Scenes | Sounds, world: str) -> dict[str, Tensor]:
    mentions: Callable[[str], dict[str, int]] = captions.mentions if world == "scenes" else sounds.mentions
    found: dict[str, Tensor] = {}
    for split in SPLITS:
        rows = list(data.rows(split))  # type: ignore[arg-type]
        for name in STREAMS[world]:
            found[f"{split}.acts.{name}"] = torch.cat([batch[ACTS][name] for batch in rows])
        said = [mentions(text) for text in data.items(split).captions()]  # type: ignore[arg-type, attr-defined]
        for name in factors(world):
            found[f"{split}.label.{name}"] = torch.cat([batch[f"label.{name}"] for batch in rows])
            found[f"{split}.stated.{name}"] = torch.tensor([name in facts for facts in said])
    return found


def main() -> None:
    """Embed what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/compare_cross_modal")
    parser.add_argument("--worlds", nargs="+", default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    for seed in given.seeds:
        for world in given.worlds:
            pairs(world, seed, Path(given.out) / "data")


if __name__ == "__main__":
    main()

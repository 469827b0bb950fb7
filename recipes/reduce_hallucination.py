"""Does a multimodal model speak less of what is not there when its words agree with the picture's concepts?

    python recipes/reduce_hallucination.py --out runs/hallucination --seeds 0 1 2                   # on the miniature
    python recipes/reduce_hallucination.py --out runs/pope --run RUN --images val2014 \\
        --questions coco_pope_random.json coco_pope_popular.json coco_pope_adversarial.json
    python recipes/reduce_hallucination.py --out runs/chair --run RUN --images val2014 --alpha 0.7 \\
        --instances instances_val2014.json --captions captions_val2014.json --synonyms synonyms.txt

VL-SAE's correction (arXiv 2510.21323), measured. RUN is a run of VLSAE on PooledModalities, as
`llava_1_5_7b_vlsae.yaml` makes it. Without it, dictionaries are trained on scenes with captions through the miniature
LLaVA, and it is asked about new scenes: yes-or-no questions, half of them for what is not there, and captions, on clean
and on noised pictures. Beside the correction stand the model alone, the correction without the picture's concepts (beta
0), with those of another picture, and with a dictionary whose encoder is random, and contrastive decoding with a noised
picture. Finished ways are kept; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import mmsae.artifact
from datamodules import Scenes
from mmsae.cli.run import datamodule_of
from mmsae.cores import VLSAE, AlignmentAutoencoder, SAECore
from mmsae.errors import MmsaeError
from mmsae.files import write_atomic
from mmsae.metrics.coco_objects import CocoObjects, file_names
from mmsae.metrics.hallucination import chair, polling, read_polling, says_yes
from mmsae.miniatures.captions import FACTORS, mentions
from mmsae.miniatures.questions import SceneQuestions
from mmsae.sources import PooledModalities, VisionLanguage
from mmsae.spec import ACTS, ActivationSpec
from mmsae.steering.answers import answers
from mmsae.steering.concept_alignment import ConceptAlignment
from mmsae.steering.second_pass import NoisedContrast, SecondPass
from mmsae.training.module import SAEModule

POINT = "model.language_model.layers.2"
Ways = dict[str, SecondPass | None]


class Mistaken(ConceptAlignment):
    """The concepts of the next picture of the batch instead of its own."""

    def corrected(self, image: Tensor, text: Tensor) -> Tensor:
        """As with the right ones."""
        return super().corrected(image.roll(1, 0), text)


# ---- dictionaries on the miniature


def dictionaries(source: PooledModalities, seed: int, n_train: int, steps: int, folder: Path) -> dict[str, SAECore]:
    """VL-SAE behind its alignment autoencoder, and one whose encoder stays random; trained if they are not on disk."""
    spec, kept = source.spec, {name: folder / f"{name}_{seed}" for name in ("VLSAE", "random")}
    if not all((path / "config.json").exists() for path in kept.values()):
        data = Scenes(n_train=n_train, n_val=1, n_test=1, scene_seed=100 + seed, source=source)
        rows = list(data.rows("train"))
        acts = {name: torch.cat([batch[ACTS][name] for batch in rows]).float() for name in spec.streams}
        aligned = _fit(lambda s: AlignmentAutoencoder(s, 128), spec, acts, steps, seed, None)
        mmsae.artifact.save(aligned, folder / f"alignment_{seed}")
        for name, path in kept.items():
            made = partial(_vlsae, frozen=name == "random")
            mmsae.artifact.save(_fit(made, spec, acts, steps, seed, str(folder / f"alignment_{seed}")), path)
    return {name: mmsae.artifact.load(path) for name, path in kept.items()}


def _vlsae(spec: ActivationSpec, frozen: bool) -> VLSAE:
    core = VLSAE(spec, 1024, k=32, aligned=128)
    for table in core.encoders:
        table.requires_grad_(not frozen)
    return core


def _fit(
    make: Callable[[ActivationSpec], SAECore],
    spec: ActivationSpec,
    acts: dict[str, Tensor],
    steps: int,
    seed: int,
    alignment: str | None,
) -> SAECore:
    torch.manual_seed(seed)
    rows = TensorDataset(*acts.values())

    def batch(items: list[tuple[Tensor, ...]]) -> dict[str, Any]:
        return {ACTS: dict(zip(acts, map(torch.stack, zip(*items, strict=True)), strict=True))}

    loader = DataLoader(dataset=rows, batch_size=min(256, len(rows)), shuffle=True, drop_last=True, collate_fn=batch)
    module = SAEModule(
        make(spec), normalise="none", gradient_clip=0.0, sample_rows=len(rows), lr_warmup_steps=max(1, steps // 20),
        optimizer=partial(torch.optim.Adam, lr=1e-3), alignment=alignment,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module.export()


# ---- what is asked


def scenes(kind: str, n: int, seed: int, noise: float, asked: str | None = None) -> list[dict[str, Any]]:
    """Questions about scenes of the test split, the pictures with Gaussian noise of so many grey levels.

    Args:
        kind: "questions" or "captions".
        n: How many.
        seed: Of scenes, questions and noise.
        noise: Grey levels.
        asked: Only questions for this factor.
    """
    only = None if asked is None or kind == "captions" else list(FACTORS).index(asked)
    many = n if only is None else 12 * n
    questions = SceneQuestions("test", many, 1, "caption" if kind == "captions" else "yes or no", seed=seed)
    chosen = [i for i in range(many) if only is None or questions.asked(i)["labels"]["asked"] == only][:n]
    rng = np.random.default_rng(seed)
    items = [questions[i] for i in chosen]
    if noise:
        for item in items:
            pixels = np.asarray(item["image"], np.float32)
            noised = (pixels + noise * rng.standard_normal(pixels.shape)).clip(0, 255).astype(np.uint8)
            item["image"] = Image.fromarray(noised)
    return items


def asked_of_scenes(
    source: VisionLanguage, way: SecondPass | None, kind: str, items: list[dict[str, Any]], cache: bool
) -> dict[str, float]:
    """The measures of one way; a noised picture has no keys and values in common with the clean one."""
    cache = cache and not isinstance(way, NoisedContrast)
    if kind == "captions":
        said = answers(source, items, 22, way, use_cache=cache)
        stated = [[f"{factor} {value}" for factor, value in mentions(text).items()] for text in said]
        present = [[f"{factor} {item['labels'][factor]}" for factor in FACTORS] for item in items]
        return chair(stated, present)._asdict()
    said = answers(source, items, 4, way, use_cache=cache)
    truth = [item["labels"]["answer"] == 1 for item in items]
    found = polling([says_yes(text) for text in said], truth)._asdict()
    for number, factor in enumerate(FACTORS):
        own = [i for i, item in enumerate(items) if item["labels"]["asked"] == number]
        if own:
            part = polling([says_yes(said[i]) for i in own], [truth[i] for i in own])
            found |= {f"{factor}/accuracy": part.accuracy, f"{factor}/false_presence": part.false_presence}
    return found


def ways_of(source: PooledModalities, cores: dict[str, SAECore], given: argparse.Namespace) -> Ways:
    """What is compared."""
    own = {"alpha": given.alpha, "c": given.c, "b": given.b}
    ways: Ways = {"the model alone": None}
    core = cores["VLSAE"]
    ways["concepts"] = ConceptAlignment(source, core, beta=given.beta, **own)
    ways["concepts, error kept"] = ConceptAlignment(source, core, beta=given.beta, keep_error=True, **own)
    ways["concepts, all plausible"] = ConceptAlignment(source, core, beta=given.beta, **{**own, "b": 0.1})
    ways["without the picture's concepts"] = ConceptAlignment(source, core, beta=0.0, **own)
    ways["another picture's concepts"] = Mistaken(source, core, beta=given.beta, **own)
    ways["another picture's, error kept"] = Mistaken(source, core, beta=given.beta, keep_error=True, **own)
    if "random" in cores:
        ways["random encoder"] = ConceptAlignment(source, cores["random"], beta=given.beta, **own)
    ways["contrast with a noised picture"] = NoisedContrast(source.model)
    return ways


# ---- annotation files


def asked_of_files(
    source: VisionLanguage, way: SecondPass | None, given: argparse.Namespace, name: str
) -> dict[str, float]:
    """POPE on one file of questions, or CHAIR on the pictures of an annotation file."""
    images = Path(given.images)
    if name != "chair":
        questions = read_polling(name)[: given.n]
        items = [
            {"image": str(images / q.image), "sample_id": i, "messages": [_message(f"{q.text} {given.suffix}".strip())]}
            for i, q in enumerate(questions)
        ]
        said = answers(source, items, 16, way, given.batch, use_cache=False)
        return polling([says_yes(text) for text in said], [q.present for q in questions])._asdict()
    objects = CocoObjects(given.synonyms)
    present = objects.present(given.instances, given.captions)
    files = file_names(given.instances)
    ids = sorted(files)[: given.n]
    asked = {"messages": [_message("Please describe this image in detail.")]}
    items = [{**asked, "image": str(images / files[i]), "sample_id": i} for i in ids]
    said = answers(source, items, 512, way, given.batch, use_cache=True)
    return chair([objects.stated(text) for text in said], [present[i] for i in ids])._asdict()


def _message(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


# ---- the run


def measure(given: argparse.Namespace, out: Path) -> dict[str, dict[str, float]]:
    """Every way on everything that is asked; kept as soon as it is there."""
    path, held = out / "results.json", {}
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "seeds", "ways")}
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["settings"] != settings:
            raise MmsaeError(f"{path} holds results of other settings ({stored['settings']}): give another --out.")
        held = stored["results"]

    def keep(key: str, make: Callable[[], dict[str, float]]) -> None:
        if key not in held:
            held[key] = make()
            write_atomic(path, json.dumps({"settings": settings, "results": held}, indent=1).encode())
            shown = {name: value for name, value in held[key].items() if "/" not in name and name != "n"}
            print(f"{key}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown.items()), flush=True)

    def chosen(ways: Ways) -> Ways:
        return {name: way for name, way in ways.items() if given.ways is None or name in given.ways}

    if given.run is not None:
        source = datamodule_of(Path(given.run)).source
        if not isinstance(source, PooledModalities):
            raise MmsaeError(f"{given.run} is no run on PooledModalities: train llava_1_5_7b_vlsae.yaml or its like.")
        ways = chosen(ways_of(source, {"VLSAE": mmsae.artifact.load(given.run)}, given))
        for name in [*given.questions, *(["chair"] if given.instances else [])]:
            for way, processor in ways.items():
                keep(f"{Path(name).stem}/{way}", lambda p=processor, n=name: asked_of_files(source.inner, p, given, n))
        return held
    source = PooledModalities(VisionLanguage(given.model, [POINT], device="cpu"))
    for seed in given.seeds:
        ways = chosen(ways_of(source, dictionaries(source, seed, given.n_train, given.steps, out / "sae"), given))
        for kind, noise in product(("questions", "captions"), (0.0, given.noise)):
            items = scenes(kind, given.n if kind == "questions" else given.n_captions, seed, noise, given.asked)
            for way, processor in ways.items():
                key = f"{kind}{', noised' if noise else ''}/{way}/{seed}"
                keep(key, lambda k=kind, i=items, p=processor: asked_of_scenes(source.inner, p, k, i, given.cache))
    return held


def table(held: dict[str, dict[str, float]]) -> str:
    """Means over the seeds, a table for each thing that is asked."""
    lines: list[str] = []
    parts = list(dict.fromkeys(key.split("/")[0] for key in held))
    for part in parts:
        own = {key: figures for key, figures in held.items() if key.split("/")[0] == part}
        names = [name for name in next(iter(own.values())) if name != "n" and "/" not in name]
        lines += [f"### {part.capitalize()}", "", "| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
        for way in dict.fromkeys(key.split("/")[1] for key in own):
            rows = [figures for key, figures in own.items() if key.split("/")[1] == way]
            cells = []
            for name in names:
                values = [row[name] for row in rows]
                spread = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.3f}{spread}")
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/hallucination")
    parser.add_argument("--run", help="run of VLSAE on PooledModalities; without it the miniature is used")
    parser.add_argument("--images", help="folder of the pictures")
    parser.add_argument("--questions", nargs="*", default=[], help="files of POPE")
    parser.add_argument("--suffix", default="Please answer this question with one word.", help="after each question")
    parser.add_argument("--instances", help="COCO's instances_*.json, for CHAIR")
    parser.add_argument("--captions", help="COCO's captions_*.json")
    parser.add_argument("--synonyms", help="the list of synonyms of CHAIR")
    parser.add_argument("--ways", nargs="*", help="only these")
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--beta", type=float, default=0.9)
    parser.add_argument("--c", type=float, default=0.6)
    parser.add_argument("--b", type=float, default=0.8)
    parser.add_argument("--n", type=int, default=300, help="questions")
    parser.add_argument("--asked", choices=list(FACTORS), help="only questions about scenes for this factor")
    parser.add_argument("--n_captions", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cache", action="store_true", help="keep keys and values between steps")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="miniature:lmm")
    parser.add_argument("--noise", type=float, default=40.0, help="grey levels")
    parser.add_argument("--n_train", type=int, default=2000, help="scenes that dictionaries are trained on")
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args(arguments)
    if given.run is not None and not given.images:
        raise MmsaeError("annotation files name pictures: give --images, their folder.")
    if given.run is not None and not (given.questions or given.instances):
        raise MmsaeError("there is nothing to ask: give --questions (POPE) or --instances and --synonyms (CHAIR).")
    if given.instances and not given.synonyms:
        raise MmsaeError("CHAIR needs --synonyms, its list of objects and their synonyms.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    out = Path(given.out)
    text = table(measure(given, out))
    write_atomic(out / "table.md", text.encode())
    print(text)


if __name__ == "__main__":
    try:
        main()
    except MmsaeError as error:
        raise SystemExit(f"Error: {error}") from None

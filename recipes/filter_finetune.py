"""Does SAE-V's filter make better fine-tuning data? Tried on the miniature LLaVA, offline (arXiv 2502.17514).

    python recipes/filter_finetune.py --out runs/filter --seed 0 --threads 1

Conversations about scenes (a caption, a question) are written as a JSONL file with pictures; half of them are given the
picture of another one. A dictionary is trained on the model's residual stream over all of them, `mmsae filter` ranks
them by each score and keeps half, and the model is fine-tuned on what was kept, on random halves, on all and on the
half that was not spoilt, with the same number of steps each. It is then asked about held-out scenes. Interrupt it at
will: the same command goes on with what is missing.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from train_lmm import Pictures, adamw, answered, answers, coded, open_accuracy, padded, predicted
from train_scene_clip import schedule, write  # of this folder

from mmsae.cli.main import main
from mmsae.cli.scoring import COLUMNS, COUNTS
from mmsae.errors import MmsaeError, checked
from mmsae.metrics.recovery import auroc
from mmsae.miniatures.captions import FACTORS
from mmsae.miniatures.questions import SceneQuestions
from mmsae.sources.weights import located

RECIPES = Path(__file__).parent
RANKED = tuple(name for name in COLUMNS if name not in COUNTS)
LOSS = "loss"


def run(
    out: str,
    seed: int = 0,
    n: int = 1000,
    model: str = "miniature:lmm",
    hook_point: str = "model.language_model.layers.0:input",
    dictionary_steps: int = 200,
    keep: float = 0.5,
    scores: list[str] = ["cosine_co", "association"],  # noqa: B006 (the parser copies it)
    n_random: int = 2,
    steps: int = 60,
    batch_size: int = 32,
    lr: float = 1e-3,
    n_test: int = 150,
    threads: int = 1,
) -> None:
    """Spoil half of some conversations, filter them, fine-tune the miniature LLaVA on what is kept, and ask it.

    Args:
        out: Folder; each seed has one below it.
        seed: Of the scenes, of what is spoilt, of the dictionary and of the fine-tuning.
        n: Conversations.
        model: The LLaVA that is read and fine-tuned: a folder, or the miniature.
        hook_point: What the dictionary reads; by default words and patches before any of them has seen another, for
            a word that has seen the picture speaks of it, wrong or right.
        dictionary_steps: Steps of the dictionary.
        keep: Share that the filter keeps.
        scores: Scores by which the model is fine-tuned on what they keep; AUROC is given for all of them. "loss" is the
            model's own: nats per token of the answers.
        n_random: Random halves.
        steps: Steps of each fine-tuning.
        batch_size: Conversations in a step.
        lr: Highest learning rate.
        n_test: Held-out scenes that the model is asked about.
        threads: CPU threads.
    """
    for name in scores:
        if name not in (*RANKED, LOSS):
            raise MmsaeError(f"scores has {name!r}; there are {', '.join((*RANKED, LOSS))}.")
    checked("keep", keep, 0.01, 1)
    torch.set_num_threads(checked("threads", threads, 1))
    folder = Path(out) / f"seed_{seed}"
    settings = {name: value for name, value in locals().items() if name not in ("out", "folder", "threads", "name")}
    known = Known(folder / "results.json", settings)
    talks = folder / "talks.jsonl"
    spoilt = known("spoilt", lambda: spoil(folder, n, seed))
    clean = ~np.array(spoilt, bool)

    train_dictionary(folder, model, hook_point, dictionary_steps, seed, threads)
    chosen: dict[str, list[int]] = {}
    for name in dict.fromkeys([RANKED[0], *(name for name in scores if name != LOSS)]):
        kept = folder / f"kept_{name}.jsonl"
        if not kept.with_suffix(".scores.csv").is_file():
            main(["filter", f"--run={folder / 'dictionary'}", f"--path={talks}", f"--score={name}", f"--keep={keep}",
                  f"--out={kept}", f"--threads={threads}"])  # fmt: skip
        chosen[name] = [place(json.loads(line)) for line in kept.read_text().splitlines()]
    with open(folder / f"kept_{RANKED[0]}.scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    ranked = {name: np.array([float(row[name]) for row in table]) for name in RANKED}
    teacher = Teacher(model, talks, seed, n, n_test)
    ranked[LOSS] = -np.array(known("loss", teacher.losses))
    areas = {name: float(auroc(values[:, None], clean[:, None])[0, 0]) for name, values in ranked.items()}

    n_kept = max(round(keep * n), 1)
    arms = {"before fine-tuning": [], "the clean half": np.flatnonzero(clean).tolist(), "all": list(range(n))}
    for i in range(n_random):
        arms[f"random half {i + 1}"] = np.random.default_rng([seed, 1, i + 1]).permutation(n)[:n_kept].tolist()
    chosen[LOSS] = np.argsort(-ranked[LOSS], kind="stable")[:n_kept].tolist()
    arms |= {name: chosen[name] for name in scores}
    tuned = {}
    for name, own in arms.items():
        tuned[name] = known(f"arm/{name}", lambda own=own: teacher.tuned(own, steps, batch_size, lr))
    known("auroc", lambda: areas)
    known("clean", lambda: {name: float(clean[own].mean()) if own else None for name, own in arms.items()})
    show(known.found, tuned)
    print(f"results: {known.path}")


class Known:
    """Results in a file, one after the other; what is there is not computed again.

    Args:
        path: The file.
        settings: What they were made with; a file of other settings is refused.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.found = json.loads(path.read_text()) if path.is_file() else {"settings": settings}
        if {**self.found["settings"], "scores": 0} != {**settings, "scores": 0}:
            raise MmsaeError(f"{path} was made with other settings: choose another folder.")

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a name, computed and stored if it is new."""
        if name not in self.found:
            self.found[name] = compute()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write(self.path, self.found)
        return self.found[name]


# ---- the data


def spoil(folder: Path, n: int, seed: int) -> list[int]:
    """Write conversations and pictures; half of them, in a random order, get the picture of the next of that half.

    Returns:
        1 for each that was spoilt.
    """
    half = np.random.default_rng(seed).permutation(n)[: n // 2]
    picture = np.arange(n)
    picture[half] = np.roll(half, 1)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    scenes, said = talks_about("train", n, seed)
    for i in tqdm(range(n), desc="drawing"):
        scenes[i]["image"].save(folder / "pictures" / f"{i:05}.png")
        turns = [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(said[i])]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        lines.append(json.dumps({"image": f"pictures/{picture[i]:05}.png", "id": i, "conversations": turns}) + "\n")
    (folder / "talks.jsonl").write_text("".join(lines))
    return np.isin(np.arange(n), half).astype(int).tolist()


def talks_about(split: Literal["train", "test"], n: int, seed: int) -> tuple[Any, list[list[str]]]:
    """Scenes, and what is said about each: a request for a caption, the caption, a question, the answer."""
    sets = [SceneQuestions(split, n, 1, form, seed) for form in ("caption", "open")]
    turns = [[message for one in sets for message in one.asked(i)["messages"]] for i in range(n)]
    return sets[0].scenes, [[message["content"][-1]["text"] for message in said] for said in turns]


def place(line: dict[str, Any]) -> int:
    """Which conversation a line is."""
    return int(line["id"])


def train_dictionary(folder: Path, model: str, hook_point: str, steps: int, seed: int, threads: int) -> None:
    """SAE-V on all conversations, the spoilt ones as well: nobody knows yet which they are."""
    if (folder / "dictionary" / "sae" / "config.json").is_file():
        return
    talks = {"class_path": "Conversations", "init_args": {
        "path": str(folder / "talks.jsonl"), "val_share": 0.05, "test_share": 0.05, "batch_size": 1024,
        "columns": ["token_type"], "seed": seed,
        "source": {"class_path": "VisionLanguage", "init_args": {
            "model": model, "hook_points": [hook_point],
        }},
    }}  # fmt: skip
    main(["fit", f"--config={RECIPES / 'scene_questions_saev.yaml'}", f"--data={json.dumps(talks)}",
          f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", f"--seed_everything={seed}",
          '--trainer.logger={"class_path": "CSVLogger", "init_args": {"save_dir": "' + str(folder)
          + '", "name": "", "version": "dictionary"}}', f"--threads={threads}"])  # fmt: skip


# ---- the model


class Teacher:
    """Fine-tunes the model on some of the conversations and asks it about held-out scenes.

    Args:
        model: The LLaVA.
        talks: The conversations.
        seed: Of their scenes, and of the order in which they are learnt.
        n: How many.
        n_test: Held-out scenes.
    """

    def __init__(self, model: str, talks: Path, seed: int, n: int, n_test: int) -> None:
        self.folder, self.seed = located(model), seed
        self.processor = transformers.AutoProcessor.from_pretrained(self.folder)
        self.lines = [json.loads(line) for line in talks.read_text().splitlines()]
        fresh = self.fresh()
        self.seen = Pictures(fresh, self.processor, SceneQuestions("train", n, seed=seed))
        self.held = Pictures(fresh, self.processor, SceneQuestions("test", n_test, seed=seed))
        self.said = talks_about("test", n_test, seed)[1]

    def fresh(self) -> Any:
        """The model before fine-tuning, its tower frozen."""
        model = transformers.LlavaForConditionalGeneration.from_pretrained(self.folder)
        model.model.vision_tower.requires_grad_(False)
        return model

    def batch(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Ids of some conversations `[B, T]`, and what the tower makes of the pictures that they were given."""
        said = [[turn["value"].removeprefix("<image>\n") for turn in self.lines[i]["conversations"]] for i in chosen]
        return self.ids(said), self.seen.features([int(Path(self.lines[i]["image"]).stem) for i in chosen])

    def ids(self, said: list[list[str]]) -> Tensor:
        """Of conversations `[B, T]`; the first turn shows the picture."""
        talks = []
        for turns in said:
            parts = [[{"type": "text", "text": text}] for text in turns]
            parts[0].insert(0, {"type": "image"})
            roles = [("user", "assistant")[turn % 2] for turn in range(len(turns))]
            messages = [{"role": role, "content": content} for role, content in zip(roles, parts, strict=True)]
            talks.append(coded(self.processor.tokenizer, messages))
        return padded(talks)

    @torch.no_grad()
    def nats(self, model: Any, ids: Tensor, features: Tensor) -> list[float]:
        """Nats per token of the answers of each conversation."""
        said = answers(self.processor.tokenizer, ids)[:, 1:]
        loss = torch.zeros(said.shape)
        logits = predicted(model, ids[:, :-1], features, said)
        loss[said] = cross_entropy(logits, ids[:, 1:][said], reduction="none")
        return (loss.sum(1) / said.sum(1)).tolist()

    def losses(self) -> list[float]:
        """Of all conversations, before fine-tuning."""
        model, found = self.fresh().eval(), []
        for start in tqdm(range(0, len(self.lines), 50), desc="loss"):
            found += self.nats(model, *self.batch(list(range(start, min(start + 50, len(self.lines))))))
        return found

    def tuned(self, own: list[int], steps: int, batch_size: int, lr: float) -> dict[str, float]:
        """Figures after fine-tuning on some conversations, in an order of their own; without any, before it."""
        model = self.fresh().train()
        optimizer = adamw(model, lr, 0.05)
        draw = np.random.default_rng(self.seed)
        order: list[int] = []
        for step in tqdm(range(steps if own else 0), desc=f"fine-tuning on {len(own)}"):
            while len(order) < batch_size:
                order += draw.permutation(own).tolist()
            chosen, order = order[:batch_size], order[batch_size:]
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps)
            ids, features = self.batch(chosen)
            said = answers(self.processor.tokenizer, ids)[:, 1:]
            loss = cross_entropy(predicted(model, ids[:, :-1], features, said), ids[:, 1:][said])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        figures = {f"open_{factor}": open_accuracy(model, self.processor, self.held, factor) for factor in FACTORS}
        heard, truth, _ = answered(model, self.processor, self.held, "yes or no")
        open_ = float(np.mean(list(figures.values())))
        yes_no = float(np.mean([a == b for a, b in zip(heard, truth, strict=True)]))
        scenes = list(range(len(self.said)))
        nats = float(np.mean(self.nats(model, self.ids(self.said), self.held.features(scenes))))
        return {"open": open_, "yes or no": yes_no, "nats": nats, **figures}


def show(found: dict[str, Any], tuned: dict[str, dict[str, float]]) -> None:
    """Print both tables."""
    table = Table(title="AUROC of clean against spoilt conversations")
    for name in ("score", "AUROC"):
        table.add_column(name)
    for name, value in found["auroc"].items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    table = Table(title="The model after fine-tuning, on held-out scenes")
    for name in ("fine-tuned on", "of it clean", "open questions", "digit", "yes or no", "nats per token"):
        table.add_column(name)
    keys = ("open", "open_digit", "yes or no", "nats")
    for name, figures in tuned.items():
        share = found["clean"].get(name)
        table.add_row(name, "–" if share is None else f"{share:.2f}", *(f"{figures[key]:.3f}" for key in keys))
    Console().print(table)


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(run, as_positional=False)
    except MmsaeError as error:
        raise SystemExit(f"Error: {error}") from None

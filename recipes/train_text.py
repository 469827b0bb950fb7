"""Train the miniature language model that ships with the package, from nothing, in about ten minutes on one CPU core.

    python recipes/train_text.py --out runs/text --threads 1

These are the settings of the weights that ship. It reads stories with known factors, dialogues about them, and captions
of the scenes (`mmsae.miniatures`). Interrupt it at will: the same command goes on from the last checkpoint, to the same
weights.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from train_scene_clip import resume, save, schedule, state, write  # of this folder

from mmsae.errors import MmsaeError, checked
from mmsae.miniatures.captions import FACTORS as SCENE_FACTORS
from mmsae.miniatures.captions import GROUNDS, OPENINGS, PLACES, compose
from mmsae.miniatures.questions import SceneQuestions
from mmsae.miniatures.stories import FACTORS, Stories

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>")
PAD, BEGIN, END = range(3)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is not string %}{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% endif %}{% endfor %}{% endif %}"
    "{% set text = message.content if message.content is string else "
    "message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% if message.role == 'assistant' %}{% generation %} {{ text }}<|end|>{% endgeneration %}"
    "{% else %} {{ text }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COPULAS = ("was", "were", "is", "are")


def train(
    out: str,
    begin: str | None = None,
    steps: int = 900,
    batch_size: int = 32,
    lr: float = 2e-3,
    weight_decay: float = 0.1,
    width: int = 128,
    layers: int = 4,
    seed: int = 0,
    threads: int = 2,
    precision: Literal["bf16", "fp32"] = "bf16",
    checkpoint_every: int = 100,
    n_test: int = 500,
) -> None:
    """Train a miniature Llama on generated text and write it as `from_pretrained` reads it, tokenizer included.

    Args:
        out: Folder to write to.
        begin: Folder of an earlier run to go on from, along a new schedule; give another seed for other documents.
        steps: Number of batches.
        batch_size: New documents in each batch.
        lr: Highest learning rate; it warms up over a fifteenth of the steps and falls along a cosine.
        weight_decay: Weight decay of the matrices.
        width: Width of the residual stream, a multiple of 32.
        layers: Number of blocks.
        seed: Seed of the documents and of the first weights.
        threads: CPU threads.
        precision: Precision of the matrix products while training.
        checkpoint_every: Steps between checkpoints, each with a look at the validation stories.
        n_test: Number of test stories for the figures at the end.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "threads": threads, "layers": layers}.items():
        checked(name, value, 1)
    if width % 32:
        raise MmsaeError(f"width={width} is not a multiple of 32, the width of an attention head.")
    recipe = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "width": width,
        "layers": layers, "seed": seed, "threads": threads, "precision": precision,
    }  # fmt: skip
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = words()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    model = transformers.LlamaForCausalLM(config)
    if begin is not None:
        model = earlier(transformers.LlamaForCausalLM, begin, recipe)
    optimizer = adamw(model, lr, weight_decay)

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    first = resume(checkpoint, model, optimizer, recipe)
    stories = Stories("train", steps * batch_size, seed)
    val = Stories("val", 100, seed)

    with tqdm(range(first, steps), initial=first, total=steps, mininterval=1) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps)
            ids = padded([document(tokenizer, stories, i) for i in range(step * batch_size, (step + 1) * batch_size)])
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(input_ids=ids, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                save(checkpoint, own(state(model, optimizer)), {"step": str(step + 1), "config": json.dumps(recipe)})
                seen = figures(model.eval(), tokenizer, val)
                model.train()
                bar.set_postfix(loss=f"{loss.item():.3f}", val=f"{seen['cross_entropy']:.3f}")

    ship(model, folder, recipe)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    stored = transformers.AutoModelForCausalLM.from_pretrained(folder)
    test = Stories("test", n_test, seed)
    n_read = min(steps * batch_size, 20000)
    read = [tokenizer(stories[i]["text"] + "<|end|>")["input_ids"] for i in range(n_read)]
    measured = figures(stored.eval(), tokenizer, test)
    measured["trigram_cross_entropy"] = trigram_loss(read, tokenizer, val, test)
    told(folder, measured, {"stories": n_test, "stories of the trigram model": n_read})
    checkpoint.unlink(missing_ok=True)

    size = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"On {n_test} test stories ({sum(p.numel() for p in model.parameters()):,} parameters):")
    for name, value in measured.items():
        print(f"  {name:<28}{value:7.3f}")
    print(f"Wrote {folder / 'model.safetensors'} ({size:.1f} MB) and its tokenizer.")


def words(seed: int = 0, n: int = 3000) -> Any:
    """A byte-level BPE tokenizer in which every word of the stories and of the scenes' questions is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,  # more than it finds: it ends when all words are whole
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stories, scenes = Stories("train", n, seed), SceneQuestions("train", n, turns=4, seed=seed)

    def texts() -> Iterator[str]:
        for i in range(n):
            yield stories[i]["text"]
            yield from (message["content"] for message in stories.dialogue(i)["messages"])
            yield captions(i)
            yield from (message["content"][-1]["text"] for message in scenes.asked(i)["messages"])
        yield from ["describe the picture.", "hello"] * 2

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", BEGIN)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def captions(index: int, n: int = 5) -> str:
    """Some captions of scenes in a row."""
    draw = np.random.default_rng([7, index])
    found = []
    for _ in range(n):
        said = [factor for factor in SCENE_FACTORS if draw.random() < 0.6] or ["digit"]
        stated = {factor: int(draw.integers(len(SCENE_FACTORS[factor]))) for factor in said}
        phrases = [int(draw.integers(len(options))) for options in (OPENINGS, PLACES, GROUNDS["plain"])]
        found.append(compose(stated, *phrases) + ".")
    return " ".join(found)


def document(tokenizer: Any, stories: Stories, index: int) -> list[int]:
    """Ids of a story (in five of eight cases), a dialogue about one (two of eight) or captions."""
    kind = index % 8
    if kind < 5:
        return tokenizer(stories[index]["text"] + "<|end|>")["input_ids"]
    if kind < 7:
        text = tokenizer.apply_chat_template(stories.dialogue(index)["messages"], tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(captions(index) + "<|end|>")["input_ids"]


def padded(rows: list[list[int]]) -> Tensor:
    """Ids `[B, T]`, filled on the right."""
    T = max(map(len, rows))
    return torch.tensor([row + [PAD] * (T - len(row)) for row in rows])


@torch.no_grad()
def figures(model: Any, tokenizer: Any, stories: Stories, batch_size: int = 50) -> dict[str, float]:
    """Mean nats per token; and how often a word that the story determines is the likeliest of its kind.

    `recall_<factor>`: every further mention of the value, among the values of the factor (chance 1/12 to 1/2).
    `agreement`: was, were, is, are, each time (chance 1/4).
    """
    groups = {factor: _ids(tokenizer, FACTORS[factor]) for factor in ("name", "gender", "colour", "place", "object")}
    groups["animal"] = _ids(tokenizer, [form for name in FACTORS["animal"] for form in (name, name + "s")])
    copulas = _ids(tokenizer, COPULAS)
    total = count = 0.0
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for start in range(0, len(stories), batch_size):
        texts = [stories[i]["text"] + "<|end|>" for i in range(start, min(start + batch_size, len(stories)))]
        ids = padded([tokenizer(text)["input_ids"] for text in texts])
        logits, target = model(input_ids=ids, use_cache=False).logits[:, :-1].float(), ids[:, 1:]
        total += cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="sum").item()
        count += int((target != PAD).sum())
        for name, group in [*groups.items(), ("agreement", copulas)]:
            there = torch.isin(target, group)
            if name != "agreement":
                there &= there.cumsum(1) > 1  # the first mention is news
            guess = group[logits[there][:, group].argmax(1)]
            key = name if name == "agreement" else f"recall_{name}"
            right[key] += int((guess == target[there]).sum())
            asked[key] += int(there.sum())
    return {"cross_entropy": total / count, **{key: right[key] / max(asked[key], 1) for key in asked}}


def _ids(tokenizer: Any, values: Any) -> Tensor:
    coded = [tokenizer(value, add_special_tokens=False)["input_ids"] for value in values]
    return torch.tensor([row[0] for row in coded])


def trigram_loss(read: list[list[int]], tokenizer: Any, val: Stories, test: Stories) -> float:
    """Mean nats per token of interpolated trigrams; their weights are the best ones on the validation stories."""
    one: Counter[Any] = Counter()
    two: Counter[Any] = Counter()
    three: Counter[Any] = Counter()
    for row in read:
        one.update(row[1:])
        two.update(pairwise(row))
        three.update(zip(row, row[1:], row[2:], strict=False))
    after: Counter[Any] = Counter()
    for (a, _), times in two.items():
        after[a] += times
    pairs: Counter[Any] = Counter()
    for (a, b, _), times in three.items():
        pairs[a, b] += times
    n, vocabulary = sum(one.values()), len(tokenizer)

    def parts(stories: Stories) -> np.ndarray:
        found = []
        for i in range(len(stories)):
            row = tokenizer(stories[i]["text"] + "<|end|>")["input_ids"]
            for j in range(1, len(row)):
                b, c = row[j - 1], row[j]
                context = (row[j - 2], b) if j > 1 else None
                p3 = three[*context, c] / pairs[context] if context and pairs[context] else 0.0
                p2 = two[b, c] / after[b] if after[b] else 0.0
                found.append((p3, p2, one[c] / n, 1 / vocabulary))
        return np.array(found)

    grid = [(a, b) for a in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98) for b in (0.01, 0.03, 0.1, 0.2) if a + b < 1]
    seen = parts(val)
    loss = lambda p, a, b: float(-np.log(p @ (a, b, (1 - a - b) * 0.9, (1 - a - b) * 0.1)).mean())  # noqa: E731
    best = min(grid, key=lambda weights: loss(seen, *weights))
    return loss(parts(test), *best)


def adamw(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Weight decay for the matrices only; weights that are frozen are left out."""
    free = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in free if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in free if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory (tied embeddings), which safetensors refuses to write."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def ship(model: Any, folder: Path, recipe: dict[str, Any]) -> None:
    """Write a model in float16 whose configuration says float32, so that a CPU computes in that."""
    model.save_pretrained(folder)
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save(folder / "model.safetensors", weights, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write(folder / "config.json", config | {"dtype": "float32", "training": recipe, "versions": versions})


def earlier(kind: Any, folder: str, recipe: dict[str, Any]) -> Any:
    """The model of an earlier run, whose settings are added to those of this one."""
    recipe["begin"] = json.loads((Path(folder) / "config.json").read_text())["training"]
    return kind.from_pretrained(folder).train()


def told(folder: Path, measured: dict[str, float], on: dict[str, int]) -> None:
    """Add the figures to `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("_name_or_path", None)  # of the machine that trained it
    config["measured"] = {name: round(value, 4) for name, value in measured.items()}
    write(folder / "config.json", config | {"measured_on": on})


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(train, as_positional=False)
    except MmsaeError as error:
        raise SystemExit(f"Error: {error}") from None

"""Train the miniature CLAP that ships with the package, from nothing, in about twenty minutes on one CPU core.

    python recipes/train_sound_clap.py --out runs/sound_clap --threads 1

These are the settings of the weights that ship (98 % zero-shot or more on the test sounds, for every factor).

Interrupt it at will: the same command goes on from the last checkpoint, to the same weights. The folder that it writes
is one that `ClapModel.from_pretrained` reads; `config.json` says how good it is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from train_scene_clip import resume, save, schedule, state, write
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

from mmsae.errors import MmsaeError, checked
from mmsae.miniatures.sounds import FACTORS, RATE, SECONDS, Sounds, mentions, vocabulary, zero_shot_prompts

PROMPTS = [prompt for factor in FACTORS for prompt in zero_shot_prompts(factor)]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # with the ids that RoBERTa has


def train(
    out: str,
    steps: int = 2000,
    batch_size: int = 48,
    lr: float = 1.5e-3,
    weight_decay: float = 0.05,
    width: int = 48,
    seed: int = 0,
    threads: int = 1,
    precision: Literal["bf16", "fp32"] = "bf16",
    checkpoint_every: int = 100,
    n_test: int = 2000,
) -> None:
    """Train a miniature CLAP on generated sounds and write it as `ClapModel.from_pretrained` reads it.

    Args:
        out: Folder to write to.
        steps: Number of batches.
        batch_size: New sounds in each batch; no sound is heard twice.
        lr: Highest learning rate; it warms up over a fifteenth of the steps and falls along a cosine.
        weight_decay: Weight decay of the matrices.
        width: Of the first of three stages of the audio tower, a multiple of 16; each further one has twice of it.
        seed: Seed of the sounds and of the first weights.
        threads: CPU threads.
        precision: Precision of the matrix products while training; bf16 is faster where the CPU has it.
        checkpoint_every: Steps between checkpoints, each with a look at the validation sounds.
        n_test: Number of test sounds for the accuracy at the end.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "threads": threads}.items():
        checked(name, value, 1)
    if width % 16:
        raise MmsaeError(f"width={width} is not a multiple of 16, the width of an attention head.")
    recipe = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "width": width, "seed": seed,
        "threads": threads, "precision": precision,
    }  # fmt: skip
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    extractor, tokenizer = ears(), words()
    model = ClapModel(shape(width, len(tokenizer))).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    first = resume(checkpoint, model, optimizer, recipe)
    sounds = Sounds("train", steps * batch_size, seed)
    val = heard(Sounds("val", min(n_test, 400), seed), extractor)
    prompts = tokenizer(PROMPTS, padding=True, return_tensors="pt")

    with tqdm(range(first, steps), initial=first, total=steps, mininterval=1) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps)
            examples = [sounds[i] for i in range(step * batch_size, (step + 1) * batch_size)]
            features = spectrograms([example["audio"] for example in examples], extractor)
            texts = tokenizer([*(e["text"] for e in examples), *PROMPTS], padding=True, return_tensors="pt")
            labels = facts([example["labels"] for example in examples])
            stated = facts([mentions(example["text"]) for example in examples])
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                audio = model.get_audio_features(input_features=features).pooler_output.float()
                text = model.get_text_features(**texts).pooler_output.float()
            audio, text = normalize(audio, dim=-1), normalize(text, dim=-1)
            scale = model.logit_scale_a.exp()
            loss = contrast(scale * audio @ text.T, labels, stated)
            loss = loss + apart(scale * text[batch_size:] @ text[batch_size:].T)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.logit_scale_a.data.clamp_(max=math.log(100))
            model.logit_scale_t.data.copy_(model.logit_scale_a.data)
            if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                save(checkpoint, state(model, optimizer), {"step": str(step + 1), "config": json.dumps(recipe)})
                seen = accuracy(model.eval(), val, prompts)
                model.train()
                bar.set_postfix(loss=f"{loss.item():.3f}", **{name: f"{value:.2f}" for name, value in seen.items()})

    half = {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    save(folder / "model.safetensors", half, {"format": "pt"})
    config = {**model.config.to_dict(), "architectures": ["ClapModel"], "dtype": "float32"}  # it computes in float32
    config["zero_shot_prompts"] = {factor: zero_shot_prompts(factor) for factor in FACTORS}
    config["training"] = recipe
    config["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    write(folder / "config.json", config)
    extractor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = ClapModel.from_pretrained(folder).eval()  # the accuracy of the weights as they are stored
    config["zero_shot_accuracy"] = accuracy(stored, heard(Sounds("test", n_test, seed), extractor), prompts)
    config["zero_shot_sounds"] = n_test
    write(folder / "config.json", config)
    checkpoint.unlink(missing_ok=True)

    size = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"Zero-shot accuracy on {n_test} test sounds (chance in brackets):")
    for factor, share in config["zero_shot_accuracy"].items():
        print(f"  {factor:<12}{share:6.1%}  ({1 / len(FACTORS[factor]):.1%})")
    print(f"Wrote {folder / 'model.safetensors'} ({size:.1f} MB) and {folder / 'config.json'}.")


def shape(width: int, n_words: int) -> ClapConfig:
    """Three stages of two blocks over a picture of 64x64 into which 128 frames of 32 bands are folded."""
    heads = [width * 2**stage // 16 for stage in range(3)]
    audio = {
        "spec_size": 64, "num_mel_bins": 32, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4,
        "patch_embeds_hidden_size": width, "hidden_size": 4 * width, "depths": [2, 2, 2], "num_hidden_layers": 3,
        "num_attention_heads": heads, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    text = {
        "vocab_size": n_words, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 192, "max_position_embeddings": 34, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return ClapConfig(text_config=text, audio_config=audio, projection_dim=128)


def ears() -> ClapFeatureExtractor:
    """126 frames of 32 bands out of two seconds."""
    return ClapFeatureExtractor(
        feature_size=32, sampling_rate=RATE, hop_length=256, max_length_s=SECONDS, fft_window_size=512,
        frequency_min=50, frequency_max=8000, truncation="rand_trunc", padding="pad",
    )  # fmt: skip


def words() -> PreTrainedTokenizerFast:
    """One token for each word."""
    known = {word: index for index, word in enumerate([*SPECIAL, *vocabulary()])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    start, pad, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=start, pad_token=pad, eos_token=end, unk_token=unknown, cls_token=start,
        sep_token=end, model_max_length=32,
    )  # fmt: skip


def spectrograms(sounds: list[Any], extractor: ClapFeatureExtractor) -> Tensor:
    """What the audio tower reads, float32 [n, 1, frames, bands]."""
    return extractor(sounds, sampling_rate=RATE, return_tensors="pt")["input_features"].float()


def heard(sounds: Sounds, extractor: ClapFeatureExtractor) -> tuple[Tensor, Tensor]:
    """Spectrograms of all sounds, and their labels [n, n_factors]."""
    examples = [sounds[i] for i in range(len(sounds))]
    return spectrograms([e["audio"] for e in examples], extractor), facts([e["labels"] for e in examples])


def contrast(logits: Tensor, labels: Tensor, stated: Tensor) -> Tensor:
    """Cross entropy in which every caption that is true of a sound counts as its positive, and that of its prompts.

    Args:
        logits: Sounds against captions of the batch, then the prompts of each factor [batch, batch + n_prompts].
        labels: Values of the sounds' factors [batch, n_factors].
        stated: Values that the captions state, -1 where they are silent [batch, n_factors].
    """
    n = len(labels)
    true = ((stated[None] == labels[:, None]) | (stated[None] < 0)).all(dim=-1).float()  # [sounds, captions]
    captions, *prompts = logits.split([n, *map(len, FACTORS.values())], dim=1)
    loss = cross_entropy(captions, true / true.sum(dim=1, keepdim=True))
    loss = loss + cross_entropy(captions.T, true.T / true.T.sum(dim=1, keepdim=True))
    for index, prompt_logits in enumerate(prompts):  # of the prompts of one factor exactly one is true
        loss = loss + cross_entropy(prompt_logits, labels[:, index])
    return loss / (2 + len(prompts))


def apart(logits: Tensor) -> Tensor:
    """Cross entropy that keeps the prompts of one factor apart, see `train_scene_clip.spread`."""
    sizes = [len(values) for values in FACTORS.values()]
    blocks = [rows.split(sizes, dim=1)[i] for i, rows in enumerate(logits.split(sizes))]
    return torch.stack([cross_entropy(block, torch.arange(len(block))) for block in blocks]).mean()


def facts(known: list[dict[str, int]]) -> Tensor:
    """Factor values as int64 [n, n_factors], with -1 for an unknown one."""
    return torch.tensor([[values.get(factor, -1) for factor in FACTORS] for values in known])


@torch.no_grad()
def accuracy(model: ClapModel, known: tuple[Tensor, Tensor], prompts: Any) -> dict[str, float]:
    """How often the prompt nearest to a sound is the true one, for every factor, as a fraction."""
    features, labels = known
    text = normalize(model.get_text_features(**prompts).pooler_output, dim=-1)
    batches = (model.get_audio_features(input_features=part).pooler_output for part in features.split(100))
    similar = torch.cat(list(batches)) @ text.T
    parts = similar.split([len(values) for values in FACTORS.values()], dim=1)
    return {
        f: float((p.argmax(1) == labels[:, i]).float().mean())
        for i, (f, p) in enumerate(zip(FACTORS, parts, strict=True))
    }


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(train, as_positional=False)
    except MmsaeError as error:
        raise SystemExit(f"Error: {error}") from None

"""Train the miniature multimodal model that ships with the package, in about half an hour on one busy CPU core.

    python recipes/train_lmm.py --out runs/lmm --threads 1

These are the settings of the weights that ship. It is a LLaVA: the image tower of the miniature CLIP, frozen, a
projector, and the miniature language model (`recipes/train_text.py`), taught to answer questions about the scenes and
to caption them. Interrupt it at will: the same command goes on from the last checkpoint, to the same weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from train_scene_clip import resume, save, schedule, state, write  # of this folder
from train_text import CHAT_TEMPLATE, END, adamw, earlier, own, padded, ship, told

from mmsae.errors import MmsaeError, checked
from mmsae.miniatures.captions import FACTORS, mentions
from mmsae.miniatures.clip import scene_clip
from mmsae.miniatures.questions import BEHIND, CAPTION, OPEN, SceneQuestions
from mmsae.miniatures.scenes import SIDE
from mmsae.sources.weights import located

PATCH, PATCHES = 8, 64
MEAN, STD = [0.30, 0.29, 0.28], [0.25, 0.25, 0.25]


def train(
    out: str,
    text: str = "miniature:text",
    begin: str | None = None,
    steps: int = 750,
    batch_size: int = 32,
    lr: float = 1.5e-3,
    weight_decay: float = 0.05,
    turns: int = 6,
    n_scenes: int = 4096,
    seed: int = 0,
    threads: int = 2,
    precision: Literal["bf16", "fp32"] = "bf16",
    checkpoint_every: int = 100,
    n_test: int = 500,
) -> None:
    """Train a miniature LLaVA on questions about the scenes and write it as `from_pretrained` reads it.

    Args:
        out: Folder to write to.
        text: The language model to begin with: a folder, or the miniature.
        begin: Folder of an earlier run to go on from, along a new schedule; give another seed for other scenes.
        steps: Number of batches.
        batch_size: Scenes in each batch.
        lr: Highest learning rate; it warms up over a fifteenth of the steps and falls along a cosine.
        weight_decay: Weight decay of the matrices.
        turns: Questions about a scene in one sequence.
        n_scenes: Scenes to learn from; their image features are kept, the questions are new in every pass.
        seed: Seed of the scenes, of the questions and of the projector.
        threads: CPU threads.
        precision: Precision of the matrix products while training.
        checkpoint_every: Steps between checkpoints, each with a look at the validation scenes.
        n_test: Number of test scenes for the figures at the end.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "threads": threads, "turns": turns}.items():
        checked(name, value, 1)
    checked("n_scenes", n_scenes, batch_size)
    recipe = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "turns": turns,
        "n_scenes": n_scenes, "seed": seed, "threads": threads, "precision": precision,
    }  # fmt: skip
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    processor, model = build(located(text))
    if begin is not None:
        model = earlier(transformers.LlavaForConditionalGeneration, begin, recipe)
    model.model.vision_tower.requires_grad_(False)
    optimizer = adamw(model, lr, weight_decay)

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    first = resume(checkpoint, model, optimizer, recipe)
    seen = Pictures(model, processor, SceneQuestions("train", n_scenes, turns, seed=seed))
    val = Pictures(model, processor, SceneQuestions("val", 100, seed=seed))
    per_pass = n_scenes // batch_size

    with tqdm(range(first, steps), initial=first, total=steps, mininterval=1) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps)
            start = step % per_pass * batch_size
            scenes = list(range(start, start + batch_size))
            asked = [seen.questions.asked(i, again=step // per_pass)["messages"] for i in scenes]
            ids = padded([coded(processor.tokenizer, messages) for messages in asked])
            answer = answers(processor.tokenizer, ids)[:, 1:]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = predicted(model, ids[:, :-1], seen.features(scenes), answer)
            loss = cross_entropy(logits.float(), ids[:, 1:][answer])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                save(checkpoint, own(state(model, optimizer)), {"step": str(step + 1), "config": json.dumps(recipe)})
                model.eval()
                right = {factor: open_accuracy(model, processor, val, factor) for factor in FACTORS}
                model.train()
                bar.set_postfix(loss=f"{loss.item():.3f}", **{name: f"{value:.2f}" for name, value in right.items()})

    ship(model, folder, recipe)
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    write(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})  # as older ones; only JSON is packaged
    stored = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    measured = figures(stored, processor, Pictures(stored, processor, SceneQuestions("test", n_test, seed=seed)))
    told(folder, measured, {"test scenes": n_test})
    checkpoint.unlink(missing_ok=True)

    size = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"On {n_test} test scenes ({sum(p.numel() for p in model.parameters()):,} parameters):")
    for name, value in measured.items():
        print(f"  {name:<32}{value:7.3f}")
    print(f"Wrote {folder / 'model.safetensors'} ({size:.1f} MB) and its processor.")


def build(text: str) -> tuple[Any, Any]:
    """The processor, and the model with the tower of the CLIP, the language model in `text`, a random projector."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(text)
    language = transformers.AutoModelForCausalLM.from_pretrained(text)
    tower = vision_tower()
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-2,  # the last layer of a CLIP is trained where its class token stands, nowhere else
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return processor, model


def vision_tower() -> Any:
    """The image tower of the miniature CLIP as a `CLIPVisionModel` of transformers, weight by weight."""
    clip, _, _ = scene_clip()
    visual: Any = clip.visual
    width, layers = visual.conv1.out_channels, len(visual.transformer.resblocks)
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
        layer_norm_eps=visual.ln_pre.eps,
    )
    found = {
        "embeddings.class_embedding": visual.class_embedding,
        "embeddings.patch_embedding.weight": visual.conv1.weight,
        "embeddings.position_embedding.weight": visual.positional_embedding,
    }
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        found |= _both(getattr(visual, theirs), ours)
    for i, block in enumerate(visual.transformer.resblocks):
        at = f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            found |= {f"{at}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
        found |= _both(block.attn.out_proj, f"{at}.self_attn.out_proj")
        found |= _both(block.ln_1, f"{at}.layer_norm1") | _both(block.ln_2, f"{at}.layer_norm2")
        found |= _both(block.mlp.c_fc, f"{at}.mlp.fc1") | _both(block.mlp.c_proj, f"{at}.mlp.fc2")
    tower = transformers.CLIPVisionModel(config)
    tower.load_state_dict({name: tensor.detach() for name, tensor in found.items()})
    return tower.eval()


def _both(module: Any, name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


class Pictures:
    """What the frozen tower makes of some scenes, computed when first asked for and kept in half precision.

    Args:
        model: Whose tower.
        processor: Whose pixels.
        questions: About the scenes.
    """

    def __init__(self, model: Any, processor: Any, questions: SceneQuestions) -> None:
        self.model, self.processor, self.questions = model, processor, questions
        width = model.config.vision_config.hidden_size
        self.kept = torch.zeros(len(questions), PATCHES, width, dtype=torch.float16)
        self.known = torch.zeros(len(questions), dtype=torch.bool)

    @torch.no_grad()
    def features(self, scenes: list[int]) -> Tensor:
        """Of the patches of some scenes, `[B, 64, width]`."""
        if new := [i for i in scenes if not self.known[i]]:
            images = [self.questions.scenes[i]["image"] for i in new]
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            hidden = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            self.kept[new] = hidden[self.model.config.vision_feature_layer][:, 1:].half()
            self.known[new] = True
        return self.kept[scenes].float()


def coded(tokenizer: Any, messages: list[dict[str, Any]], ask: bool = False) -> list[int]:
    """Ids of a conversation with the place of every patch."""
    given = {"chat_template": CHAT_TEMPLATE, "add_generation_prompt": ask}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
    return tokenizer(text.replace("<image>", "<image>" * PATCHES), add_special_tokens=False)["input_ids"]


def answers(tokenizer: Any, ids: Tensor) -> Tensor:
    """Which tokens are the assistant's, the end of its turn included: bool `[B, T]`."""
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    before = ids.roll(1, 1)
    before[:, 0] = END
    ended = ((before == END) & (ids != assistant)).long().cumsum(1)
    begun = (ids == assistant).long().cumsum(1)
    # since the last header of the assistant, no turn may have ended
    ended_then = torch.where(ids == assistant, ended, 0).cummax(1).values
    return (begun > 0) & (ended == ended_then) & (ids != assistant) & (ids != tokenizer.pad_token_id)


def predicted(model: Any, ids: Tensor, features: Tensor, at: Tensor) -> Tensor:
    """Logits `[n, vocabulary]` at the chosen positions (bool `[B, T]`)."""
    embedded = model.get_input_embeddings()(ids)
    patches = model.model.multi_modal_projector(features).to(embedded.dtype)
    embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], patches)
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return model.lm_head(hidden[at])


@torch.no_grad()
def said(model: Any, processor: Any, pictures: Pictures, questions: list[str], longest: int) -> list[str]:
    """What the model answers, greedily, to one question about every scene."""
    tokenizer = processor.tokenizer
    prompts = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompts.append(coded(tokenizer, [{"role": "user", "content": content}], ask=True))
    found = [""] * len(questions)
    for length in sorted({len(prompt) for prompt in prompts}):  # no padding
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(alike), 100):
            scenes = alike[start : start + 100]
            ids = torch.tensor([prompts[i] for i in scenes])
            features = pictures.features(scenes)
            for _ in range(longest):
                last = torch.zeros_like(ids, dtype=torch.bool)
                last[:, -1] = True
                ids = torch.cat([ids, predicted(model, ids, features, last).argmax(1, keepdim=True)], 1)
                if (ids[:, length:] == END).any(1).all():
                    break
            for i, row in zip(scenes, ids[:, length:].tolist(), strict=True):
                found[i] = tokenizer.decode(row[: row.index(END)] if END in row else row).strip()
    return found


def answered(model: Any, processor: Any, pictures: Pictures, form: str) -> tuple[list[str], list[str], list[dict]]:
    """Of one question of a form about every scene: what the model says, the truth, the labels."""
    questions = SceneQuestions(pictures.questions.scenes.split, len(pictures.questions), 1, form, seed=1)
    # seed 1 asks other questions; the scenes and their truth are those of `pictures`
    questions.scenes, questions._labels = pictures.questions.scenes, pictures.questions._labels
    items = [questions.asked(i) for i in range(len(questions))]
    asked, truth = ([item["messages"][turn]["content"][-1]["text"] for item in items] for turn in (0, 1))
    longest = 22 if form == "caption" else 5
    return said(model, processor, pictures, asked, longest), truth, [item["labels"] for item in items]


def open_accuracy(model: Any, processor: Any, pictures: Pictures, factor: str) -> float:
    """Share of the scenes whose value of a factor is told right."""
    labels = pictures.questions._labels[factor]
    values = [FACTORS[factor][i] for i in labels]
    truth = [(BEHIND[value] if factor == "background" else value) + "." for value in values]
    heard = said(model, processor, pictures, [OPEN[factor]] * len(truth), 5)
    return float(np.mean([a == b for a, b in zip(heard, truth, strict=True)]))


def figures(model: Any, processor: Any, pictures: Pictures) -> dict[str, float]:
    """Shares of right answers; of "yes" to what is not there; of facts of captions that are right."""
    found = {f"open_{factor}": open_accuracy(model, processor, pictures, factor) for factor in FACTORS}
    heard, truth, labels = answered(model, processor, pictures, "yes or no")
    right = np.array([a == b for a, b in zip(heard, truth, strict=True)])
    asked = np.array([label["asked"] for label in labels])
    yes = np.array([label["answer"] for label in labels])
    found |= {f"yes_no_{factor}": float(right[asked == i].mean()) for i, factor in enumerate(FACTORS)}
    found["false_presence"] = float(np.mean([answer == "yes." for answer in np.array(heard)[yes == 0]]))
    found["missed_presence"] = float(np.mean([answer == "no." for answer in np.array(heard)[yes == 1]]))
    digits = (yes == 0) & (asked == 0)
    found["false_presence_digit"] = float(np.mean([answer == "yes." for answer in np.array(heard)[digits]]))
    heard = said(model, processor, pictures, [CAPTION] * len(pictures.questions), 22)
    stated = [mentions(caption) for caption in heard]
    for factor in FACTORS:
        truth_of = pictures.questions._labels[factor]
        found[f"caption_{factor}"] = float(
            np.mean([facts.get(factor, -1) == int(true) for facts, true in zip(stated, truth_of, strict=True)])
        )
    found["caption_all_facts"] = float(
        np.mean([
            all(facts.get(factor, -1) == int(pictures.questions._labels[factor][i]) for factor in FACTORS)
            for i, facts in enumerate(stated)
        ])
    )  # fmt: skip
    return found


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(train, as_positional=False)
    except MmsaeError as error:
        raise SystemExit(f"Error: {error}") from None

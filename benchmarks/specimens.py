"""One model of every class of source, random weights, with a data set in files: what `extract.py` measures."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from datamodules import (
    AudioFolder,
    Conversations,
    ImageFolder,
    Prompts,
    SimulatedECGs,
    TextFiles,
)
from datamodules.base import ActivationDataModule, Split
from mmsae.sources import (
    CLAP,
    HFCLIP,
    CausalLM,
    Custom,
    Diffusion,
    OpenCLIP,
    PairedEmbeddings,
    Signal,
    TextEncoder,
    Timm,
    Torchvision,
    VisionEncoder,
    VisionLanguage,
)

Bare = Callable[[Any, dict[str, Any]], object]
WORDS = ["".join(a + b) for a in string.ascii_lowercase for b in string.ascii_lowercase]


class Size(NamedTuple):
    """How large models and batches are.

    Attributes:
        toy: Whether models are as small as their classes allow.
        batch: Examples for each forward pass; text gets more.
        batches: Batches.
    """

    toy: bool
    batch: int
    batches: int


class Specimen(NamedTuple):
    """What is measured.

    Attributes:
        data: A data set and its source.
        bare: The forward pass on a collated batch, as somebody writes it who has only the model.
    """

    data: ActivationDataModule
    bare: Bare


def words_tokenizer(folder: Path) -> Path:
    """A tokenizer of two-letter words, as `from_pretrained` finds it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return folder


def sentences(n: int, length: int) -> list[str]:
    """Texts of random words."""
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, length)) for _ in range(n)]


def pictures(folder: Path, n: int) -> Path:
    """JPEG files of 256 x 256 smooth noise."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg")
    return folder


def _texts(size: Size, folder: Path, make: Callable[[Path], Any], bare: Bare) -> Specimen:
    words_tokenizer(folder)
    n = 2 * size.batch
    (folder / "texts.txt").write_text("\n\n".join(sentences(n * size.batches, 20 if size.toy else 126)))
    held = {"val_share": 0.0, "test_share": 0.0, "examples_per_forward": n}
    return Specimen(TextFiles(str(folder / "texts.txt"), source=make(folder), **held), bare)


def _images(size: Size, folder: Path, source: Any, bare: Bare) -> Specimen:
    root = pictures(folder / "pictures", size.batch * size.batches)
    held = {"val_share": 0.0, "test_share": 0.0, "examples_per_forward": size.batch}
    return Specimen(ImageFolder(str(root), source=source, **held), bare)


def _first(model: Any, batch: dict[str, Any]) -> object:
    return model(batch["input"])


def causal_lm(size: Size, folder: Path) -> Specimen:
    """A Llama."""
    shape = (32, 2, 2) if size.toy else (512, 8, 8)
    config = {"model_type": "llama", "vocab_size": 32_000, "hidden_size": shape[0], "num_hidden_layers": shape[1]}
    config |= {"num_attention_heads": shape[2], "intermediate_size": 3 * shape[0]}
    point = [f"model.layers.{shape[1] // 2}"]
    return _texts(
        size,
        folder,
        lambda words: CausalLM(words, point, config=config, device="cpu"),
        lambda model, b: model(input_ids=b["input_ids"], attention_mask=b["attention_mask"], use_cache=False),
    )


def text_encoder(size: Size, folder: Path) -> Specimen:
    """A BERT of the size of MiniLM."""
    shape = (32, 2, 2) if size.toy else (384, 6, 12)
    config = {"model_type": "bert", "vocab_size": 1000, "hidden_size": shape[0], "num_hidden_layers": shape[1]}
    config |= {"num_attention_heads": shape[2], "intermediate_size": 4 * shape[0]}
    point = [f"encoder.layer.{shape[1] // 2}"]
    return _texts(
        size,
        folder,
        lambda words: TextEncoder(words, point, config=config, device="cpu"),
        lambda model, b: model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]),
    )


def _open_clip(size: Size) -> OpenCLIP:
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 10, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    small = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    points = ["visual.transformer.resblocks.9"]
    return OpenCLIP("ViT-B-32", points, config=small if size.toy else {}, positions="patches", device="cpu")


def open_clip(size: Size, folder: Path) -> Specimen:
    """ViT-B/32."""
    return _images(size, folder, _open_clip(size), lambda model, b: model.encode_image(b["input"]))


def hf_clip(size: Size, folder: Path) -> Specimen:
    """CLIP ViT-B/16."""
    vision: dict[str, Any] = {"patch_size": 16}
    if size.toy:
        vision = {"hidden_size": 32, "num_hidden_layers": 10, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"model_type": "clip", "vision_config": vision, "text_config": {"num_hidden_layers": 1}}
    source = HFCLIP("random", ["vision_model.encoder.layers.9"], config=config, device="cpu")
    return _images(size, folder, source, lambda model, b: model.get_image_features(pixel_values=b["input"]))


def clap(size: Size, folder: Path) -> Specimen:
    """HTS-AT at its full size on ten seconds."""
    import soundfile

    audio: dict[str, Any] = {"patch_embeds_hidden_size": 24, "hidden_size": 192, "depths": [1, 1, 1, 1]}
    config = {"model_type": "clap", "audio_config": audio if size.toy else {}, "text_config": {"num_hidden_layers": 1}}
    root = folder / "sounds"
    root.mkdir()
    n = max(size.batch // 2, 1)
    for i in range(n * size.batches):
        noise = 0.1 * np.random.default_rng(i).standard_normal(480_000)
        soundfile.write(root / f"{i:04d}.wav", noise.astype(np.float32), 48_000)
    source = CLAP("random", ["audio_model.audio_encoder.norm"], config=config, device="cpu")

    def bare(model: Any, b: dict[str, Any]) -> object:
        return model.get_audio_features(input_features=b["input"], is_longer=torch.zeros(len(b["input"]), 1) > 0)

    held = {"val_share": 0.0, "test_share": 0.0, "examples_per_forward": n}
    return Specimen(AudioFolder(str(root), window_s=10.0, source=source, **held), bare)


def timm(size: Size, folder: Path) -> Specimen:
    """ViT-S/16."""
    config = {"depth": 10, "embed_dim": 32, "num_heads": 2} if size.toy else {}
    return _images(size, folder, Timm("vit_small_patch16_224", ["blocks.9"], config=config, device="cpu"), _first)


def torchvision(size: Size, folder: Path) -> Specimen:
    """ResNet-50."""
    source = Torchvision("resnet50", ["layer3"], image_size=48 if size.toy else None, device="cpu")
    return _images(size, folder, source, _first)


def vision_encoder(size: Size, folder: Path) -> Specimen:
    """DINOv2-S/14."""
    shape = (32, 2) if size.toy else (384, 6)
    config = {"model_type": "dinov2", "hidden_size": shape[0], "num_attention_heads": shape[1], "image_size": 224}
    source = VisionEncoder("random", ["encoder.layer.9"], config={**config, "patch_size": 14}, device="cpu")
    return _images(size, folder, source, lambda model, b: model(pixel_values=b["input"]))


def vision_language(size: Size, folder: Path) -> Specimen:
    """A LLaVA with the processor of the miniature."""
    from transformers import AutoConfig

    from mmsae.sources.weights import located

    config = AutoConfig.from_pretrained(located("miniature:lmm")).to_dict()
    if not size.toy:
        config["text_config"] |= {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
        config["text_config"] |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    root, n = folder / "pictures", size.batch * size.batches
    pictures(root, n)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red three at the top."}]
    talks = folder / "talks.jsonl"
    talks.write_text("\n".join(json.dumps({"image": f"{i:04d}.jpg", "conversations": turns}) for i in range(n)))
    layer = config["text_config"]["num_hidden_layers"] // 2
    source = VisionLanguage(
        "miniature:lmm", [f"model.language_model.layers.{layer}"], config=config, dtype="float32", device="cpu"
    )
    held = {"val_share": 0.0, "test_share": 0.0, "examples_per_forward": size.batch}
    data = Conversations(str(talks), images=str(root), source=source, **held)
    return Specimen(
        data,
        lambda model, b: model(
            input_ids=b["input_ids"], attention_mask=b["attention_mask"], **b["inputs"], use_cache=False
        ),
    )


def diffusion(size: Size, folder: Path) -> Specimen:
    """The miniature, drawing eight steps and read at one half way."""
    source = Diffusion(
        "miniature:diffusion", ["unet.mid_block.attentions.0:delta"], steps=2 if size.toy else 8, timesteps=[500],
        device="cpu",
    )  # fmt: skip
    n = size.batch if size.toy else 2 * size.batch
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"a red 3 at the top, number {i}" for i in range(n * size.batches)))
    held = {"val_share": 0.0, "test_share": 0.0, "examples_per_forward": n}
    data = Prompts(str(prompts), source=source, **held)

    def bare(model: Any, b: dict[str, Any]) -> object:
        draws = [torch.Generator().manual_seed(seed) for seed in b["noise_seed"].tolist()]
        return source.pipe(b["prompt"], num_inference_steps=source.steps, generator=draws, output_type="latent")

    return Specimen(data, bare)


def signal(size: Size, folder: Path) -> Specimen:
    """ViT-XS of ECG-JEPA on ten seconds of twelve leads at 500 Hz."""
    shape = {"dim": 16, "depth": 2, "heads": 2} if size.toy else {"dim": 192, "depth": 8, "heads": 4}
    source = Signal("ECGJEPA", [f"blocks.{shape['depth'] // 2}"], config={"patch": 25, **shape}, device="cpu")
    n = size.batch if size.toy else 2 * size.batch
    data = SimulatedECGs(n * size.batches, 1, 1, seconds=10.0, rate=500, source=source, examples_per_forward=n)
    return Specimen(data, _first)


class Noise(ActivationDataModule):
    """Tensors of noise.

    Args:
        n: How many.
        shape: Of one.
        kwargs: See `ActivationDataModule`.
    """

    def __init__(self, n: int, shape: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n, self.shape = n, shape

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """They lie in memory."""
        rows = torch.randn(self.n, *self.shape, generator=torch.Generator().manual_seed(0))
        return [{"input": row, "sample_id": i} for i, row in enumerate(rows)]  # type: ignore[return-value]


def custom(size: Size, folder: Path) -> Specimen:
    """PyTorch's own transformer encoder on 128 x 256 numbers."""
    shape, depth = ((8, 16), 2) if size.toy else ((128, 256), 6)
    layer = nn.TransformerEncoderLayer(shape[1], 4, 4 * shape[1], batch_first=True)
    model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    source = Custom(model, [f"layers.{depth // 2}"], modality="other", input_shape=shape, device="cpu")
    data = Noise(size.batch * size.batches, shape, source=source, examples_per_forward=size.batch)
    return Specimen(data, _first)


def paired(size: Size, folder: Path) -> Specimen:
    """Both towers of a CLIP ViT-B/32 on captioned pictures."""
    from datamodules import ImageText

    pictures(folder / "pictures", size.batch * size.batches)
    texts = sentences(size.batch * size.batches, 12)
    rows = [json.dumps({"file": f"pictures/{i:04d}.jpg", "text": text}) for i, text in enumerate(texts)]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    words = words_tokenizer(folder)
    vision: dict[str, Any] = {"patch_size": 32}
    text: dict[str, Any] = {"vocab_size": 1000, "num_hidden_layers": 6, "bos_token_id": 0, "eos_token_id": 2}
    if size.toy:
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        vision, text = vision | small, text | small
    config = {"model_type": "clip", "vision_config": vision, "text_config": text}
    inner = HFCLIP("random", ["visual_projection"], config=config, device="cpu")
    from transformers import AutoTokenizer

    inner._tokenizer = AutoTokenizer.from_pretrained(words)
    source = PairedEmbeddings(inner)

    def bare(model: Any, b: dict[str, Any]) -> object:
        seen = model.get_image_features(pixel_values=b["image"]["input"])
        read = model.get_text_features(**{k: b["text"][k] for k in ("input_ids", "attention_mask")})
        return seen, read

    held = {"val_share": 0.0, "test_share": 0.0, "examples_per_forward": size.batch}
    return Specimen(ImageText(str(folder / "pairs.jsonl"), source=source, **held), bare)


SPECIMENS: dict[str, Callable[[Size, Path], Specimen]] = {
    "CausalLM": causal_lm, "TextEncoder": text_encoder, "OpenCLIP": open_clip, "HFCLIP": hf_clip, "CLAP": clap,
    "Timm": timm, "Torchvision": torchvision, "VisionEncoder": vision_encoder, "VisionLanguage": vision_language,
    "Diffusion": diffusion, "Signal": signal, "Custom": custom, "PairedEmbeddings": paired,
}  # fmt: skip
"""By the name of the source."""

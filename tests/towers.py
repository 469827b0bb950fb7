"""Small CLAP and CLIP models of transformers with random weights, and folders that hold them."""

import gzip
import struct

import numpy as np
import torch

WORDS = ["a", "red", "blue", "dog", "bell", "sound", "of", "the"]
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
CLAP_CONFIG = {
    "model_type": "clap",
    "projection_dim": 12,
    "audio_config": {
        "spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 8, "hidden_size": 32, "depths": [2, 2, 2],
        "num_hidden_layers": 3, "num_attention_heads": [2, 2, 2], "window_size": 4,
    },
    "text_config": {**TEXT, "vocab_size": 12, "max_position_embeddings": 10},
}  # fmt: skip


def clip_config(family):
    vision = {**TEXT, "image_size": 32, "patch_size": 8}
    text = {**TEXT, "vocab_size": 12, "max_position_embeddings": 8, "projection_size": 16, "pad_token_id": 1}
    text |= {"bos_token_id": 0, "eos_token_id": 2}
    if family == "siglip2":
        vision["num_patches"] = 16
    return {"model_type": family, "projection_dim": 12, "vision_config": vision, "text_config": text}


def save_words(folder, limit=8):
    """A tokenizer of whole words with the special ids of RoBERTa."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=limit, **special).save_pretrained(folder)
    return folder


def save_clap(folder):
    """A CLAP of one second at 16 kHz, in four pieces of a spectrogram of 16 bands."""
    from transformers import AutoConfig, ClapFeatureExtractor, ClapModel

    torch.manual_seed(0)
    ClapModel(AutoConfig.for_model(**CLAP_CONFIG)).save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16, sampling_rate=16_000, hop_length=64, max_length_s=1, fft_window_size=256, frequency_max=8000,
        truncation="rand_trunc", padding="pad",
    ).save_pretrained(folder)  # fmt: skip
    return save_words(folder)


def save_clip(folder, family):
    from transformers import AutoConfig, AutoModel

    from mmsae.sources import HFCLIP

    torch.manual_seed(0)
    config = clip_config(family)
    AutoModel.from_config(AutoConfig.for_model(**config)).save_pretrained(folder)
    HFCLIP("none", ["x"], config=config).preprocessor.save_pretrained(folder)
    return save_words(folder)


def tone(hertz=440.0, seconds=1.0, rate=16_000, level=0.1):
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def fashion(root, n=20):
    """The four files of FashionMNIST, with n pictures each."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for part, first in (("train", 0), ("t10k", 100)):
        images = (
            np.arange(first, first + n, dtype=np.uint8)[:, None, None] + np.zeros((n, 28, 28), np.uint8)
        ).tobytes()
        labels = bytes(i % 10 for i in range(n))
        for name, head, content in (("images-idx3", (2051, n, 28, 28), images), ("labels-idx1", (2049, n), labels)):
            packed = struct.pack(f">{len(head)}I", *head) + content
            (folder / f"{part}-{name}-ubyte").write_bytes(packed)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(packed))
    return str(root)

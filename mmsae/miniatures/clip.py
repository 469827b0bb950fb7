"""A miniature CLIP of open_clip's own class that knows the scenes; it ships with the package.

`recipes/train_scene_clip.py` trains it. Its folder holds `config.json` and `model.safetensors`, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.errors import MmsaeError
from mmsae.miniatures.captions import FACTORS, words_of, zero_shot_prompts
from mmsae.miniatures.scenes import Scenes

if TYPE_CHECKING:
    from open_clip import CLIP

FOLDER = Path(__file__).parent / "scene_clip"


class WordTokenizer:
    """Turns captions into ids, one for each word; called like the tokenizers of open_clip.

    open_clip reads the text embedding where the id is largest, so the end token comes last in the vocabulary.

    Args:
        words: The known words.
        context_length: Length that every row of ids is padded or cut to.
    """

    pad, unknown, start = 0, 1, 2

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        self.words = list(words)
        self.context_length = context_length
        self.names = ["", "<unknown>", "<start>", *self.words, "<end>"]
        self.ids = {word: index for index, word in enumerate(self.names)}
        self.end = len(self.names) - 1

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Ids [n, context_length] of one caption or of n captions; a caption too long is cut, its end token is kept."""
        length = context_length or self.context_length
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.full((len(texts), length), self.pad)
        for row, text in zip(ids, texts, strict=True):
            words = [self.ids.get(word, self.unknown) for word in words_of(text)]
            sentence = [self.start, *words[: length - 2], self.end]
            row[: len(sentence)] = torch.tensor(sentence)
        return ids

    def decode(self, ids: Tensor) -> str:
        """The words of one row of ids."""
        return " ".join(self.names[i] for i in ids.tolist() if i not in (self.pad, self.start, self.end))


class Preprocess:
    """Turns a picture into the normalised float tensor [3, size, size] that the model reads.

    Args:
        size: Side in pixels; pictures of another size are resized.
        mean: Mean of the red, green and blue values, which are in 0..1.
        std: Their standard deviation.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.size = size
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return self.batch(np.array(image.convert("RGB"))[None])[0]

    def batch(self, pixels: np.ndarray) -> Tensor:
        """The same for pixels that are already there, uint8 [n, size, size, 3]."""
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - self.mean) / self.std


def build(config: dict[str, Any]) -> tuple[CLIP, Preprocess, WordTokenizer]:
    """The model with random weights, its preprocessing and its tokenizer, from the content of a `config.json`."""
    try:
        from open_clip import CLIP
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    except ImportError as error:
        raise MmsaeError("The miniature CLIP needs open_clip: pip install 'mmsae[clip]'.") from error
    shape = config["model_cfg"]
    tokenizer = WordTokenizer(config["vocabulary"], shape["text_cfg"]["context_length"])
    text_cfg = CLIPTextCfg(**shape["text_cfg"], vocab_size=len(tokenizer.names))
    model = CLIP(shape["embed_dim"], CLIPVisionCfg(**shape["vision_cfg"]), text_cfg)
    return model, Preprocess(shape["vision_cfg"]["image_size"], **config["preprocess_cfg"]), tokenizer


def scene_clip(folder: str | Path = FOLDER) -> tuple[CLIP, Preprocess, WordTokenizer]:
    """The trained miniature in eval mode and float32, its preprocessing and its tokenizer.

    Args:
        folder: Where `config.json` and `model.safetensors` are; by default the ones that ship with the package.
    """
    folder = Path(folder)
    if missing := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
        raise MmsaeError(f"{folder} has no {' and no '.join(missing)}; recipes/train_scene_clip.py writes them.")
    model, preprocess, tokenizer = build(json.loads((folder / "config.json").read_text()))
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.eval(), preprocess, tokenizer


@torch.no_grad()
def zero_shot(model: CLIP, tokenizer: WordTokenizer, factor: str) -> Tensor:
    """A classifier of one factor out of words: unit rows [n_values, embed_dim], in the order of `FACTORS[factor]`."""
    device = next(model.parameters()).device
    return normalize(model.encode_text(tokenizer(zero_shot_prompts(factor)).to(device)), dim=-1)


@torch.no_grad()
def zero_shot_accuracy(
    model: CLIP, preprocess: Preprocess, tokenizer: WordTokenizer, scenes: Scenes, batch_size: int = 250
) -> dict[str, float]:
    """How often the prompt nearest to a scene is the true one, for every factor, as a fraction."""
    device = next(model.parameters()).device
    starts = range(0, len(scenes), batch_size)
    pixels = (np.stack([scenes.pixels(i) for i in range(s, min(s + batch_size, len(scenes)))]) for s in starts)
    embedded = torch.cat([model.encode_image(preprocess.batch(p).to(device)).float() for p in pixels])
    labels = scenes.labels()
    accuracy = {}
    for factor in FACTORS:
        guess = (embedded @ zero_shot(model, tokenizer, factor).float().T).argmax(dim=1)
        accuracy[factor] = float((guess.cpu().numpy() == labels[factor]).mean())
    return accuracy

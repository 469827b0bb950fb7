"""A CLIP model that looks at drawn pictures: what they show, how well they fit their prompt, how they changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.errors import MmsaeError
from mmsae.sources.clip import OpenCLIP, SceneCLIP
from mmsae.sources.hf_clip import HFCLIP
from mmsae.sources.two_towers import TwoTowers

MINIATURE = "miniature:clip"


class PictureJudge:
    """Both towers of a CLIP model.

    Args:
        towers: The model; its hook points are not used.
        prompts: Factor to one text for each of its values, for `classify`; by default those of the source.
        batch_size: Pictures at a time.
    """

    def __init__(
        self, towers: TwoTowers, prompts: Mapping[str, Sequence[str]] | None = None, batch_size: int = 64
    ) -> None:
        self.images, self.batch_size = towers.with_tower("image"), batch_size
        self.prompts = {k: list(v) for k, v in (towers.prompts if prompts is None else prompts).items()}
        self._known: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls, name: str = MINIATURE, prompts: Mapping[str, Sequence[str]] | None = None, device: str = "auto"
    ) -> PictureJudge:
        """A judge by name.

        Args:
            name: "miniature:clip"; "ViT-B-32:laion2b_s34b_b79k", a model of open_clip and a tag or a file of weights;
                or a folder or hub id of a CLIP or SigLIP of transformers.
            prompts: See the class.
            device: As for sources.
        """
        if name == MINIATURE:
            return cls(SceneCLIP(["visual"], device=device), prompts)
        if ":" in name and not Path(name).exists() and not name.startswith("hf-hub:"):
            model, tag = name.split(":", 1)
            return cls(OpenCLIP(model, ["visual"], pretrained=tag, device=device), prompts)
        if name.startswith("hf-hub:") or (Path(name) / "open_clip_config.json").is_file():
            return cls(OpenCLIP(name, ["visual"], device=device), prompts)
        return cls(HFCLIP(name, ["vision_model"], device=device), prompts)

    def pictures(self, pictures: Tensor) -> Tensor:
        """Unit embeddings `[n, embed_dim]` of pictures `[n, 3, H, W]` in 0..1."""
        source, found = self.images, []
        for part in pictures.split(self.batch_size):
            items = [{"sample_id": i, "image": picture} for i, picture in enumerate(to_pil(part))]
            with torch.no_grad():
                found.append(normalize(source.forward(source.collate(items)).float(), dim=-1).cpu())
        return torch.cat(found)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings `[n, embed_dim]` of texts."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known.update(zip(new, self.images.embed_texts(new).cpu(), strict=True))
        return torch.stack([self._known[text] for text in texts])

    def classify(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """Number of the nearest text for each picture, int64 `[n]`; `pictures` may be their embeddings `[n, d]`."""
        embedded = self.pictures(pictures) if pictures.dim() == 4 else pictures
        return (embedded @ self.texts(texts).T).argmax(1)

    def factors(self, pictures: Tensor) -> dict[str, np.ndarray]:
        """The value of every factor of `prompts` that is seen in each picture, int64 `[n]`."""
        if not self.prompts:
            raise MmsaeError("the judge has no prompts to classify with: give a factor and a text for each value.")
        embedded = self.pictures(pictures) if pictures.dim() == 4 else pictures
        return {factor: self.classify(embedded, texts).numpy() for factor, texts in self.prompts.items()}

    def clip_score(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 times the cosine of picture and prompt, at least 0, `[n]` (arXiv 2104.08718, with the weight 100)."""
        embedded = self.pictures(pictures) if pictures.dim() == 4 else pictures
        return 100 * (embedded * self.texts(prompts)).sum(-1).clamp_min(0)

    def directional(self, before: Tensor, after: Tensor, towards: str, neutral: str) -> Tensor:
        """CLIP directional similarity: cosine of the pictures' change with that from one text to another, `[n]`.

        Args:
            before: Pictures, or their embeddings.
            after: The same, steered.
            towards: The text that describes what they should become.
            neutral: The text that describes what they were.
        """
        ours = [self.pictures(x) if x.dim() == 4 else x for x in (before, after)]
        wanted, plain = self.texts([towards, neutral])
        return torch.nn.functional.cosine_similarity(ours[1] - ours[0], (wanted - plain)[None], dim=-1)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Pictures of PIL of a tensor `[n, 3, H, W]` in 0..1."""
    values = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in values]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """A 95 % interval of a share (Wilson)."""
    z, share = 1.96, successes / n
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

"""Prompts with known factors for the miniature diffusion model."""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

from PIL import Image
from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items, cut
from mmsae.errors import checked
from mmsae.miniatures.captions import FACTORS, compose
from mmsae.miniatures.scene_diffusion import DRAWN, DrawnScenes


class ScenePrompts(ActivationDataModule):
    """Captions such as "a red seven at the top left" with digit, colour and position as labels.

    The 720 combinations are dealt out, so that no prompt is in two splits; a combination comes back with other noise.

    Args:
        n_train: Prompts to train on.
        n_val: Prompts to choose latents on.
        n_test: Prompts to measure on.
        pictures: Give pictures of scenes with their captions, for `mode=noise`; any combination is then in any split,
            but the handwritten digits of the splits differ.
        scene_seed: Of the scenes.
        **kwargs: See `ActivationDataModule`.
    """

    factors: ClassVar[dict[str, tuple[str, ...]]] = {factor: FACTORS[factor] for factor in DRAWN}

    def __init__(
        self,
        n_train: int = 2000,
        n_val: int = 300,
        n_test: int = 300,
        pictures: bool = False,
        scene_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.n_train = checked("n_train", n_train, 1)
        self.n_val = checked("n_val", n_val, 1)
        self.n_test = checked("n_test", n_test, 1)
        self.pictures, self.scene_seed = pictures, scene_seed

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Captions and labels, and pictures if they are wanted."""
        n = {"train": self.n_train, "val": self.n_val, "test": self.n_test}[split]
        if self.pictures:
            scenes = DrawnScenes(split, n, self.scene_seed)

            def show(index: int, sample_id: int) -> dict[str, Any]:
                labels = {factor: int(values[index]) for factor, values in scenes.labels.items()}
                image = Image.fromarray(scenes.pixels(index))
                return {"text": scenes.caption(index), "image": image, "sample_id": sample_id, "labels": labels}

            return Items(range(n), show)
        everything = list(product(*(range(len(values)) for values in self.factors.values())))
        own = [everything[i] for i in cut(len(everything), split, 0.15, 0.15, self.scene_seed)]
        own = [own[i * 389 % len(own)] for i in range(len(own))]  # 389 is prime: all of them, neighbours far apart

        def make(index: int, sample_id: int) -> dict[str, Any]:
            labels = dict(zip(self.factors, own[index % len(own)], strict=True))
            return {"text": compose(labels), "sample_id": sample_id, "labels": labels}

        return Items(range(n), make)

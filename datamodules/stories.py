"""Stories with known factors, for models of text."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items
from mmsae.errors import checked
from mmsae.miniatures.stories import FACTORS, FEELINGS
from mmsae.miniatures.stories import Stories as StorySet


class Stories(ActivationDataModule):
    """Short stories of which name, animal, number, colour, place, object, sentiment and tense are known.

    The miniature language model was trained on them: `--data.source=CausalLM --data.source.model=miniature:text`.
    Labels are those of the whole story. Splits are different stories.

    Args:
        n_train: Stories to train on.
        n_val: Stories to choose latents on.
        n_test: Stories to measure on.
        dialogues: Whether a user tells each story and asks about it, as `messages`; then rows carry `role`.
        story_seed: Of the stories.
        **kwargs: See `ActivationDataModule`.
    """

    factors: ClassVar[dict[str, tuple[str, ...]]] = FACTORS
    said: ClassVar[dict[str, tuple[tuple[str, ...], ...]]] = {
        "animal": tuple((animal, f"{animal}s") for animal in FACTORS["animal"]),
        "sentiment": (FEELINGS["sad"], FEELINGS["happy"]),
        "gender": (("she", "her"), ("he", "his", "him")),
    }
    """Words that tell a value of a label, where they are not its name alone."""

    def __init__(
        self,
        n_train: int = 6000,
        n_val: int = 1000,
        n_test: int = 1000,
        dialogues: bool = False,
        story_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.n_train = checked("n_train", n_train, 1)
        self.n_val = checked("n_val", n_val, 1)
        self.n_test = checked("n_test", n_test, 1)
        self.dialogues, self.story_seed = dialogues, story_seed

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Texts, or dialogues, with labels."""
        n = {"train": self.n_train, "val": self.n_val, "test": self.n_test}[split]
        stories = StorySet(split, n, self.story_seed)
        return Items(range(len(stories)), lambda index, _: stories.dialogue(index)) if self.dialogues else stories

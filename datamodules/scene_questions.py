"""Questions about the embedded scenes, for multimodal models."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from mmsae.errors import checked
from mmsae.miniatures.questions import BEHIND, LABELS, OPEN
from mmsae.miniatures.questions import SceneQuestions as QuestionSet


class SceneQuestions(ActivationDataModule):
    """Scenes of known digit, colour, position, size and background, with a question and the right answer as `messages`.

    Half of the yes-or-no questions name a value that is not there, to measure false presence. The miniature multimodal
    model was trained on them: `--data.source=VisionLanguage --data.source.model=miniature:lmm`. Labels are the factors
    of the scene, the `form` of the question, the factor that is `asked`, and whether the `answer` is yes or no. The
    splits have different handwritten digits.

    Args:
        n_train: Scenes to train on.
        n_val: Scenes to choose latents on.
        n_test: Scenes to measure on.
        turns: Questions about each scene; labels tell of the first.
        form: Only questions of this form; by default they are mixed.
        scene_seed: Of the scenes and questions.
        **kwargs: See `ActivationDataModule`.
    """

    factors: ClassVar[dict[str, tuple[str, ...]]] = LABELS
    questions: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        factor: (question, tuple(f"{BEHIND.get(value, value)}." for value in LABELS[factor]))
        for factor, question in OPEN.items()
    }
    """Label to a question that asks for it, and the answer for each of its values."""

    def __init__(
        self,
        n_train: int = 6000,
        n_val: int = 1000,
        n_test: int = 1000,
        turns: int = 1,
        form: Literal["open", "yes or no", "caption"] | None = None,
        scene_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.n_train = checked("n_train", n_train, 1)
        self.n_val = checked("n_val", n_val, 1)
        self.n_test = checked("n_test", n_test, 1)
        self.turns, self.form, self.scene_seed = turns, form, scene_seed

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Pictures, messages and labels."""
        n = {"train": self.n_train, "val": self.n_val, "test": self.n_test}[split]
        return QuestionSet(split, n, self.turns, self.form, self.scene_seed)

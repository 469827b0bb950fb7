"""Questions about the scenes, with the right answers: what the miniature multimodal model is asked.

An open question asks for the value of a factor; a yes-or-no question names a value, the true one in half of the cases,
so that "yes" to the others is a false presence, as in tests of hallucination.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from mmsae.errors import MmsaeError, checked
from mmsae.miniatures.captions import FACTORS, compose
from mmsae.miniatures.scenes import SPLITS, Scenes

FORMS = ("open", "yes or no", "caption")
OPEN = {
    "digit": "which digit is it?",
    "colour": "what colour is the digit?",
    "position": "where is the digit?",
    "size": "how large is the digit?",
    "background": "what is behind the digit?",
}
CLOSED = {
    "digit": ("is there {a} {value}?", "is the digit {a} {value}?"),
    "colour": ("is there {a} {value} digit?", "is the digit {value}?"),
    "position": ("is the digit at the {value}?",),
    "size": ("is the digit {value}?",),
    "background": ("is the background {value}?",),
}
BEHIND = {
    "plain": "nothing", "striped": "stripes", "checkered": "checks", "flower": "a flower", "building": "a building",
}  # fmt: skip
ANSWERS = ("no", "yes")
CAPTION = "describe the picture."
SHARES = {"open": (0.4, 0.15, 0.15, 0.15, 0.15), "yes or no": (0.2, 0.3, 0.1, 0.3, 0.1)}
"""How often each factor is asked for: the digit is the hardest to see, colour and size the hardest to compare."""
LABELS: dict[str, tuple[str, ...]] = {
    **FACTORS, "form": FORMS, "asked": (*FACTORS, "all"), "answer": (*ANSWERS, "neither"),
}  # fmt: skip
"""Labels of an item: those of its scene, the form of the question, what it asks for, and whether it is yes or no."""


class SceneQuestions(Dataset):
    """Scenes with questions and answers as messages; a pure function of split, seed and index.

    Args:
        split: Which digits to draw from.
        n: Number of scenes.
        turns: Questions about each scene, one after the other; labels tell of the first.
        form: Only questions of this form; None mixes them.
        seed: Another seed gives other scenes and questions.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"],
        n: int,
        turns: int = 1,
        form: Literal["open", "yes or no", "caption"] | None = None,
        seed: int = 0,
    ) -> None:
        if form is not None and form not in FORMS:
            raise MmsaeError(f"form={form!r} is unknown; choose {', '.join(map(repr, FORMS))}.")
        self.scenes = Scenes(split, n, seed)
        self._labels = self.scenes.labels()
        self.turns = checked("turns", turns, 1)
        self.form = form

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.scenes[index], **self.asked(index)}

    def asked(self, index: int, again: int = 0) -> dict[str, Any]:
        """All of an item but the picture.

        Args:
            index: Of the scene.
            again: Another number asks other questions about the same scene.
        """
        labels = {factor: int(values[index]) for factor, values in self._labels.items()}
        split = list(SPLITS).index(self.scenes.split)
        draw = np.random.default_rng([self.scenes.seed, split, int(index) % len(self), again])
        messages: list[dict[str, Any]] = []
        told: dict[str, int] = {}
        for turn in range(self.turns):
            question, answer, about = _question(draw, labels, self.form)
            told = told or about
            content = [{"type": "image"}] if turn == 0 else []
            messages += [
                {"role": "user", "content": [*content, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        return {"messages": messages, "sample_id": int(index) % len(self), "labels": {**labels, **told}}


def _question(draw: np.random.Generator, labels: dict[str, int], form: str | None) -> tuple[str, str, dict[str, int]]:
    """A question, its answer, and its labels."""
    form = form or str(draw.choice(FORMS, p=(0.3, 0.55, 0.15)))
    about = {"form": FORMS.index(form), "answer": len(ANSWERS)}
    if form == "caption":
        return CAPTION, compose(labels) + ".", about | {"asked": len(FACTORS)}
    factor = str(draw.choice(list(FACTORS), p=SHARES[form]))
    about["asked"] = list(FACTORS).index(factor)
    values, truth = FACTORS[factor], labels[factor]
    if form == "open":
        value = values[truth]
        return OPEN[factor], (BEHIND[value] if factor == "background" else value) + ".", about
    yes = bool(draw.integers(2))
    others = [i for i in range(len(values)) if i != truth]
    value = values[truth if yes else others[int(draw.integers(len(others)))]]
    article = "an" if value[0] in "aeiou" and value != "one" else "a"
    options = CLOSED[factor]
    question = options[int(draw.integers(len(options)))].format(a=article, value=value)
    return question, ANSWERS[yes] + ".", about | {"answer": int(yes)}

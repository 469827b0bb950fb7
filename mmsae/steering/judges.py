"""Judges of steered texts: concept, instruction and fluency as AxBench asks for them (arXiv 2501.17148)."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mmsae.errors import MmsaeError

ASPECTS = {
    "concept": "How far does the text speak of this concept: {concept}?",
    "instruction": "How far does the text do what was asked, or go on with what was begun: {instruction}?",
    "fluency": "How fluent is the text, as English?",
}
FORM = (
    "{question}\n\nText:\n{text}\n\nAnswer with one number: 0 (not at all), 1 (partly) or 2 (fully). "
    "Write it as `Rating: N`."
)


class Prompt(NamedTuple):
    """A question to a judge.

    Attributes:
        text: For a model.
        about: The same in parts, for judges that are programs: `aspect`, `concept`, `instruction`, `text`.
    """

    text: str
    about: Mapping[str, Any] = {}


class Reply(NamedTuple):
    """What a judge says.

    Attributes:
        text: With a rating.
        logprobs: Of single answers, where the judge tells them.
    """

    text: str
    logprobs: Mapping[str, float] | None = None


class Judge(ABC):
    """Answers questions: a model behind an interface, a local model, or a program."""

    @abstractmethod
    def ask(self, prompts: Sequence[Prompt]) -> Sequence[Reply]:
        """One reply for each prompt, in their order."""


class RuleJudge(Judge):
    """Rates by counting words, offline. It cannot read: use it to compare ways of steering, not to praise one.

    Concept: 2 if words of the concept are said at least twice, 1 if once. Instruction: 2 if at least two of the longer
    words of the instruction (five letters and more) are said again, 1 if one is. Fluency: 2 if at least 80 % of the
    pairs of neighbouring words differ from each other, 1 if half of them do; one less if more than a tenth of the words
    are unknown.

    Args:
        words: Words of the concept; by default those of the prompt.
        vocabulary: Known words; None knows all.
    """

    def __init__(self, words: Sequence[str] | None = None, vocabulary: Sequence[str] | None = None) -> None:
        self.words = words
        self.vocabulary = None if vocabulary is None else {word.lower() for word in vocabulary}

    def ask(self, prompts: Sequence[Prompt]) -> list[Reply]:
        """See the class."""
        return [Reply(f"Rating: {self._rating(prompt.about)}") for prompt in prompts]

    def _rating(self, about: Mapping[str, Any]) -> int:
        if not {"aspect", "concept", "instruction", "text"} <= set(about):
            raise MmsaeError("RuleJudge reads the parts of a prompt, and this one has none: give about=.")
        said = _words(about["text"])
        if about["aspect"] == "concept":
            wanted = {w.lower() for w in (self.words or _words(about["concept"]))}
            return min(2, sum(word in wanted for word in said))
        if about["aspect"] == "instruction":
            return min(2, len({w for w in _words(about["instruction"]) if len(w) > 4} & set(said)))
        pairs = list(pairwise(said))
        if not pairs:
            return 0
        fresh = len(set(pairs)) / len(pairs)
        rating = 2 if fresh >= 0.8 else int(fresh >= 0.5)
        if self.vocabulary is not None and np.mean([word not in self.vocabulary for word in said]) > 0.1:
            rating -= 1
        return max(rating, 0)


def axbench(judge: Judge, concept: str, instructions: Sequence[str], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Ratings 0 to 2 of steered texts, and `overall`, their harmonic mean, which is 0 as soon as one of them is.

    Args:
        judge: Asked three questions about each text.
        concept: In words.
        instructions: What each text answers or continues.
        texts: Steered texts.

    Raises:
        MmsaeError: A reply has no rating.
    """
    if len(instructions) != len(texts):
        raise MmsaeError(f"{len(texts)} texts do not fit {len(instructions)} instructions.")
    found = {}
    for aspect, question in ASPECTS.items():
        prompts = []
        for instruction, text in zip(instructions, texts, strict=True):
            about = {"aspect": aspect, "concept": concept, "instruction": instruction, "text": text}
            asked = question.format(concept=concept, instruction=instruction)
            prompts.append(Prompt(FORM.format(question=asked, text=text), about))
        found[aspect] = np.array([rating(reply) for reply in judge.ask(prompts)])
    parts = np.stack(list(found.values()))
    whole = (parts > 0).all(0)
    overall = np.where(whole, len(parts) / (1 / np.where(whole, parts, 1)).sum(0), 0.0)
    return found | {"overall": overall}


def rating(reply: Reply) -> float:
    """The number from 0 to 2 in a reply."""
    found = re.search(r"rating\D{0,3}([0-2](?:\.\d+)?)\b", reply.text, re.I) or re.fullmatch(
        r"\s*([0-2](?:\.\d+)?)\s*", reply.text
    )
    if not found or float(found[1]) > 2:
        raise MmsaeError(f"the judge gave no rating from 0 to 2, but said {reply.text[:80]!r}.")
    return float(found[1])


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())

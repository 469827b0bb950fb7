"""Does a multimodal model speak of what is not there? The measures of POPE and CHAIR."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmsae.errors import MmsaeError

NOT = frozenset({"no", "not"})


class Polling(NamedTuple):
    """Answers to yes-or-no questions about presence (POPE, arXiv 2305.10355); "yes" is the positive class.

    Attributes:
        accuracy: Share of right answers.
        precision: Share of "yes" that is right; NaN without a "yes".
        recall: Share of what is there that is confirmed; NaN if nothing is there.
        f1: Their harmonic mean, 0 if nothing is right.
        yes_rate: Share of "yes".
        false_presence: Share of "yes" among questions for what is not there; NaN without such questions.
        n: Questions.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_rate: float
    false_presence: float
    n: int


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer: its first sentence is a "yes" unless it holds the word "no" or "not".

    So an evasive answer counts as "yes", as in the paper's script; only capitals and punctuation do not matter.
    """
    return NOT.isdisjoint(re.findall(r"[a-z']+", answer.split(".")[0].lower()))


def polling(said: Sequence[bool], truth: Sequence[bool]) -> Polling:
    """Score answers.

    Args:
        said: Whether the model says yes.
        truth: Whether it should.
    """
    yes, there = np.asarray(said, bool), np.asarray(truth, bool)
    if yes.shape != there.shape or not len(yes):
        raise MmsaeError(f"there are {len(yes)} answers to {len(there)} questions: give one to each, and at least one.")
    hits, false, missed = (int(x.sum()) for x in (yes & there, yes & ~there, ~yes & there))
    absent = int((~there).sum())
    return Polling(
        accuracy=float((yes == there).mean()),
        precision=_share(hits, hits + false),
        recall=_share(hits, hits + missed),
        f1=2 * hits / max(2 * hits + false + missed, 1),
        yes_rate=float(yes.mean()),
        false_presence=_share(false, absent),
        n=len(yes),
    )


class Question(NamedTuple):
    """One line of a POPE file.

    Attributes:
        image: File name of the picture.
        text: The question.
        present: Whether "yes" is right.
    """

    image: str
    text: str
    present: bool


def read_polling(path: str | Path) -> list[Question]:
    """Questions of a file of POPE: one JSON object a line with `image`, `text` and `label` (yes or no).

    The published files are called `coco_pope_random.json`, `…_popular.json` and `…_adversarial.json`.
    """
    questions = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            label = str(row["label"]).lower()
            question = Question(str(row["image"]), str(row["text"]), label == "yes")
        except (ValueError, KeyError, TypeError) as error:
            raise MmsaeError(
                f"line {number} of {path} is no question of POPE ({type(error).__name__}: {error}); each is a JSON "
                "object with image, text and label."
            ) from error
        if label not in ("yes", "no"):
            raise MmsaeError(f"line {number} of {path} has the label {label!r}; POPE has yes and no.")
        questions.append(question)
    if not questions:
        raise MmsaeError(f"{path} holds no questions.")
    return questions


class Hallucination(NamedTuple):
    """What captions state that is not there (CHAIR, arXiv 1809.02156).

    Attributes:
        chair_s: Share of captions that state something that is not there.
        chair_i: Share of what is stated, each time it is stated, that is not there; NaN if nothing is.
        recall: Share of what is there that is stated, over all pictures; NaN if nothing is there.
        n: Captions.
    """

    chair_s: float
    chair_i: float
    recall: float
    n: int


def chair(stated: Iterable[Sequence[str]], present: Iterable[Iterable[str]]) -> Hallucination:
    """Score captions.

    Args:
        stated: Of each caption the objects that it states, one entry each time.
        present: Of each picture the objects that are there.
    """
    captions = wrong_captions = mentions = wrong = found = there = 0
    for said, truth in zip(stated, present, strict=True):
        known = set(truth)
        false = sum(one not in known for one in said)
        captions, mentions, wrong = captions + 1, mentions + len(said), wrong + false
        wrong_captions += false > 0
        found, there = found + len(known & set(said)), there + len(known)
    if not captions:
        raise MmsaeError("there are no captions to score.")
    return Hallucination(wrong_captions / captions, _share(wrong, mentions), _share(found, there), captions)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise MmsaeError(
            f"{path} cannot be read ({error.strerror}): give a file of POPE, one JSON object a line."
        ) from error

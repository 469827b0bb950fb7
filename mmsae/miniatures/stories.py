"""Short stories with known factors, and dialogues about them: what the miniature language model reads.

A story is written by a small grammar. Each factor is told early and needed again later: a name, an animal, its number
and colour, a place, an object, a mood and a tense. So a model has to look back, and to agree in number and tense.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from mmsae.errors import MmsaeError, checked

FACTORS: dict[str, tuple[str, ...]] = {
    "name": ("anna", "clara", "emma", "mia", "nora", "sara", "adam", "ben", "leo", "max", "tom", "paul"),
    "gender": ("she", "he"),
    "animal": ("dog", "cat", "bird", "horse", "rabbit", "duck", "frog", "goat"),
    "number": ("one", "many"),
    "colour": ("red", "orange", "yellow", "green", "blue", "white", "black", "brown"),
    "place": ("garden", "river", "forest", "market", "school", "beach", "farm", "castle"),
    "object": ("ball", "kite", "book", "drum", "lamp", "boat", "rope", "basket"),
    "sentiment": ("sad", "happy"),
    "tense": ("past", "present"),
}
"""Factor to its values. The gender follows from the name; every other factor is drawn by itself."""
SPLITS = ("train", "val", "test")
GIRLS = 6  # of the names, the first ones
FEELINGS = {"sad": ("sad", "afraid", "lonely", "tired"), "happy": ("happy", "glad", "proud", "cheerful")}
ENDINGS = {
    "sad": ("the {object} {was} lost in the {place}", "it {began} to rain", "the {object} {was} broken"),
    "happy": ("the {object} {was} found in the {place}", "the sun {came} out", "the {object} {was} as good as new"),
}
DEEDS = {
    "sad": ("{ran} away", "{hid} under a tree", "{looked} at the ground"),
    "happy": ("{danced} in a circle", "{jumped} up and down", "{played} with the {object}"),
}
VERBS = {
    "was": ("was", "is"), "had": ("had", "has"), "went": ("went", "goes"), "saw": ("saw", "sees"),
    "felt": ("felt", "feels"), "said": ("said", "says"), "took": ("took", "takes"), "came": ("came", "comes"),
    "began": ("began", "begins"), "wanted": ("wanted", "wants"), "walked": ("walked", "walks"),
    "ran": ("ran", "runs"), "hid": ("hid", "hides"), "looked": ("looked", "looks"), "danced": ("danced", "dances"),
    "jumped": ("jumped", "jumps"), "played": ("played", "plays"), "lived": ("lived", "lives"),
}  # fmt: skip
"""Singular forms of both tenses; the plural of the present drops the ending, of `was` it is another word."""
PLURALS = {"was": ("were", "are"), "had": ("had", "have"), "went": ("went", "go")}
COUNTS = ("two", "three", "four")
QUESTIONS = {
    "colour": ("what colour {are} the {animals}?", "{colour}."),
    "animal": ("what did {name} see?", "{a_animal}."),
    "place": ("where did {name} go?", "to the {place}."),
    "object": ("what did {name} take along?", "the {object}."),
    "sentiment": ("how does the story end?", "it ends {ending}."),
    "name": ("who is the story about?", "{name}."),
}


class Stories(Dataset):
    """Stories of five to eight sentences with their factors; a pure function of split, seed and index.

    Args:
        split: The splits are different stories out of the same grammar.
        n: Number of stories.
        seed: Another seed gives other stories.
    """

    def __init__(self, split: Literal["train", "val", "test"], n: int, seed: int = 0) -> None:
        if split not in SPLITS:
            raise MmsaeError(f"the stories have no split {split!r}; they have {', '.join(SPLITS)}.")
        self.split = split
        self.n = checked("n", n, 1)
        self.seed = checked("seed", seed, 0)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw, labels = self._begin(index)
        return {"text": _story(draw, labels), "sample_id": int(index) % self.n, "labels": labels}

    def dialogue(self, index: int) -> dict[str, Any]:
        """The same story, told by a user who asks one to three questions about it; with the right answers."""
        draw, labels = self._begin(index)
        story = _story(draw, labels)
        words = _words(labels)
        asked = draw.permutation(list(QUESTIONS))[: draw.integers(1, 4)]
        messages = []
        for number, key in enumerate(asked):
            question, answer = (part.format(**words) for part in QUESTIONS[str(key)])
            first = f"{story} {question}" if number == 0 else question
            messages += [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "sample_id": int(index) % self.n, "labels": labels}

    def _begin(self, index: int) -> tuple[np.random.Generator, dict[str, int]]:
        if not -self.n <= index < self.n:
            raise IndexError(f"There are {self.n} stories, so there is none of index {index}.")
        draw = np.random.default_rng([self.seed, SPLITS.index(self.split), int(index) % self.n])
        labels = {factor: int(draw.integers(len(values))) for factor, values in FACTORS.items()}
        return draw, labels | {"gender": int(labels["name"] >= GIRLS)}


def _words(labels: dict[str, int]) -> dict[str, str]:
    """The words that the sentences have blanks for."""
    value = {factor: FACTORS[factor][index] for factor, index in labels.items()}
    many, now = value["number"] == "many", value["tense"] == "present"
    girl = value["gender"] == "she"
    animals = value["animal"] + "s" if many else value["animal"]
    article = "an" if value["colour"][0] in "aeiou" else "a"
    one = {verb: forms[now] for verb, forms in VERBS.items()}
    return {
        **value, **one, "animals": animals, "them": "them" if many else "it", "they": "they" if many else "it",
        "her": "her" if girl else "his", "him": "her" if girl else "him",
        "a_animal": animals if many else f"a {animals}", "a_colour": value["colour"] if many else
        f"{article} {value['colour']}", "were": PLURALS["was"][now] if many else VERBS["was"][now],
        "are": "are" if many else "is", "ending": "well" if value["sentiment"] == "happy" else "badly",
        **{f"{verb}_they": plural(verb, many, now) for verb in VERBS},
    }  # fmt: skip


def plural(verb: str, many: bool, now: bool) -> str:
    """A verb as its subject and the tense want it."""
    singular = VERBS[verb][now]
    if not many:
        return singular
    if verb in PLURALS:
        return PLURALS[verb][now]
    return singular.removesuffix("s") if now else singular


def _story(draw: np.random.Generator, labels: dict[str, int]) -> str:
    words = _words(labels)
    mood = words["sentiment"]

    def pick(options: tuple[str, ...]) -> str:
        return options[int(draw.integers(len(options)))]

    def deed(of_animals: bool) -> str:
        text = pick(DEEDS[mood])
        return text.replace("}", "_they}", 1) if of_animals else text

    count = f"{pick(COUNTS)} {words['colour']}" if words["number"] == "many" else words["a_colour"]
    words["count"] = count
    opening = pick((
        "{name} {went} to the {place} with a {object}.",
        "one morning {name} {took} a {object} and {walked} to the {place}.",
        "{name} {lived} near the {place}. {gender} {had} a {object}.",
    ))  # fmt: skip
    meeting = pick((
        "there {gender} {saw} {count} {animals}.",
        "in the {place} {gender} {saw} {count} {animals}.",
        "behind a tree there {were} {count} {animals}.",
    ))  # fmt: skip
    middle = [
        pick(("the {animals} {were} {feeling}.", "the {colour} {animals} {were} {feeling}.")),
        pick(("{gender} {said} hello to the {animals}.", "{gender} {wanted} to play with {them}.")),
        pick(("{name} {felt} {feeling} too.", "{gender} {felt} {feeling}, for {they} {were} {feeling}.")),
        "the {animals} " + deed(True) + ".",
        "{name} " + deed(False) + ".",
        pick(("the {colour} {animals} {looked_they} at {her} {object}.", "{her} {object} {was} in the {place}.")),
    ]
    kept = sorted(draw.permutation(len(middle))[: draw.integers(3, 6)])
    ending = pick((
        "in the end " + pick(ENDINGS[mood]) + ", and {name} and the {animals} {were_all} {feeling}.",
        "then " + pick(ENDINGS[mood]) + ". {name} {went} home with the {animals} and {felt} {feeling}.",
    ))  # fmt: skip
    words["were_all"] = PLURALS["was"][words["tense"] == "present"]
    sentences = []
    for sentence in (opening, meeting, *(middle[i] for i in kept), ending):
        sentences.append(sentence.format(**words, feeling=pick(FEELINGS[mood])))
    return " ".join(sentences)

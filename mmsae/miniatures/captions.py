"""The words of the scenes: which factors there are, what a caption says of them, and which facts a caption states."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mmsae.errors import MmsaeError, nearest

FACTORS: dict[str, tuple[str, ...]] = {
    "digit": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "magenta", "white"),
    "position": (
        "top left", "top", "top right",
        "left", "centre", "right",
        "bottom left", "bottom", "bottom right",
    ),
    "size": ("small", "large"),
    "background": ("plain", "striped", "checkered", "flower", "building"),
}  # fmt: skip

OPENINGS = ("", "this is ", "a picture of ")
PLACES = ("at the {}", "near the {}")
GROUNDS = {
    "plain": ("on a plain background", "on plain paper"),
    "striped": ("on stripes", "on a striped background"),
    "checkered": ("on checks", "on a checkered background"),
    "flower": ("in front of a flower", "on a photograph of a flower"),
    "building": ("in front of a building", "on a photograph of a building"),
}
SYNONYMS = {"stripes": "striped", "checks": "checkered"}


def compose(stated: Mapping[str, int], opening: int = 0, place: int = 0, ground: int = 0) -> str:
    """Write the caption that states exactly the given facts.

    Args:
        stated: Factor name to index of its value; factors left out are not mentioned.
        opening: Which of `OPENINGS` to begin with.
        place: Which of `PLACES` to say the position with.
        ground: Which of the two phrases in `GROUNDS` to say the background with.
    """
    words = {factor: FACTORS[factor][value] for factor, value in stated.items()}
    noun = " ".join([*(words[f] for f in ("size", "colour") if f in words), words.get("digit", "digit")])
    caption = OPENINGS[opening] + ("an " if noun[0] in "aeiou" and noun != "one" else "a ") + noun
    if "position" in words:
        caption += " " + PLACES[place].format(words["position"])
    if "background" in words:
        caption += " " + GROUNDS[words["background"]][ground]
    return caption


def mentions(caption: str) -> dict[str, int]:
    """The facts that a caption states: factor name to index into `FACTORS[factor]`.

    A caption is true of a scene when every fact it states agrees with the scene's labels.
    """
    said = " ".join(SYNONYMS.get(word, word) for word in words_of(caption))
    stated = {}
    for factor, values in FACTORS.items():
        longest_first = sorted(values, key=len, reverse=True)  # else "top left" would be read as "top"
        if found := re.search(rf"\b({'|'.join(longest_first)})\b", said):
            stated[factor] = values.index(found[1])
    return stated


def caption_for(factor: str, value: str | int) -> str:
    """The shortest caption that states one fact: `caption_for("colour", "red")` is "a red digit".

    Args:
        factor: A key of `FACTORS`.
        value: A name in `FACTORS[factor]`, or its index.
    """
    if factor not in FACTORS:
        raise MmsaeError(f"The scenes have no factor {factor!r}; nearest: {nearest(factor, FACTORS)}.")
    values = FACTORS[factor]
    if isinstance(value, str):
        if value not in values:
            raise MmsaeError(f"The factor {factor!r} has no value {value!r}; nearest: {nearest(value, values)}.")
        value = values.index(value)
    elif not 0 <= value < len(values):
        raise MmsaeError(f"The factor {factor!r} has {len(values)} values, so there is none of index {value}.")
    return compose({factor: int(value)})


def zero_shot_prompts(factor: str) -> list[str]:
    """One prompt for each value of a factor, in the order of `FACTORS[factor]`."""
    return [caption_for(factor, index) for index in range(len(FACTORS.get(factor, "?")))]


def words_of(caption: str) -> list[str]:
    """The lower-case words of a caption, without punctuation."""
    return re.findall(r"[a-z]+", caption.lower())


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted."""
    phrases = [*OPENINGS, *PLACES, "a an digit", *(v for values in FACTORS.values() for v in values)]
    phrases += [phrase for pair in GROUNDS.values() for phrase in pair]
    return sorted({word for phrase in phrases for word in words_of(phrase)})

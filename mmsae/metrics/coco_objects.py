"""Objects of COCO in captions and in annotation files, as CHAIR counts them (arXiv 1809.02156)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmsae.errors import MmsaeError

QUALIFIED = {  # of people in front of animals and vehicles, who are not there
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in (
        "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")},
    "passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet",
}  # fmt: skip
IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
             "feet": "foot", "teeth": "tooth", "oxen": "ox"}  # fmt: skip
ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))


class CocoObjects:
    """Finds objects in captions by a list of synonyms.

    Args:
        synonyms: File with an object and its synonyms a line, separated by commas, the name in COCO first:
            `dining table, table, desk`. The list of CHAIR is `data/synonyms.txt` of its repository.
    """

    def __init__(self, synonyms: str | Path) -> None:
        self.name_of: dict[str, str] = {}
        for line in _read(synonyms, "a list of synonyms").splitlines():
            words = [word.strip().lower() for word in line.split(",") if word.strip()]
            for word in words:
                self.name_of.setdefault(word, words[0])
        if not self.name_of:
            raise MmsaeError(f"the list of synonyms {synonyms} is empty: a line holds an object and its synonyms.")
        self._longest = max(len(word.split()) for word in (*self.name_of, *QUALIFIED))
        self._words = {part for term in (*self.name_of, *QUALIFIED) for part in term.split()}

    def stated(self, caption: str) -> list[str]:
        """The objects that a caption states, by their names in COCO, in order, one entry each time.

        Longer terms win ("hot dog" is no dog), plurals count as singulars, and "baby elephant" is no person.
        """
        words = [self._singular(word) for word in re.findall(r"[a-z]+", caption.lower())]
        found, place = [], 0
        while place < len(words):
            for length in range(self._longest, 0, -1):
                term = " ".join(words[place : place + length])
                if len(term.split()) < length:
                    continue
                term = QUALIFIED.get(term, term)
                if term in self.name_of:
                    found.append(self.name_of[term])
                if term in self.name_of or length == 1:
                    place += length
                    break
        return found

    def present(self, instances: str | Path, captions: str | Path | None = None) -> dict[int, set[str]]:
        """The objects in each picture, by its id.

        Args:
            instances: COCO's `instances_*.json`, with `images`, `annotations` and `categories`.
            captions: COCO's `captions_*.json`: what people mention counts as being there, as CHAIR has it.
        """
        held = _json(instances, ("images", "annotations", "categories"))
        names = {row["id"]: row["name"].lower() for row in held["categories"]}
        if unknown := sorted(set(names.values()) - set(self.name_of)):
            raise MmsaeError(f"the list of synonyms does not know COCO's {unknown[0]!r} ({len(unknown)} such names).")
        found: dict[int, set[str]] = {row["id"]: set() for row in held["images"]}
        for row in held["annotations"]:
            found.setdefault(row["image_id"], set()).add(self.name_of[names[row["category_id"]]])
        if captions is not None:
            for row in _json(captions, ("annotations",))["annotations"]:
                if row["image_id"] in found:
                    found[row["image_id"]].update(self.stated(row["caption"]))
        return found

    def _singular(self, word: str) -> str:
        """The form that the list knows; the word itself if it knows none."""
        if word in self._words:
            return word
        stems = [word[: -len(end)] + new for end, new in ENDINGS if word.endswith(end) and len(word) > len(end) + 1]
        return next((one for one in (IRREGULAR.get(word, word), *stems) if one in self._words), word)


def file_names(instances: str | Path) -> dict[int, str]:
    """Id of each picture to its file name."""
    return {row["id"]: row["file_name"] for row in _json(instances, ("images",))["images"]}


def _json(path: str | Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        held = json.loads(_read(path, "an annotation file of COCO"))
    except ValueError as error:
        raise MmsaeError(f"{path} is no JSON ({error}).") from error
    missing: Iterable[str] = [key for key in keys if not isinstance(held, dict) or key not in held]
    if missing:
        raise MmsaeError(f"{path} is no annotation file of COCO: it has no {', '.join(missing)}.")
    return held


def _read(path: str | Path, what: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise MmsaeError(f"{path} cannot be read ({error.strerror}): give {what}.") from error

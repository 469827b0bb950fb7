"""Tables of captions (CSV, TSV, JSON lines), and splits that keep together what belongs together."""

from __future__ import annotations

import csv
import json
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.base import Split
from datamodules.splits import cut
from mmsae.errors import MmsaeError

FILE_COLUMNS = ("file", "image", "audio", "path", "file_name", "filename", "filepath")
TEXT_COLUMNS = ("text", "caption", "sentence", "title")
TABLES = (".csv", ".tsv", ".jsonl")


class Captioned(NamedTuple):
    """A file and what a table says of it.

    Attributes:
        file: The picture or sound.
        text: Its caption; empty if the table has none.
        more: The values of the columns that were asked for, as they are written.
    """

    file: Path
    text: str
    more: tuple[str, ...]


def captioned(path: str | Path, root: str | Path | None, columns: Sequence[str] = ()) -> list[Captioned]:
    """The rows of a table of captions, every file checked to be there.

    Args:
        path: A .csv or .tsv file with a header, or a .jsonl file.
        root: Folder that the names of the files start from; None is the folder of the table.
        columns: Further columns to keep.
    """
    path = Path(path)
    if path.suffix.lower() not in TABLES or not path.is_file():
        raise MmsaeError(f"there is no table {str(path)!r}; give a file that ends in {', '.join(TABLES)}.")
    base = Path(root) if root is not None else path.parent
    seen: dict[str, Path] = {}
    found = []
    for line, row in _rows(path):
        name = _value(row, FILE_COLUMNS, path, line)
        text = next((str(row[key]) for key in TEXT_COLUMNS if row.get(key) not in (None, "")), "")
        if missing := [key for key in columns if row.get(key) is None]:
            raise MmsaeError(f"{path.name} has no {missing[0]!r} in line {line}; it has {', '.join(row)}.")
        if name not in seen:
            seen[name] = base / name
            if not seen[name].is_file():
                raise MmsaeError(f"{path.name} names {name!r} in line {line}, but there is no {str(seen[name])!r}.")
        found.append(Captioned(seen[name], text, tuple(str(row[key]) for key in columns)))
    if not found:
        raise MmsaeError(f"the table {str(path)!r} has no rows.")
    return found


def cut_groups(groups: Sequence[Hashable], split: Split, val_share: float, test_share: float, seed: int) -> list[int]:
    """Indices of a split in ascending order, where all members of a group are in the same split.

    Args:
        groups: Of each example.
        split: Which one.
        val_share: Share of the groups.
        test_share: Share of the groups.
        seed: Of the cut.
    """
    known = sorted(set(groups), key=str)
    try:
        chosen = {known[i] for i in cut(len(known), split, val_share, test_share, seed)}
    except MmsaeError as error:
        if len(known) > 4:
            raise
        shown = ", ".join(map(str, known))
        raise MmsaeError(f"there are only {len(known)} groups ({shown}) to cut into train, val and test.") from error
    return [i for i, group in enumerate(groups) if group in chosen]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the line, and the row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                for line, text in enumerate(file, 1):
                    if text.strip():
                        row = json.loads(text)
                        if not isinstance(row, dict):
                            raise MmsaeError(f"line {line} of {str(path)!r} is no JSON object.")
                        yield line, row
            else:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                for row in reader:
                    yield reader.line_num, row
    except json.JSONDecodeError as error:
        raise MmsaeError(f"a line of {str(path)!r} is no JSON ({error}).") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise MmsaeError(f"the table {str(path)!r} cannot be read ({error}).") from error


def _value(row: dict[str, Any], names: Sequence[str], path: Path, line: int) -> str:
    for name in names:
        if row.get(name):
            return str(row[name])
    has = ", ".join(str(key) for key in row)
    raise MmsaeError(f"line {line} of {path.name} names no file: give a column {' or '.join(names)}; it has {has}.")

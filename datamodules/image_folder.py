"""Pictures in folders."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.base import ActivationDataModule, Split
from datamodules.splits import Items, cut
from mmsae.errors import MmsaeError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


class ImageFolder(ActivationDataModule):
    """All pictures below a folder; the name of the folder a picture lies in is its label "class".

    With subfolders called train, val and test those are the splits; otherwise pictures are dealt out by `seed`.

    With `masks`, every patch has the label "mask": the value that most of its pixels have.

    Args:
        root: The folder.
        val_share: Share of pictures to choose latents on.
        test_share: Share of pictures to measure on.
        split_seed: Of the cut into splits.
        masks: Folder with a mask for every picture, of the same size and with the same path but its ending: pictures
            whose gray levels or palette indices are the values; 255 is none of them.
        mask_names: Names of the values 0, 1, 2 …; without them masks are shown, but are no label of the data set.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self,
        root: str,
        val_share: float = 0.1,
        test_share: float = 0.1,
        split_seed: int = 0,
        masks: str | None = None,
        mask_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.val_share, self.test_share, self.split_seed = root, val_share, test_share, split_seed
        self.masks, self.mask_names = masks, list(mask_names or [])
        _ = self._masks  # a wrong folder must be told before any model is loaded

    @cached_property
    def _files(self) -> list[Path]:
        folder = Path(self.root)
        if not folder.is_dir():
            raise MmsaeError(f"data.root={self.root} is no folder: give one that holds pictures.")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if self.masks is not None:  # they may lie inside
            files = [p for p in files if not p.resolve().is_relative_to(Path(self.masks).resolve())]
        if not files:
            raise MmsaeError(f"data.root={self.root} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
        return files

    @cached_property
    def _masks(self) -> dict[Path, Path]:
        """The mask of every picture, if there are masks."""
        if self.masks is None:
            if self.mask_names:
                raise MmsaeError("mask_names are the names of values of masks: give the folder of the masks too.")
            _ = self._files
            return {}
        folder = Path(self.masks)
        if not folder.is_dir():
            raise MmsaeError(f"data.masks={self.masks} is no folder: give one that holds a mask for every picture.")
        known = {p.relative_to(folder).with_suffix(""): p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES}
        found = {path: known.get(path.relative_to(self.root).with_suffix("")) for path in self._files}
        if lonely := [path for path, mask in found.items() if mask is None]:
            raise MmsaeError(f"the picture {str(lonely[0])!r} and {len(lonely) - 1} more have no mask in {self.masks}.")
        return found  # type: ignore[return-value]

    @cached_property
    def _own_splits(self) -> bool:
        return all((Path(self.root) / split).is_dir() for split in ("train", "val", "test"))

    @property
    def factors(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """The classes, if the pictures lie in more than one folder; the values of the masks, if they have names."""
        names = {name for path in self._files if (name := self._class(path)) is not None}
        classes = {"class": tuple(sorted(names))} if len(names) > 1 else {}
        return {**classes, "mask": tuple(self.mask_names)} if self.mask_names else classes

    def _class(self, path: Path) -> str | None:
        folder = path.parent.relative_to(self.root)
        if self._own_splits and len(folder.parts) < 2:  # directly in the folder of a split, or in none
            return None
        return path.parent.name

    def items(self, split: Split) -> Dataset[dict[str, Any]]:
        """Paths; sources open them."""
        if self._own_splits:
            files = [p for p in self._files if p.relative_to(self.root).parts[0] == split]
        else:
            chosen = cut(len(self._files), split, self.val_share, self.test_share, self.split_seed)
            files = [self._files[i] for i in chosen]
        classes = self.factors.get("class", ())

        def make(path: Path, sample_id: int) -> dict[str, Any]:
            name = self._class(path)
            labels = {"class": classes.index(name) if name in classes else -1} if classes else {}
            item = {"image": str(path), "sample_id": sample_id, "labels": labels}
            if not self._masks:
                return item
            return {**item, "mask": str(self._masks[path]), "mask_names": self.mask_names}

        return Items(files, make)

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

    Args:
        root: The folder.
        val_share: Share of pictures to choose latents on.
        test_share: Share of pictures to measure on.
        split_seed: Of the cut into splits.
        **kwargs: See `ActivationDataModule`.
    """

    def __init__(
        self, root: str, val_share: float = 0.1, test_share: float = 0.1, split_seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.val_share, self.test_share, self.split_seed = root, val_share, test_share, split_seed
        _ = self._files  # a wrong folder must be told before any model is loaded

    @cached_property
    def _files(self) -> list[Path]:
        folder = Path(self.root)
        if not folder.is_dir():
            raise MmsaeError(f"data.root={self.root} is no folder: give one that holds pictures.")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise MmsaeError(f"data.root={self.root} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
        return files

    @cached_property
    def _own_splits(self) -> bool:
        return all((Path(self.root) / split).is_dir() for split in ("train", "val", "test"))

    @property
    def factors(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """The classes, if the pictures lie in more than one folder."""
        names = {name for path in self._files if (name := self._class(path)) is not None}
        return {"class": tuple(sorted(names))} if len(names) > 1 else {}

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
            return {"image": str(path), "sample_id": sample_id, "labels": labels}

        return Items(files, make)

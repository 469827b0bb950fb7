"""A datamodule that `--data` can name, for tiny pipelines without text encoders."""

from pathlib import Path

from tiny_diffusion import items_for

from datamodules import Prompts
from datamodules.splits import Items


class EmbeddedPrompts(Prompts):
    """Items with embeddings in place of prompts; the stem of `path` is the kind of pipeline."""

    def items(self, split):
        made = items_for(Path(self.path).stem, 4)
        return Items(range(4), lambda index, sample_id: {**made[index], "sample_id": sample_id})

"""Bidirectional text encoders of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmsae.errors import MmsaeError
from mmsae.hooks import parse
from mmsae.sources.text import DType, TextModel


class TextEncoder(TextModel):
    """A text encoder of transformers: BERT, RoBERTa, MiniLM, ModernBERT, the encoder of T5 …

    `positions=mean` gives one row per text, the mean over its words (start and end tokens are not in it);
    `positions=first` the start token (`[CLS]`).

    Args:
        model: Local folder, or id on the Hugging Face hub.
        hook_points: Where to read, for example `encoder.layer.*` (BERT, RoBERTa), `layers.*` (ModernBERT),
            `encoder.block.*` (T5).
        context_length: Tokens of a text that are read; the rest is cut off, the end token kept.
        config: Build this configuration with random weights, e.g. `{"model_type": "bert", "hidden_size": 32}`; `model`
            is then only the tokenizer.
        tokenizer: Folder or id of the tokenizer, if it is not that of `model`.
        dtype: Of the weights; "auto" is what the checkpoint has.
        revision: Branch, tag or commit on the hub.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    untrained: tuple[str, ...] = ("pooler.",)  # encoders trained to fill in words have none

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        context_length: int = 128,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        dtype: DType = "auto",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, hook_points, context_length, config, tokenizer, dtype, revision, **kwargs)
        if any(parse(point).path.split(".")[0] == "pooler" for point in self.hook_points):
            self.untrained = ()

    def auto_class(self, transformers: Any, config: Any) -> Any:
        """`AutoModel`, or the encoder alone of a model that has a decoder too."""
        if not config.is_encoder_decoder:
            return transformers.AutoModel
        if type(config) not in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
            raise MmsaeError(f"transformers cannot load the encoder of {config.model_type!r} without its decoder.")
        return transformers.AutoModelForTextEncoding

    def forward(self, batch: dict[str, Any]) -> Any:
        """The output of the model, with `last_hidden_state` `[B, T, width]`."""
        ids, mask = (batch[key].to(self.placed) for key in ("input_ids", "attention_mask"))
        return self.model(input_ids=ids, attention_mask=mask)

    def _longest(self, model: Any) -> int:
        """Most positions; RoBERTa counts them from behind its padding id."""
        tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
        skipped = [m.padding_idx + 1 for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None]
        return super()._longest(model) - max(skipped, default=0)

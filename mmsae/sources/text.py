"""Causal language models of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmsae.errors import MmsaeError, checked
from mmsae.sources.base import Source
from mmsae.sources.items import text_of
from mmsae.sources.positions import DELIMITER, ORDINARY, PADDING, PREFIX
from mmsae.sources.tokens import readable
from mmsae.sources.weights import first_line, needs


class CausalLM(Source):
    """A causal language model of transformers, read on texts.

    Items hold `text`, or `input_ids` that are cut already.

    Args:
        model: Local folder, or id on the Hugging Face hub.
        hook_points: Where to read, for example `model.layers.3` (Llama, Qwen, Gemma) or `transformer.h.*` (GPT-2).
        context_length: Tokens of a text that are read; the rest is cut off.
        config: Build this configuration with random weights, e.g. `{"model_type": "llama", "hidden_size": 32}`; `model`
            is then only the tokenizer.
        tokenizer: Folder or id of the tokenizer, if it is not that of `model`.
        prepend_bos: Begin every text with the start token where the tokenizer knows one but does not add it.
        dtype: Of the weights; "auto" is what the checkpoint has.
        revision: Branch, tag or commit on the hub.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    modality = "text"

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        context_length: int = 128,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        prepend_bos: bool = True,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(hook_points, **kwargs)
        self.name = str(model)
        self.context_length = checked("context_length", context_length, 1)
        self.config = config
        self.tokenizer_name = str(tokenizer or model)
        self.prepend_bos = prepend_bos
        self.dtype = dtype
        self.revision = revision
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded once; no model is needed for it."""
        if self._tokenizer is None:
            kind = needs("transformers", "CausalLM", "text").AutoTokenizer
            self._tokenizer = self._fetched(kind.from_pretrained, self.tokenizer_name, "tokenizer")
        return self._tokenizer

    def load(self) -> nn.Module:
        """The model; refused if weights are missing or the tokenizer is that of another model."""
        transformers = needs("transformers", "CausalLM", "text")
        if self.config is not None:
            model = self._built(transformers)
        else:
            fetch = transformers.AutoModelForCausalLM.from_pretrained
            model, info = self._fetched(fetch, self.name, "model", dtype=self.dtype, output_loading_info=True)
            if missing := sorted(info["missing_keys"]):  # transformers would go on with random ones
                raise MmsaeError(f"the weights of {self.name!r} lack {missing[0]!r} and {len(missing) - 1} more.")
        longest = getattr(model.config, "max_position_embeddings", None) or self.context_length
        checked("context_length", self.context_length, 1, longest)
        vocabulary = model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > vocabulary:
            raise MmsaeError(
                f"the tokenizer {self.tokenizer_name!r} has {len(self.tokenizer)} tokens but the model {self.name!r} "
                f"only {vocabulary}; give the tokenizer that belongs to it."
            )
        return model

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, int64 `[B, T]`, padded on the right."""
        rows = [self._ids(item) for item in items]
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.eos_token_id or 0 if pad is None else pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def forward(self, batch: dict[str, Any]) -> Any:
        """The output of the model, with `logits` `[B, T, vocabulary]`."""
        ids, mask = (batch[key].to(self.placed) for key in ("input_ids", "attention_mask"))
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Start token, words, other special tokens, padding."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if ids.shape[1] != T:
            return super().kinds(batch, T)
        known = self.tokenizer
        special = torch.tensor([i for i in known.all_special_ids if i != known.unk_token_id]).to(ids)
        kinds = torch.where(torch.isin(ids, special), DELIMITER, ORDINARY)
        if known.bos_token_id is not None:
            kinds[:, 0][ids[:, 0] == known.bos_token_id] = PREFIX
        return kinds.masked_fill(mask == 0, PADDING)

    def outcomes(self, output: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`cross_entropy`: mean nats per predicted token; NaN for a text of a single token."""
        logits = output.logits[:, :-1]
        targets, valid = (batch[key][:, 1:].to(logits.device) for key in ("input_ids", "attention_mask"))
        loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return {"cross_entropy": (loss * valid).sum(1) / valid.sum(1)}

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The tokens that the model reads, spaces as spaces."""
        return {"kind": "text", "tokens": readable(self.tokenizer, self._ids(item), item.get("text"))}

    def example_items(self) -> list[dict[str, Any]]:
        """Two short texts."""
        texts = ("Once upon a time", "The cat sat on the mat.")
        return [{"text": text, "sample_id": i} for i, text in enumerate(texts)]

    def describe(self) -> dict[str, Any]:
        """Name, revision, and how texts are cut."""
        commit = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        given = {"config": self.config, "tokenizer": self.tokenizer_name, "prepend_bos": self.prepend_bos}
        return {"model": self.name, "revision": commit or self.revision, **given, "context_length": self.context_length}

    def _ids(self, item: dict[str, Any]) -> list[int]:
        ids = item.get("input_ids")
        if ids is None:
            ids = self.tokenizer(text_of(item), truncation=True, max_length=self.context_length)["input_ids"]
            bos = self.tokenizer.bos_token_id
            if self.prepend_bos and bos is not None and (not ids or ids[0] != bos):
                ids = [bos, *ids]
        ids = [int(i) for i in ids][: self.context_length]
        if not ids:
            raise MmsaeError(
                f"the text of item {item.get('sample_id')} has no tokens; leave such items out of the data."
            )
        return ids

    def _built(self, transformers: Any) -> Any:
        try:
            config = transformers.AutoConfig.for_model(**(self.config or {}))
            return transformers.AutoModelForCausalLM.from_config(config)
        except (ValueError, TypeError) as error:
            raise MmsaeError(f"transformers cannot build {self.config} ({first_line(error)}).") from error

    def _fetched(self, fetch: Any, name: str, what: str, **arguments: Any) -> Any:
        """Load from a folder, offline, or else from the hub."""
        folder = Path(name).expanduser()
        if not folder.is_dir() and (name[:1] in ("/", ".", "~") or name.count("/") > 1):
            raise MmsaeError(f"there is no folder {name!r} with a {what}; give a folder in the layout of transformers.")
        try:
            if folder.is_dir():
                return fetch(str(folder), local_files_only=True, **arguments)
            return fetch(name, revision=self.revision or "main", **arguments)
        except Exception as error:  # OSError, ValueError, safetensors' own … the libraries agree on no type
            why = first_line(error)
            if folder.is_dir():
                raise MmsaeError(f"the folder {name!r} holds no {what} that transformers can load ({why}).") from error
            raise MmsaeError(
                f"the {what} {name!r} is neither a local folder nor can it be fetched from the hub ({why}); give the "
                "path of a downloaded folder."
            ) from error

"""Causal language models of transformers, and what all models of text have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from mmsae.errors import MmsaeError, checked
from mmsae.sources.base import _ONE_AT_A_TIME, Source
from mmsae.sources.chat import coded_dialogue, rendered, template_of
from mmsae.sources.generation import asked, write
from mmsae.sources.items import text_of
from mmsae.sources.positions import DELIMITER, ORDINARY, PADDING, PREFIX
from mmsae.sources.tokens import Coded, readable, special_tokens
from mmsae.sources.weights import fetched, first_line, needs

DType = Literal["auto", "float32", "bfloat16", "float16"]


class TextModel(Source):
    """A model of transformers that reads tokens: a subclass says which class loads it, and how a text begins.

    Items hold `text`, a dialogue as `messages`, or `input_ids` that are cut already, with `token_columns`, a dict from
    name to one whole number per token. Rows carry `token_id` and these columns.

    Args:
        model: Local folder, or id on the Hugging Face hub.
        hook_points: Where to read.
        context_length: Tokens of an item that are read; the rest is cut off.
        config: Build this configuration with random weights; `model` is then only the tokenizer.
        tokenizer: Folder or id of the tokenizer, if it is not that of `model`.
        dtype: Of the weights; "auto" is what the checkpoint has.
        revision: Branch, tag or commit on the hub.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    modality = "text"
    template: str | None = None
    untrained: tuple[str, ...] = ()
    """Beginnings of the names of weights that a checkpoint may lack."""

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        context_length: int,
        config: dict[str, Any] | None,
        tokenizer: str | None,
        dtype: DType,
        revision: str | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(hook_points, **kwargs)
        self.name = str(model)
        self.context_length = checked("context_length", context_length, 1)
        self.config = config
        self.tokenizer_name = str(tokenizer or model)
        self.dtype = dtype
        self.revision = revision
        self._tokenizer: Any = None

    @abstractmethod
    def auto_class(self, transformers: Any, config: Any) -> Any:
        """The class of transformers that loads a model of this configuration."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded once; no model is needed for it."""
        if self._tokenizer is None:
            kind = needs("transformers", type(self).__name__, "text").AutoTokenizer
            self._tokenizer = self._fetched(kind.from_pretrained, self.tokenizer_name, "tokenizer")
        return self._tokenizer

    @cached_property
    def special(self) -> set[int]:
        """Ids of tokens that are no words."""
        return special_tokens(self.tokenizer)

    def load(self) -> nn.Module:
        """The model; refused if weights are missing or the tokenizer is that of another model."""
        transformers = needs("transformers", type(self).__name__, "text")
        if self.config is not None:
            model = self._built(transformers)
        else:
            config = self._fetched(transformers.AutoConfig.from_pretrained, self.name, "model")
            fetch = self.auto_class(transformers, config).from_pretrained
            model, info = self._fetched(fetch, self.name, "model", dtype=self.dtype, output_loading_info=True)
            missing = sorted(key for key in info["missing_keys"] if not key.startswith(self.untrained))
            if missing:  # transformers would go on with random ones
                raise MmsaeError(f"the weights of {self.name!r} lack {missing[0]!r} and {len(missing) - 1} more.")
        checked("context_length", self.context_length, 1, self._longest(model))
        vocabulary = model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > vocabulary:
            raise MmsaeError(
                f"the tokenizer {self.tokenizer_name!r} has {len(self.tokenizer)} tokens but the model {self.name!r} "
                f"only {vocabulary}; give the tokenizer that belongs to it."
            )
        return model

    def coded(self, item: dict[str, Any], whole: bool = False) -> Coded:
        """The tokens of an item.

        Args:
            item: With `text`, `messages` or `input_ids`.
            whole: Do not cut them at the context length.
        """
        if item.get("input_ids") is not None:
            found = Coded([int(i) for i in item["input_ids"]], item.get("token_columns", {}))
        elif "messages" in item:
            found = coded_dialogue(self.tokenizer, item["messages"], self.template)
        else:
            found = self._words(text_of(item), whole)
        if not found.ids:
            raise MmsaeError(
                f"the text of item {item.get('sample_id')} has no tokens; leave such items out of the data."
            )
        end = None if whole else self.context_length
        columns = {name: values[:end] for name, values in found.columns.items()}
        return Coded(found.ids[:end], columns, found.text, found.offsets and found.offsets[:end])

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, int64 `[B, T]`, padded on the right, and `token_columns` alike (-1)."""
        rows = [self.coded(item) for item in items]
        fill = self.tokenizer.pad_token_id
        ids = _rows([row.ids for row in rows], self.tokenizer.eos_token_id or 0 if fill is None else fill)
        mask = _rows([[1] * len(row.ids) for row in rows], 0)
        names = dict.fromkeys(name for row in rows for name in row.columns)
        columns = {name: _rows([row.columns.get(name, [-1]) for row in rows], -1, ids.shape[1]) for name in names}
        return {"input_ids": ids, "attention_mask": mask, "token_columns": columns}

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Start token, words, other special tokens, padding."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if ids.shape[1] != T:
            return super().kinds(batch, T)
        kinds = torch.where(torch.isin(ids, torch.tensor(sorted(self.special)).to(ids)), DELIMITER, ORDINARY)
        starts = [i for i in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) if i is not None]
        kinds[:, 0][torch.isin(ids[:, 0], torch.tensor(starts).to(ids))] = PREFIX
        return kinds.masked_fill(mask == 0, PADDING)

    def columns(self, batch: dict[str, Any], T: int) -> dict[str, Tensor]:
        """`token_id`, and what the items say of their tokens: `role`, `document` …"""
        if batch["input_ids"].shape[1] != T:  # a pooled vector
            return {}
        return {"token_id": batch["input_ids"], **batch["token_columns"]}

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The tokens that the model reads, spaces as spaces."""
        return {"kind": "text", "tokens": readable(self.tokenizer, self.coded(item))}

    def example_items(self) -> list[dict[str, Any]]:
        """Two short texts."""
        texts = ("Once upon a time", "The cat sat on the mat.")
        return [{"text": text, "sample_id": i} for i, text in enumerate(texts)]

    def describe(self) -> dict[str, Any]:
        """Name, revision, and how texts are cut."""
        commit = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        given = {"config": self.config, "tokenizer": self.tokenizer_name, "context_length": self.context_length}
        return {"model": self.name, "revision": commit or self.revision, **given}

    def _words(self, text: str, whole: bool) -> Coded:
        length = {} if whole else {"truncation": True, "max_length": self.context_length}
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        coded = self.tokenizer(text, return_offsets_mapping=fast, **length)
        return Coded(coded["input_ids"], {}, text, coded["offset_mapping"] if fast else None)

    def _longest(self, model: Any) -> int:
        """Most positions that the model can take."""
        config = model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or self.context_length

    def _built(self, transformers: Any) -> Any:
        try:
            config = transformers.AutoConfig.for_model(**(self.config or {}))
            return self.auto_class(transformers, config).from_config(config)
        except (ValueError, TypeError) as error:
            raise MmsaeError(f"transformers cannot build {self.config} ({first_line(error)}).") from error

    def _fetched(self, fetch: Any, name: str, what: str, **arguments: Any) -> Any:
        return fetched(fetch, name, what, self.revision, **arguments)


class CausalLM(TextModel):
    """A causal language model of transformers, read on texts or dialogues.

    Items hold `text`, a dialogue as `messages`, or `input_ids` that are cut already. Rows carry `token_id`, those of a
    dialogue also `role`, an index into `mmsae.sources.chat.ROLES`.

    Args:
        model: Local folder, or id on the Hugging Face hub.
        hook_points: Where to read, for example `model.layers.3` (Llama, Qwen, Gemma) or `transformer.h.*` (GPT-2);
            `model.layers.3.mlp`, `model.layers.3.self_attn`, and `model.layers.3.self_attn.o_proj:input` for the heads'
            outputs side by side.
        context_length: Tokens of a text that are read; the rest is cut off.
        config: Build this configuration with random weights, e.g. `{"model_type": "llama", "hidden_size": 32}`; `model`
            is then only the tokenizer.
        tokenizer: Folder or id of the tokenizer, if it is not that of `model`.
        prepend_bos: Begin every text with the start token where the tokenizer knows one but does not add it.
        chat_template: Jinja template of dialogues, or a file that holds one, instead of the tokenizer's own.
        dtype: Of the weights; "auto" is what the checkpoint has.
        revision: Branch, tag or commit on the hub.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        context_length: int = 128,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        prepend_bos: bool = True,
        chat_template: str | None = None,
        dtype: DType = "auto",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, hook_points, context_length, config, tokenizer, dtype, revision, **kwargs)
        self.prepend_bos = prepend_bos
        self.chat_template = chat_template
        self.template = template_of(chat_template)

    def auto_class(self, transformers: Any, config: Any) -> Any:
        """`AutoModelForCausalLM`."""
        return transformers.AutoModelForCausalLM

    def forward(self, batch: dict[str, Any]) -> Any:
        """The output of the model, with `logits` `[B, T, vocabulary]`."""
        ids, mask = (batch[key].to(self.placed) for key in ("input_ids", "attention_mask"))
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def generate(
        self,
        items: list[dict[str, Any]],
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Continuations of texts, or answers to dialogues, see `mmsae.sources.generation.write`."""
        model, prompts = self.model, [self._prompt(item) for item in items]
        with _ONE_AT_A_TIME:
            return write(model, prompts, self.tokenizer, None, max_new_tokens, temperature, seed)

    def _prompt(self, item: dict[str, Any]) -> Sequence[int]:
        """The tokens that an item begins with."""
        if item.get("input_ids") is None and "messages" in item:
            talk = asked(item["messages"], item.get("sample_id"))
            text = rendered(self.tokenizer, talk, self.template, answer=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = list(self.coded(item).ids)
        end = self.tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids  # some tokenizers end every text

    def predictions(self, output: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits of every predicted token, and the token that came."""
        targets, valid = (batch[key][:, 1:].to(output.logits.device) for key in ("input_ids", "attention_mask"))
        return output.logits[:, :-1][valid.bool()], targets[valid.bool()]

    def outcomes(self, output: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`cross_entropy`: mean nats per predicted token; NaN for a text of a single token."""
        logits = output.logits[:, :-1]
        targets, valid = (batch[key][:, 1:].to(logits.device) for key in ("input_ids", "attention_mask"))
        loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return {"cross_entropy": (loss * valid).sum(1) / valid.sum(1)}

    def describe(self) -> dict[str, Any]:
        """Name, revision, and how texts are cut and dialogues rendered."""
        return {**super().describe(), "prepend_bos": self.prepend_bos, "chat_template": self.chat_template}

    def _words(self, text: str, whole: bool) -> Coded:
        found = super()._words(text, whole)
        bos = self.tokenizer.bos_token_id
        if not self.prepend_bos or bos is None or found.ids[:1] == [bos]:
            return found
        return found._replace(ids=[bos, *found.ids], offsets=found.offsets and [(0, 0), *found.offsets])


def _rows(rows: Sequence[Sequence[int]], fill: int, length: int | None = None) -> Tensor:
    """Rows of different lengths as int64 `[B, T]`, filled on the right."""
    T = length or max(map(len, rows))
    return torch.stack([pad(torch.as_tensor(row, dtype=torch.int64), (0, T - len(row)), value=fill) for row in rows])

"""Models of two towers in transformers: how they are loaded, and how they read texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.errors import MmsaeError
from mmsae.hooks import resolve
from mmsae.sources.items import text_of
from mmsae.sources.positions import DELIMITER, ORDINARY, PADDING, PREFIX, grid_places
from mmsae.sources.text import DType
from mmsae.sources.tokens import Coded, readable, special_tokens
from mmsae.sources.two_towers import TwoTowers
from mmsae.sources.weights import fetched, first_line, located, needs


class HuggingFaceTowers(TwoTowers):
    """Two towers of transformers: a subclass says how pictures or sounds become tensors and which call embeds them.

    Args:
        model: Local folder, id on the Hugging Face hub, or `miniature:NAME`.
        hook_points: Where to read.
        tower: Which half reads the items.
        prompts: Name of a label to one text for each of its values, to measure zero-shot.
        config: Build this configuration with random weights; `model` is then only the tokenizer and preprocessing.
        dtype: Of the weights; "auto" is what the checkpoint has.
        revision: Branch, tag or commit on the hub.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    extra: str
    pad_texts: str | bool = True  # to the longest of a batch, or to "max_length"
    wrappers: tuple[str, ...] = ()
    """Names that stand before the paths of a tower in some classes of a family, and not in others."""

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        tower: str,
        prompts: Mapping[str, Sequence[str]] | None,
        config: dict[str, Any] | None,
        dtype: DType,
        revision: str | None,
        **kwargs: Any,
    ) -> None:
        self.choose_tower(tower, prompts)
        super().__init__(hook_points, **kwargs)
        self.name = str(model)
        self.config = config
        self.dtype = dtype
        self.revision = revision
        self._tokenizer: Any = None
        self._preprocessor: Any = None

    @property
    @abstractmethod
    def auto_preprocessor(self) -> str:
        """Name of the class of transformers that loads the preprocessing of pictures or sounds."""

    @abstractmethod
    def plain_preprocessor(self, transformers: Any, config: Any) -> Any:
        """Preprocessing that fits a configuration, where no folder has one."""

    @abstractmethod
    def contents(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pictures or sounds of the items as the first tower wants them."""

    @abstractmethod
    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """The embedding of pictures or sounds `[B, embed_dim]`, not normalised."""

    @abstractmethod
    def embed_words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The embedding of texts `[B, embed_dim]`, not normalised."""

    def load(self) -> nn.Module:
        """The model; refused if weights are missing. Prompts that its configuration brings are taken over."""
        transformers = needs("transformers", type(self).__name__, self.extra)
        if self.config is not None:
            model = self._built(transformers)
        else:
            arguments = {"dtype": self.dtype, "output_loading_info": True}
            model, info = self.fetched(transformers.AutoModel.from_pretrained, "model", **arguments)
            if missing := sorted(info["missing_keys"]):  # transformers would go on with random ones
                raise MmsaeError(f"the weights of {self.name!r} lack {missing[0]!r} and {len(missing) - 1} more.")
        self.prompts = self.prompts or dict(getattr(model.config, "zero_shot_prompts", None) or {})
        self.hook_points = [self._known(model, point) for point in self.hook_points]
        return model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded once; no model is needed for it."""
        if self._tokenizer is None:
            kind = needs("transformers", type(self).__name__, self.extra).AutoTokenizer
            self._tokenizer = self.fetched(kind.from_pretrained, "tokenizer")
        return self._tokenizer

    @property
    def preprocessor(self) -> Any:
        """The preprocessing of pictures or sounds, loaded once."""
        if self._preprocessor is None:
            transformers = needs("transformers", type(self).__name__, self.extra)
            if self.config is not None and not Path(located(self.name)).is_dir():
                self._preprocessor = self.plain_preprocessor(transformers, self._configured(transformers))
            else:
                fetch = getattr(transformers, self.auto_preprocessor).from_pretrained
                self._preprocessor = self.fetched(fetch, "preprocessing")
        return self._preprocessor

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """What the chosen tower reads."""
        return self.contents(items) if self.tower != "text" else self.words([text_of(item) for item in items])

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """The embedding `[B, embed_dim]`, not normalised."""
        placed = {key: x.to(self.placed) for key, x in batch.items() if isinstance(x, Tensor)}
        if self.tower == "text":
            return self.embed_words(placed["input_ids"], placed["attention_mask"])
        weights = next(self.model.parameters()).dtype
        return self.embed({key: x.to(weights) if x.is_floating_point() else x for key, x in placed.items()})

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Of texts: start, words, end, padding."""
        if self.tower != "text":
            return super().kinds(batch, T)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        kinds = torch.full((len(ids), T), ORDINARY)
        if ids.shape[1] != T:  # a pooled vector
            return kinds
        tokenizer = self.tokenizer
        kinds[torch.isin(ids, torch.tensor(sorted(special_tokens(tokenizer))))] = DELIMITER
        starts = [i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id) if i is not None]
        kinds[:, 0][torch.isin(ids[:, 0], torch.tensor(starts, dtype=torch.int64))] = PREFIX
        return kinds.masked_fill(mask == 0, PADDING)

    def grid(self, batch: dict[str, Any], T: int) -> tuple[Tensor, Tensor]:
        """Words have no place."""
        return super().grid(batch, T) if self.tower != "text" else grid_places(len(batch["sample_id"]), T, 0, 0, 0)

    def columns(self, batch: dict[str, Any], T: int) -> dict[str, Tensor]:
        """Of texts: `token_id`."""
        if self.tower != "text":
            return super().columns(batch, T)
        return {"token_id": batch["input_ids"]} if batch["input_ids"].shape[1] == T else {}

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The input of the tower; of a text its tokens."""
        if self.tower != "text":
            return super().render(item)
        ids, offsets = self._coded(text_of(item))
        return {"kind": "text", "tokens": readable(self.tokenizer, Coded(ids, {}, text_of(item), offsets))}

    def describe(self) -> dict[str, Any]:
        """Name, revision and tower."""
        commit = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        return {"model": self.name, "revision": commit or self.revision, "config": self.config, "tower": self.tower}

    def words(self, texts: list[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of texts, int64 `[B, T]`."""
        limits = self._cut  # first: loading the model says how it wants its texts
        coded = self.tokenizer(texts, padding=self.pad_texts, return_tensors="pt", **limits)
        return {key: coded[key] for key in ("input_ids", "attention_mask")}

    def fetched(self, fetch: Any, what: str, **arguments: Any) -> Any:
        """Load from a folder, offline, or else from the hub."""
        return fetched(fetch, self.name, what, self.revision, **arguments)

    @property
    def _cut(self) -> dict[str, Any]:
        """Arguments of the tokenizer: where long texts are cut."""
        text = getattr(self.model.config, "text_config", None)
        longest = getattr(text, "max_position_embeddings", None) or 512
        tables = (m for name, m in self.model.named_modules() if name.endswith("position_embeddings"))
        # RoBERTa counts positions from behind its padding id
        longest -= max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)
        limit = min(longest, int(self.tokenizer.model_max_length))
        return {"truncation": True, "max_length": limit, "return_attention_mask": True}

    def _coded(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        coded = self.tokenizer(text, return_offsets_mapping=fast, **self._cut)
        return coded["input_ids"], coded["offset_mapping"] if fast else None

    def _configured(self, transformers: Any) -> Any:
        try:
            return transformers.AutoConfig.for_model(**(self.config or {}))
        except (ValueError, TypeError) as error:
            raise MmsaeError(f"transformers cannot build {self.config} ({first_line(error)}).") from error

    def _built(self, transformers: Any) -> Any:
        config = self._configured(transformers)
        try:
            return transformers.AutoModel.from_config(config)
        except (ValueError, TypeError) as error:
            raise MmsaeError(f"transformers cannot build {self.config} ({first_line(error)}).") from error

    def _known(self, model: nn.Module, point: str) -> str:
        """The hook point, with or without the name of a wrapper that only some classes of the family have."""
        others = [point.removeprefix(f"{name}.") for name in self.wrappers if point.startswith(f"{name}.")]
        others += [f"{name}.{point}" for name in self.wrappers if hasattr(model, name)]
        for candidate in (point, *others):
            try:
                resolve(model, [candidate])
            except MmsaeError:
                continue
            return candidate
        return point  # `resolve` will name the nearest

"""Large multimodal models of transformers: pictures and words in one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence

from mmsae.errors import MmsaeError
from mmsae.hooks import differentiable, edit
from mmsae.layout import from_positions, to_positions
from mmsae.sources.base import _ONE_AT_A_TIME, MODALITIES
from mmsae.sources.chat import ROLES, rendered, template_of
from mmsae.sources.generation import asked, write
from mmsae.sources.image_chat import conversation_of, roles_of, said, spans_of
from mmsae.sources.image_tokens import DYNAMIC, Picture, Places, Tracer, nothing
from mmsae.sources.items import example_images, render_image
from mmsae.sources.positions import DELIMITER, ORDINARY, PADDING
from mmsae.sources.text import DType, TextModel
from mmsae.sources.tokens import Coded, readable
from mmsae.sources.weights import first_line, located, needs
from mmsae.spec import Batch

Tokens = Literal["all", "text", "image"]
TEXT, IMAGE = 0, 1
"""Values of the column `token_type`."""
VISION = {
    "vision_tower", "vision_model", "visual", "multi_modal_projector", "connector",
}  # fmt: skip
"""Components of paths to what sees the pictures only."""
WINDOWED = {"blocks", "merger"}
COORDINATES = ("x0", "y0", "x1", "y1")
ASSISTANT = ROLES.index("assistant")


class VisionLanguage(TextModel):
    """A multimodal model of transformers, read on pictures and words: LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL,
    Qwen2.5-VL, Idefics3, SmolVLM, Gemma 3, Chameleon and others of `AutoModelForImageTextToText`.

    Items hold a conversation as `messages`, each with a `role` and a `content` of parts `{"type": "image"}` and
    `{"type": "text", "text": ...}`, with the pictures under `image` or `images` (or in their parts); or an `image` with
    an optional `text`, which becomes the answer to `prompt`.

    Rows carry `token_type` (0 text, 1 image), `token_id`, `role` (an index into `mmsae.sources.chat.ROLES`; -1: not
    known), and for patches `image` (number of the picture in the item), `tile`, `row`, `column` and the box `x0`, `y0`,
    `x1`, `y1` in pixels of the original picture, all of them -1 elsewhere. Hook points in the vision tower or the
    projector have positions of their own, and the same columns.

    Args:
        model: Local folder, id on the Hugging Face hub, or `miniature:lmm`.
        hook_points: Where to read: `model.language_model.layers.20`; `model.vision_tower.encoder.layers.*` or
            `model.visual.blocks.*`; `model.multi_modal_projector`, `model.visual.merger` or `model.connector`.
        tokens: Read the tokens of text, those of pictures, or all.
        context_length: Most tokens of an item, by default what the model can take; words beyond are cut off, pictures
            never.
        config: Build this configuration with random weights; `model` is then only the processor.
        processor: Folder or id of the processor, if it is not that of `model`.
        prompt: What a picture without a conversation is sent with.
        chat_template: Jinja template, or a file that holds one, instead of the processor's own.
        dtype: Of the weights; "auto" is what the checkpoint has.
        revision: Branch, tag or commit on the hub.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        tokens: Tokens = "all",
        context_length: int | None = None,
        config: dict[str, Any] | None = None,
        processor: str | None = None,
        prompt: str = "describe the picture.",
        chat_template: str | None = None,
        dtype: DType = "auto",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        if tokens not in ("all", "text", "image"):
            raise MmsaeError(f"tokens={tokens!r} is unknown; choose all, text or image.")
        folder = located(str(model))
        length = 1 if context_length is None else context_length
        super().__init__(folder, hook_points, length, config, processor, dtype, revision, **kwargs)
        self.given = str(model)
        self._any_length = context_length is None
        self.tokens: Tokens = tokens
        self.prompt = prompt
        self.chat_template = chat_template
        self.template = template_of(chat_template)
        self._processor: Any = None

    # ---- loading

    def auto_class(self, transformers: Any, config: Any) -> Any:
        """`AutoModelForImageTextToText`."""
        return transformers.AutoModelForImageTextToText

    @property
    def processor(self) -> Any:
        """What prepares pictures and words, loaded once; no model is needed for it."""
        if self._processor is None:
            kind = needs("transformers", type(self).__name__, "lmm").AutoProcessor
            found = self._fetched(kind.from_pretrained, self.tokenizer_name, "processor")
            if not hasattr(found, "image_processor"):
                raise MmsaeError(f"the processor {self.tokenizer_name!r} reads no pictures; use CausalLM for it.")
            if not (self.template or found.chat_template):
                raise MmsaeError(
                    f"the processor {self.tokenizer_name!r} has no chat template; give the source chat_template=."
                )
            self._processor = found
        return self._processor

    @property
    def tokenizer(self) -> Any:
        """That of the processor."""
        return self.processor.tokenizer

    def load(self) -> nn.Module:
        """The model; refused if the tokens asked for are not at the hook points."""
        model: Any = super().load()
        self._config = model.config
        if self.tokens == "text" and self.sees:
            raise MmsaeError(f"tokens='text', but {self.hook_points[0]!r} sees pictures only; set tokens to image.")
        return model

    def _longest(self, model: Any) -> int:
        longest = super()._longest(model)
        if self._any_length:
            self.context_length = longest
        return longest

    @property
    def sees(self) -> bool:
        """Whether the hook points lie where there are only pictures yet."""
        inside = [bool(VISION & set(name.split(":")[0].split("."))) for name in self.hook_points]
        if len(set(inside)) > 1:
            raise MmsaeError(
                f"hook points {', '.join(self.hook_points)} lie before and behind the projector, where positions "
                "differ; extract them separately."
            )
        return inside[0]

    @property
    def model_config(self) -> Any:
        """The configuration of the model; without weights where a processor suffices."""
        if self._config is None:
            self.model  # noqa: B018, loading sets it
        return self._config

    _config: Any = None

    @cached_property
    def tracer(self) -> Tracer:
        """Finds the places of image tokens."""
        return Tracer(self.model_config, self.processor)

    @cached_property
    def image_id(self) -> int:
        """Id of the token that stands for a patch."""
        config = self.model_config
        found = getattr(config, "image_token_id", None)
        return config.image_token_index if found is None else found

    # ---- from items to tensors

    def tensors(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `token_columns` as models of text have; `inputs` for the model besides."""
        talks = [conversation_of(item, self.prompt) for item in items]
        images = [images for _, images in talks]
        rows = [spans_of(self.processor, messages, self.template) for messages, _ in talks]
        coded = self._processed([text for text, _ in rows], images, items)
        offsets, replaced = coded.pop("offset_mapping"), coded.pop("text_replacement_offsets", [])
        ids, mask = coded["input_ids"], coded["attention_mask"]
        pictures = self._pictures(images, coded)
        columns: dict[str, list[Tensor]] = {}
        for i, (_, spans) in enumerate(rows):
            found = self._columns(ids[i], mask[i], pictures[i], items[i])
            found["role"] = roles_of(offsets[i], mask[i], spans, replaced[i] if replaced else [])
            for name, values in found.items():
                columns.setdefault(name, []).append(values)
        stacked = {name: torch.stack(values) for name, values in columns.items()}
        batch = {"input_ids": ids, "attention_mask": mask, "token_columns": stacked, "pictures": pictures}
        inputs = {name: value for name, value in coded.items() if name not in batch}
        return self._cut({**batch, "inputs": inputs}, items)

    def _processed(self, texts: list[str], images: list[list[Any]], items: list[dict[str, Any]]) -> Any:
        bos = self.tokenizer.bos_token
        # Nested, for some processors count per text; flat where a text has no picture, for some refuse an empty list.
        given = images if all(images) else [image for one in images for image in one]
        try:
            return dict(
                self.processor(
                    text=texts,
                    images=given or None,
                    padding=True,
                    padding_side="right",
                    return_tensors="pt",
                    return_offsets_mapping=True,
                    return_text_replacement_offsets=True,
                    add_special_tokens=not (bos and texts[0].startswith(bos)),
                )
            )
        except MmsaeError:
            raise
        except Exception as error:  # whatever a processor raises
            ids = ", ".join(str(item.get("sample_id")) for item in items[:5])
            raise MmsaeError(f"the processor refuses a batch (items {ids} …): {first_line(error)}.") from error

    def _pictures(self, images: list[list[Any]], coded: Mapping[str, Any]) -> list[list[Picture]]:
        grids = iter(coded["image_grid_thw"].tolist() if "image_grid_thw" in coded else [])
        return [
            [Picture(image.size, tuple(grid) if (grid := next(grids, None)) else None, len(one) == 1) for image in one]
            for one in images
        ]

    def _columns(self, ids: Tensor, mask: Tensor, pictures: list[Picture], item: dict[str, Any]) -> dict[str, Tensor]:
        """Of the tokens of an item, `[T]` each."""
        patches = (ids == self.image_id) & mask.bool()
        n = int(patches.sum())
        if self.tracer.known:
            parts = [self.tracer.language(picture) for picture in pictures]
            found, number = Places.joined(parts), [i for i, part in enumerate(parts) for _ in part.row]
        else:
            found, number = nothing(n), [-1] * n
        if len(found.row) != n:
            raise MmsaeError(
                f"item {item.get('sample_id')} has {n} image tokens where {len(found.row)} were expected of its "
                "pictures; check that the processor belongs to the model."
            )
        columns = {name: torch.full(ids.shape, -1) for name in ("image", "tile", "row", "column")}
        columns["image"][patches] = torch.tensor(number, dtype=torch.int64)
        for name in ("tile", "row", "column"):
            columns[name][patches] = getattr(found, name)
        for i, name in enumerate(COORDINATES):
            columns[name] = torch.full(ids.shape, -1.0)
            columns[name][patches] = found.box[:, i]
        return columns | {"token_type": patches.long()}

    def _cut(self, batch: dict[str, Any], items: list[dict[str, Any]]) -> dict[str, Any]:
        """Without the words beyond the context length."""
        T, end = batch["input_ids"].shape[1], self.context_length
        if end >= T:
            return batch
        lost = batch["token_columns"]["token_type"][:, end:].any(1).nonzero()
        if len(lost):
            which = items[int(lost[0])].get("sample_id")
            raise MmsaeError(
                f"the pictures of item {which} take more than context_length={end} tokens; give more, or smaller "
                "pictures."
            )

        def short(value: Any) -> Any:
            return value[:, :end] if isinstance(value, Tensor) and value.shape[1:] == (T,) else value

        cut = {name: short(value) for name, value in batch.items()}
        return cut | {key: {n: short(v) for n, v in batch[key].items()} for key in ("token_columns", "inputs")}

    # ---- running

    def forward(self, batch: dict[str, Any]) -> Any:
        """The output of the model, with `logits` `[B, T, vocabulary]`."""
        model: Any = self.model
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **batch["inputs"]}
        moved = {
            name: value.to(self.placed, model.dtype if value.is_floating_point() else None)
            for name, value in given.items()
            if isinstance(value, Tensor)
        }
        return model(**moved, use_cache=False)

    def generate(
        self,
        items: list[dict[str, Any]],
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Answers to questions about pictures, see `mmsae.sources.generation.write`."""
        model: Any = self.model
        prompts, pictures = zip(*(self._question(item) for item in items), strict=True)

        def inputs(rows: list[int]) -> dict[str, Tensor]:
            """The pictures of some items, as the processor makes them of all together."""
            text, images = [pictures[i][0] for i in rows], [pictures[i][1] for i in rows]
            coded = self._processed(text, images, [items[i] for i in rows])
            known = ("input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets")
            kept = {name: value for name, value in coded.items() if name not in known and isinstance(value, Tensor)}
            return {n: v.to(self.placed, model.dtype if v.is_floating_point() else None) for n, v in kept.items()}

        with _ONE_AT_A_TIME:
            return write(model, prompts, self.tokenizer, inputs, max_new_tokens, temperature, seed)

    def _question(self, item: dict[str, Any]) -> tuple[list[int], tuple[str, list[Any]]]:
        """Tokens of an item up to the answer; its text, placeholders not expanded, and its pictures."""
        messages, images = conversation_of(item, self.prompt)
        talk = asked(messages, item.get("sample_id"))
        text = rendered(self.processor, talk, self.template, answer=True)  # type: ignore[arg-type]
        return self._processed([text], [images], [item])["input_ids"][0].tolist(), (text, images)

    def predictions(self, output: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits of every token of the answers, and the token that came."""
        answered = self._answered(batch).to(output.logits.device)
        if not answered.any():
            raise MmsaeError("no item of the batch has an answer of the assistant, so there is no loss to measure.")
        return output.logits[:, :-1][answered], batch["input_ids"][:, 1:].to(output.logits.device)[answered]

    def outcomes(self, output: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`cross_entropy` (mean nats per token of the answers) and `accuracy` (all of them likeliest: 0 or 1).

        NaN without an answer.
        """
        logits = output.logits[:, :-1]
        answered, targets = self._answered(batch).to(logits.device), batch["input_ids"][:, 1:].to(logits.device)
        loss = cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        right = ((logits.argmax(-1) == targets) | ~answered).all(1).float()
        none = ~answered.any(1)
        return {
            "cross_entropy": (loss * answered).sum(1) / answered.sum(1),
            "accuracy": right.masked_fill(none, torch.nan),
        }

    def _answered(self, batch: dict[str, Any]) -> Tensor:
        """Which of the tokens but the first are the assistant's words, bool `[B, T - 1]`."""
        return (batch["token_columns"]["role"][:, 1:] == ASSISTANT) & batch["attention_mask"][:, 1:].bool()

    # ---- positions

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Start token, words and patches, other special tokens and separators; what `tokens` leaves out is padding."""
        if self.sees:
            places, _, there = self._seen(batch, T)
            kinds = torch.where((places.row >= 0) | (not self.tracer.known), ORDINARY, DELIMITER)
            return kinds.masked_fill(~there, PADDING)
        kinds = super().kinds(batch, T)
        if batch["input_ids"].shape[1] != T:
            return kinds
        columns = {name: values.to(kinds.device) for name, values in batch["token_columns"].items()}
        patches = columns["token_type"] == IMAGE
        kinds[patches & ((columns["row"] >= 0) | (not self.tracer.known))] = ORDINARY
        if self.tokens != "all":
            kinds = kinds.masked_fill(patches != (self.tokens == "image"), PADDING)
        return kinds

    def columns(self, batch: dict[str, Any], T: int) -> dict[str, Tensor]:
        """What the rows carry, see the class."""
        if not self.sees:
            return super().columns(batch, T)
        places, image, _ = self._seen(batch, T)
        boxes = {name: places.box[..., i] for i, name in enumerate(COORDINATES)}
        where = {"image": image, "tile": places.tile, "row": places.row, "column": places.column, **boxes}
        return {"token_type": torch.full_like(image, IMAGE), "role": torch.full_like(image, -1), **where}

    def _as_rows(self, captured: Mapping[str, Tensor], by_point: Mapping[str, Tensor], batch: dict[str, Any]) -> Batch:
        """As for every source, but the modality is that of the token."""
        rows = super()._as_rows(captured, by_point, batch)
        if "token_type" in rows:
            seen = rows["token_type"] == IMAGE
            rows["modality"] = torch.where(seen, MODALITIES["image"], MODALITIES["text"])
        elif self.sees or self.tokens == "image":  # a mean
            rows["modality"] = torch.full_like(rows["modality"], MODALITIES["image"])
        return rows

    # ---- in front of the language model: tiles, or patches of all pictures in a row

    def _positions(
        self, captured: Mapping[str, Tensor], batch: dict[str, Any]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        if self.sees:
            captured = {name: self._by_item(tensor, batch) for name, tensor in captured.items()}
        return super()._positions(captured, batch)

    def _counts(self, batch: dict[str, Any], tensor: Tensor) -> list[int]:
        """Positions of every item in an activation of the vision tower, `[tiles, T, D]` or `[patches, D]`."""
        x, _ = to_positions(tensor)
        units = [sum(self._units(picture) for picture in pictures) for pictures in batch["pictures"]]
        rows = x.shape[0] * x.shape[1]
        if not sum(units) or (rows % sum(units) and sum(units) % rows):
            raise MmsaeError(
                f"an activation of shape {tuple(tensor.shape)} does not belong to {sum(units)} tiles or patches; hook "
                "the layers of the vision tower or the projector."
            )
        return [n * rows // sum(units) for n in units]

    def _units(self, picture: Picture) -> int:
        if self.tracer.family in DYNAMIC and picture.grid is not None:
            return picture.grid[0] * picture.grid[1] * picture.grid[2]
        return len(self.tracer.frames(picture)) if self.tracer.known else 1

    def _by_item(self, tensor: Tensor, batch: dict[str, Any]) -> Tensor:
        """`[B, T, D]`, filled up with zeros."""
        x, _ = to_positions(tensor)
        return pad_sequence(list(x.flatten(0, 1).split(self._counts(batch, tensor))), batch_first=True)

    def _seen(self, batch: dict[str, Any], T: int) -> tuple[Places, Tensor, Tensor]:
        """Places `[B, T]`, the number of the picture `[B, T]`, and where there is something at all."""
        most = max(sum(self._units(picture) for picture in pictures) for pictures in batch["pictures"])
        names = [set(name.split(":")[0].split(".")) for name in self.hook_points]
        windows = any(WINDOWED & name for name in names)
        rows, numbers = [], []
        for pictures in batch["pictures"]:
            parts = []
            for one in pictures:
                units = self._units(one)
                tokens = units * T // most if self.tracer.family in DYNAMIC else T // most
                known = self.tracer.known
                parts.append(self.tracer.tower(one, tokens, windows) if known else nothing(units * T // most))
            rows.append(Places.joined(parts))
            numbers.append(torch.tensor([i for i, part in enumerate(parts) for _ in part.row], dtype=torch.int64))
        filled = [
            torch.stack([pad(c, (0, 0) * (c.dim() - 1) + (0, T - len(c)), value=-1) for c in columns])
            for columns in zip(*rows, strict=True)
        ]
        there = torch.arange(T) < torch.tensor([[len(row.row)] for row in rows])
        image = torch.stack([pad(number, (0, T - len(number)), value=-1) for number in numbers])
        return Places(*filled), image, there

    @contextmanager
    def spliced(
        self, batch: dict[str, Any], replace: Mapping[str, Callable[[Tensor], Tensor]], also: Sequence[str] = ()
    ) -> Iterator[dict[str, Tensor]]:
        """See `Source.spliced`."""
        if not self.sees:
            with super().spliced(batch, replace, also) as found:
                yield found
            return

        def splice(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
            x = self._by_item(tensor, batch).clone()
            chosen = self.selected(batch, x).to(x.device)
            x[chosen] = change(x[chosen]).to(x.dtype)
            flat = torch.cat([row[:n] for row, n in zip(x, self._counts(batch, tensor), strict=True)])
            laid, _ = to_positions(tensor)
            return from_positions(flat.view(laid.shape), tensor.shape)

        edits = {name: partial(splice, change) for name, change in replace.items()}
        with differentiable(self.model, also) as found, edit(self.model, edits):
            yield found

    # ---- for readers

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The first picture with the words as tokens and their positions; words alone if there is no picture."""
        messages, images = conversation_of(item, self.prompt)
        if self.sees and images:
            return render_image({**item, "image": images[0], "text": said(messages)})
        text, spans = spans_of(self.processor, messages, self.template)
        coded = self._processed([text], [images], [item])
        ids, offsets, mask = (coded[key][0] for key in ("input_ids", "offset_mapping", "attention_mask"))
        replaced = (coded.get("text_replacement_offsets") or [[]])[0]
        pieces, done = [], 0
        for change in replaced:
            pieces += [text[done : change["span"][0]], change["replacement"]]
            done = change["span"][1]
        whole = "".join(pieces) + text[done:]
        places = [(int(a), int(b)) for a, b in offsets]
        words_at = (ids != self.image_id).nonzero()[:, 0].tolist()
        tokens = readable(self.tokenizer, Coded(ids.tolist(), {}, whole, places))[: self.context_length]
        roles = roles_of(offsets, mask, spans, replaced)
        kept = [i for i in words_at if i < len(tokens)]
        if images:
            shown = {"tokens": [tokens[i] for i in kept], "positions": kept, "text": said(messages)}
            return {"kind": "image_text", "image": images[0], **shown}
        names = [ROLES[role] if role >= 0 else "unknown" for role in roles.tolist()][: self.context_length]
        return {"kind": "text", "tokens": tokens, "roles": names}

    def example_items(self) -> list[dict[str, Any]]:
        """Plain pictures with a caption."""
        side = getattr(getattr(self.model_config, "vision_config", None), "image_size", None)  # Chameleon has none
        return example_images(side if isinstance(side, int) else 112)

    def describe(self) -> dict[str, Any]:
        """Name, revision, tokens, prompt and template."""
        own = {"tokens": self.tokens, "prompt": self.prompt, "chat_template": self.chat_template}
        processor = self.given if self.tokenizer_name == self.name else self.tokenizer_name
        return {**super().describe(), "model": self.given, "tokenizer": processor, **own}

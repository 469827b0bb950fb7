"""The two towers of CLAP: sounds and texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmsae.errors import MmsaeError
from mmsae.sources.hugging_face_towers import HuggingFaceTowers
from mmsae.sources.positions import ORDINARY, PADDING
from mmsae.sources.sound import sound_of
from mmsae.sources.text import DType

MAPS = ("audio_model", "audio_model.audio_encoder")
"""Modules whose output is unfolded already: `[B, width, bands, frames]`."""


class CLAP(HuggingFaceTowers):
    """One tower of a CLAP model of transformers (HTS-AT and RoBERTa).

    A token of the audio tower is a band of frequencies during some time: rows carry `row` (0 is lowest), `column`
    (time), `start_s` and `duration_s`, in seconds of the sound. Sounds longer than what the model reads at once
    (`window_s`) are cut off: `AudioFolder` gives them in parts. Shorter ones are repeated or filled up as the extractor
    says; seconds are counted in the sound itself, and tokens behind its end are not read.

    Args:
        model: Local folder, id on the Hugging Face hub such as `laion/clap-htsat-unfused`, or `miniature:clap`.
        hook_points: Where to read: blocks `audio_model.audio_encoder.layers.0.blocks.1`, stages
            `audio_model.audio_encoder.layers.0` (behind the merging of patches; `:output[1]` is what was before it, but
            nothing reads that), `audio_model.audio_encoder.norm`, `audio_projection` for embeddings; of texts
            `text_model.encoder.layer.*`, `text_projection`.
        tower: Which half reads the items: their `audio` or their `text`.
        prompts: Name of a label to one text for each of its values, to measure zero-shot; the miniature brings its own.
        config: Build this configuration with random weights, e.g. `{"model_type": "clap", "audio_config": {...}}`;
            `model` is then only the tokenizer and the preprocessing, if it is a folder.
        dtype: Of the weights; "auto" is what the checkpoint has.
        revision: Branch, tag or commit on the hub.
        kwargs: `positions`, `drop_special`, `drop_outliers`, `device`: see `Source`.
    """

    towers = ("audio", "text")
    extra = "audio"
    auto_preprocessor = "AutoFeatureExtractor"

    def __init__(
        self,
        model: str | Path,
        hook_points: Sequence[str],
        tower: Literal["audio", "text"] = "audio",
        prompts: Mapping[str, Sequence[str]] | None = None,
        config: dict[str, Any] | None = None,
        dtype: DType = "auto",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, hook_points, tower, prompts, config, dtype, revision, **kwargs)

    @property
    def rate(self) -> int:
        """Samples per second that the model reads."""
        return int(self.preprocessor.sampling_rate)

    @property
    def window_s(self) -> float:
        """Seconds that the model reads at once."""
        return float(self.preprocessor.nb_max_samples / self.rate)

    def load(self) -> nn.Module:
        """The model."""
        model: Any = super().load()
        if model.config.model_type != "clap":
            raise MmsaeError(f"{self.name!r} is a model of the type {model.config.model_type}; CLAP reads clap.")
        return model

    def scale(self) -> Tensor:
        """The learnt one, of sounds against texts."""
        return self.model.logit_scale_a.exp()  # type: ignore[operator, union-attr]

    def plain_preprocessor(self, transformers: Any, config: Any) -> Any:
        """Ten seconds at 48 kHz, with as many bands and at most as many frames as the configuration reads."""
        audio = config.audio_config
        frames = audio.spec_size * (audio.spec_size // audio.num_mel_bins)
        return transformers.ClapFeatureExtractor(
            feature_size=audio.num_mel_bins,
            hop_length=max(480, -(-480_000 // (frames - 1))),
            truncation="fusion" if audio.enable_fusion else "rand_trunc",
        )

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """As any source; how samples are stored is no column."""
        batch = super().collate(items)
        kept = {name: values for name, values in batch["columns"].items() if name not in ("rate", "crop_s")}
        return {**batch, "columns": kept}

    def contents(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`input` `[B, channels, frames, bands]`, and the seconds of each sound that the model hears, `[B]`."""
        extractor = self.preprocessor
        # cut here: the extractor would take a random part
        sounds = [sound_of(item, self.rate)[: extractor.nb_max_samples] for item in items]
        found = extractor([s.astype(np.float64) for s in sounds], sampling_rate=self.rate, return_tensors="pt")
        seconds = torch.tensor([len(s) / self.rate for s in sounds])
        return {"input": found["input_features"].float(), "seconds": seconds}

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Of sounds."""
        model: Any = self.model
        longer = torch.zeros(len(batch["input"]), 1, dtype=torch.bool, device=batch["input"].device)
        heard = model.audio_model(input_features=batch["input"], is_longer=longer)
        return model.audio_projection(heard.pooler_output)

    def embed_words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of texts."""
        model: Any = self.model
        return model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)

    def kinds(self, batch: dict[str, Any], T: int) -> Tensor:
        """Of sounds: tokens, and what was filled up behind the end."""
        if self.tower == "text":
            return super().kinds(batch, T)
        kinds = torch.full((len(batch["sample_id"]), T), ORDINARY)
        if (places := self._places(T)) is None:
            return kinds
        column, n_columns = places[1], places[2]
        begins = column * self.window_s / n_columns  # seconds, [T]
        return torch.where(begins[None] < self._filled(batch)[:, None], kinds, PADDING)

    def grid(self, batch: dict[str, Any], T: int) -> tuple[Tensor, Tensor]:
        """Band (0 is lowest) and time step of every token."""
        places = None if self.tower == "text" else self._places(T)
        if places is None:
            return super().grid(batch, T)
        B = len(batch["sample_id"])
        return places[0].expand(B, T), places[1].expand(B, T)

    def columns(self, batch: dict[str, Any], T: int) -> dict[str, Tensor]:
        """`start_s` and `duration_s` in seconds of the sound; NaN for embeddings. Of texts `token_id`."""
        if self.tower == "text":
            return super().columns(batch, T)
        B = len(batch["sample_id"])
        if (places := self._places(T)) is None:
            nowhere = torch.full((B, T), torch.nan)
            return {"start_s": nowhere, "duration_s": nowhere}
        row, column, n_columns = places
        duration = self.window_s / n_columns
        begins = (column * duration).expand(B, T)
        if self._repeats:  # a later repetition is the same sound
            begins = begins % batch["seconds"].cpu()[:, None]
        # row and column once more: of an output [B, width, side, side] they would be those of the folded picture
        grid = {"row": row.expand(B, T), "column": column.expand(B, T)}
        return {"start_s": begins.float(), "duration_s": torch.full((B, T), duration), **grid}

    def render(self, item: dict[str, Any]) -> dict[str, Any]:
        """The sound as the model hears it, and its caption; of texts the tokens."""
        if self.tower == "text":
            return super().render(item)
        samples = sound_of(item, self.rate)[: self.preprocessor.nb_max_samples]
        return {"kind": "audio", "samples": samples, "rate": self.rate, "text": str(item.get("text") or "")}

    def example_items(self) -> list[dict[str, Any]]:
        """Two tones with a caption."""
        time = np.arange(self.preprocessor.nb_max_samples) / self.rate
        tones = [0.1 * np.sin(2 * np.pi * hertz * time) for hertz in (220, 440)]
        return [{"audio": t, "rate": self.rate, "text": "a sound", "sample_id": i} for i, t in enumerate(tones)]

    @property
    def _repeats(self) -> bool:
        """Whether the extractor fills the window with repetitions of a short sound."""
        return self.preprocessor.padding in ("repeat", "repeatpad")

    def _filled(self, batch: dict[str, Any]) -> Tensor:
        """Seconds of the window in which there is sound `[B]`."""
        seconds = batch["seconds"].cpu()
        if self.preprocessor.padding == "repeat":
            return torch.full_like(seconds, self.window_s)
        return seconds * (self.window_s / seconds).floor() if self._repeats else seconds

    def _places(self, T: int) -> tuple[Tensor, Tensor, int] | None:
        """Band and time step of each of T tokens, and the number of time steps; None where tokens have no place.

        The encoder cuts the spectrogram along time into `ratio` pieces and stacks them, the earliest on top, each with
        its lowest band on top, to get a square; patches are counted row by row through that square.
        """
        model: Any = self.model
        config = model.config.audio_config
        ratio, side = config.spec_size // config.num_mel_bins, math.isqrt(T)
        if T == 1:
            return None
        if all(point.path in MAPS for point in self.points):
            deepest = config.spec_size // config.patch_stride[0] // 2 ** (len(config.depths) - 1)
            bands, steps = deepest // ratio, deepest * ratio
            if bands * steps == T:
                return torch.arange(T) // steps, torch.arange(T) % steps, steps
        if side * side != T or side % ratio:
            return None
        bands = side // ratio
        row, column = torch.arange(T) // side, torch.arange(T) % side
        return row % bands, row // bands * side + column, ratio * side

"""Readouts of models that write: words in continuations, answers to questions about pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmsae.errors import MmsaeError, checked
from mmsae.sources.chat import ROLES
from mmsae.steering.readouts import Measured, Readout, Steered


def saying(words: Sequence[str]) -> re.Pattern[str]:
    """Finds any of some words or phrases, whole, whatever their capitals."""
    if not words or not all(word.strip() for word in words):
        raise MmsaeError(f"words to look for are missing in {list(words)!r}.")
    return re.compile(r"\b(?:" + "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) + r")\b", re.I)


class ContinuationReadout(Readout):
    """Does the text that a language model writes say a word? And does the model as it is find that text likely?

    Effect and success: share of continuations with one of the words. Damage: nats per token by which the model without
    steering finds the continuation less likely than its own unsteered one. Changed: share of continuations that say
    something wrong about the facts that the prompt states, less that share without steering.

    Args:
        source: `CausalLM`.
        items: Prompts, under `text` or `messages`; their `sample_id` is their group.
        words: Any of them is a success.
        facts: For each prompt the words that would contradict it; None: nothing is known of facts.
        n_samples: Continuations of each prompt.
        max_new_tokens: Tokens of each.
        temperature: 0 takes the likeliest token; then one sample suffices.
        seed: Of the sampling; the same for all strengths.
        batch_size: Prompts at a time.
    """

    def __init__(
        self,
        source: Any,
        items: Sequence[dict[str, Any]],
        words: Sequence[str],
        facts: Sequence[Sequence[str]] | None = None,
        n_samples: int = 2,
        max_new_tokens: int = 24,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        if not items:
            raise MmsaeError("a readout needs at least one context.")
        self.source, self.items, self.words = source, list(items), saying(words)
        self.wrong = None if facts is None else [saying(of) if of else None for of in facts]
        self.n_samples = checked("n_samples", n_samples, 1)
        self.settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.seed, self.batch_size = seed, checked("batch_size", batch_size, 1)
        self.groups = np.array([int(item["sample_id"]) for item in items])
        self._reference: tuple[np.ndarray, np.ndarray] | None = None

    def measure(self, steered: Steered = nullcontext) -> Measured:
        """See `Readout`."""
        if self._reference is None:
            self._reference = self._run(nullcontext)[1:3]
        said, nats, wrong, shown = self._run(steered)
        return Measured(said, said, nats - self._reference[0], wrong - self._reference[1], shown)

    def texts(self, chosen: np.ndarray) -> tuple[list[str], list[str]]:
        """Prompts and continuations of some contexts (bool `[n]`), by the model as it is now."""
        items = [item for item, wanted in zip(self.items, chosen, strict=True) if wanted]
        written = self.source.generate(items, seed=self.seed, **self.settings)
        return [str(item.get("text", "")) for item in items], [one["text"].strip() for one in written]

    def _run(self, steered: Steered) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        n = len(self.items)
        said, nats, wrong, shown = np.zeros(n), np.zeros(n), np.full(n, np.nan if self.wrong is None else 0.0), []
        for i in range(0, n, self.batch_size):
            items = self.items[i : i + self.batch_size]
            for sample in range(self.n_samples):
                with steered():
                    texts = self.source.generate(items, seed=self.seed + 1009 * sample + i, **self.settings)
                share = 1 / self.n_samples
                nats[i : i + len(items)] += share * unlikelihood(self.source, texts)
                for j, one in enumerate(texts, i):
                    said[j] += share * bool(self.words.search(one["text"]))
                    if self.wrong is not None and (pattern := self.wrong[j]) is not None:
                        wrong[j] += share * bool(pattern.search(one["text"]))
                if sample == 0 and i == 0:
                    shown = [one["text"].strip() for one in texts[:8]]
        return said, nats, wrong, shown


@torch.no_grad()
def unlikelihood(source: Any, texts: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Mean nats per token of what was written, by the model as it is now, `[n]`; NaN where nothing was written.

    Args:
        source: That wrote it.
        texts: As `generate` gives them.
    """
    items = [{"input_ids": one["input_ids"], "sample_id": i} for i, one in enumerate(texts)]
    batch = source.collate(items)
    logits = source.forward(batch).logits[:, :-1].float()
    targets = batch["input_ids"][:, 1:].to(logits.device)
    nats = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    lengths = torch.tensor([one["prompt_length"] for one in texts], device=logits.device)
    place = torch.arange(1, batch["input_ids"].shape[1], device=logits.device)
    written = (place >= lengths[:, None]) & batch["attention_mask"][:, 1:].to(logits.device).bool()
    return ((nats * written).sum(1) / written.sum(1)).double().cpu().numpy()


class AnswerReadout(Readout):
    """What a multimodal model answers about pictures.

    Effect: probability of the wanted answer; success: whether it is the likeliest, token by token. Damage: nats by
    which the answers to other questions, those without steering, have become less likely, mean over these questions.
    Changed: share of them that are no longer the likeliest.

    Args:
        source: `VisionLanguage`.
        items: With pictures; their `sample_id` is their group.
        question: About each picture.
        answer: That is wanted.
        others: Other questions about the same pictures.
        batch_size: Pictures at a time.
        max_new_tokens: Longest answer to another question.
    """

    def __init__(
        self,
        source: Any,
        items: Sequence[dict[str, Any]],
        question: str,
        answer: str,
        others: Sequence[str] = (),
        batch_size: int = 32,
        max_new_tokens: int = 12,
    ) -> None:
        if not items:
            raise MmsaeError("a readout needs at least one context.")
        pictured = ("image", "images")
        self.source, self.batch_size = source, checked("batch_size", batch_size, 1)
        self.items = [{"sample_id": one["sample_id"], **{k: one[k] for k in pictured if k in one}} for one in items]
        self.question, self.answer, self.others = question, answer, list(others)
        self.max_new_tokens = max_new_tokens
        self.groups = np.array([int(item["sample_id"]) for item in items])
        self._before: list[tuple[list[str], Tensor]] | None = None

    def measure(self, steered: Steered = nullcontext) -> Measured:
        """See `Readout`."""
        if self._before is None:
            self._before = []
            for question in self.others:
                said = self._answers(question)
                self._before.append((said, self._likelihood(question, said)[0]))
        n = len(self.items)
        with steered():
            wanted, right = self._likelihood(self.question, [self.answer] * n)
            after = [self._likelihood(q, said) for q, (said, _) in zip(self.others, self._before, strict=True)]
            shown = self._answers(self.question, self.items[:8])
        damage, changed = np.zeros(n), np.full(n, np.nan)
        if after:
            pairs = list(zip(self._before, after, strict=True))
            damage = torch.stack([(old - new).clamp_min(0) for (_, old), (new, _) in pairs]).mean(0).numpy()
            changed = torch.stack([1 - same for _, (_, same) in pairs]).mean(0).numpy()
        return Measured(wanted.exp().numpy(), right.numpy(), damage, changed, shown)

    def _answers(self, question: str, items: list[dict[str, Any]] | None = None) -> list[str]:
        items = self.items if items is None else items
        found: list[str] = []
        for i in range(0, len(items), self.batch_size):
            talks = [asking(item, question) for item in items[i : i + self.batch_size]]
            written = self.source.generate(talks, max_new_tokens=self.max_new_tokens)
            found += [one["text"].strip() for one in written]
        return found

    @torch.no_grad()
    def _likelihood(self, question: str, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Logarithm of the probability of each answer, and whether it is the likeliest, float64 `[n]` each."""
        nats, right = [], []
        for i in range(0, len(self.items), self.batch_size):
            pairs = zip(self.items[i : i + self.batch_size], answers[i : i + self.batch_size], strict=False)
            batch = self.source.collate([asking(item, question, answer or ".") for item, answer in pairs])
            found = self.source.outcomes(self.source.forward(batch), batch)
            own = batch["token_columns"]["role"][:, 1:] == ROLES.index("assistant")
            length = (own & batch["attention_mask"][:, 1:].bool()).sum(1)
            nats.append(-found["cross_entropy"].double().cpu() * length)
            right.append(found["accuracy"].double().cpu())
        return torch.cat(nats), torch.cat(right)


def asking(item: Mapping[str, Any], question: str, answer: str | None = None) -> dict[str, Any]:
    """An item with a picture as a dialogue of one question."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {**item, "messages": messages}

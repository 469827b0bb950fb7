"""The tokens of each kind that make each latent fire most, with their activations, in one pass."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from mmsae.codes import Codes
from mmsae.cores import SAECore
from mmsae.errors import MmsaeError, checked
from mmsae.files import write_atomic
from mmsae.metrics.cross_modal_weight import IMAGE, TEXT, cross_modal_weight
from mmsae.spec import Batch, in_float32, rows_of
from mmsae.store.top import TopActivations

KINDS = {TEXT: "text", IMAGE: "image"}
QUANTILE = 0.999
OCTAVES, STEPS = 32, 8  # of the histogram of codes: 2^-16 to 2^16, each octave in eight
LOWEST = (127 - OCTAVES // 2) * STEPS  # the exponent and the first three bits of a float32 are one number


class CrossModal(NamedTuple):
    """What `StrongestTokens` finds.

    Attributes:
        weights: Omega of each latent `[d_latent]`, -1 to 1; 0 where too few tokens of a kind make it fire.
        centred: The same after the mean of each kind of token is taken away.
        threshold: Delta, the code above which a latent counts as firing, `[d_latent]`.
        null: Mean cosine of random text and image tokens, before and after the means are taken away, `[2]`.
        null_draws: Weights of as many latents as have one, if their tokens were random, `[n]`.
        rows: Rows of the strongest tokens, text and image, strongest first, int64 `[2, d_latent, n]`; -1 is none.
        firings: Text and image tokens on which each latent fires, int64 `[2, d_latent]`.
        n_tokens: Text and image tokens seen, int64 `[2]`.
    """

    weights: Tensor
    centred: Tensor
    threshold: Tensor
    null: Tensor
    null_draws: Tensor
    rows: Tensor
    firings: Tensor
    n_tokens: Tensor

    @property
    def bimodal(self) -> Tensor:
        """Latents that have a weight, bool `[d_latent]`."""
        return self.weights != 0

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write a safetensors file; `about` says what it is of."""
        tensors = {name: tensor.contiguous() for name, tensor in self._asdict().items()}
        write_atomic(path, save(tensors, {"about": json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path, about: dict[str, Any]) -> CrossModal | None:
        """What `save` wrote about the same things; None if there is no such file, or it is about others."""
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("about") != json.dumps(about, sort_keys=True):
                    return None
                return cls(*(file.get_tensor(name) for name in cls._fields))
        except (FileNotFoundError, SafetensorError):
            return None


class StrongestTokens:
    """Streams tokens and keeps, for every latent, the activations of those of each kind that make it fire most.

    Memory: the activations of tokens that are among the strongest of some latent, at most `2 n d_latent` and at most as
    many as are seen, each kept once and dropped when stronger ones come.

    Args:
        d_latent: Latents.
        n: Tokens of each kind (K in SAE-V).
        n_random: Random tokens of each kind, for the null.
        seed: Of the random tokens.
    """

    def __init__(self, d_latent: int, n: int = 16, n_random: int = 2048, seed: int = 0) -> None:
        self.n, self.d_latent = checked("n", n, 1), d_latent
        self.top = [TopActivations(d_latent, n) for _ in KINDS]
        self.histogram = torch.zeros(d_latent, OCTAVES * STEPS, dtype=torch.int32)
        self.kept: list[tuple[Tensor, Tensor]] = []  # rows, their activations
        self.limit = 4096  # rows kept before some are dropped
        self.n_random = checked("n_random", n_random, 1)
        self.random: list[tuple[Tensor, Tensor]] = []  # of each kind: a draw, the activation
        self.sums: list[Tensor] = []
        self.counts = torch.zeros(len(KINDS), dtype=torch.int64)
        self.g = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, x: Tensor, codes: Codes, token_type: Tensor) -> None:
        """Add tokens.

        Args:
            x: Activations `[rows, d]`.
            codes: Of them.
            token_type: 0 text, 1 image, `[rows]`.
        """
        x, token_type = x.float().cpu(), token_type.cpu()
        codes = codes.detach().sparse()
        assert codes.indices is not None
        values, indices = codes.values.float().cpu(), codes.indices.cpu()
        first = self.top[TEXT].n_rows
        for kind in KINDS:
            own = token_type == kind
            self.top[kind].update(Codes(values * own[:, None], indices, self.d_latent), first)
            self._sample(kind, x[own])
        on = values != 0
        bins = ((values[on].abs().contiguous().view(torch.int32) >> 20) - LOWEST).clamp(0, OCTAVES * STEPS - 1)
        place = indices[on] * (OCTAVES * STEPS) + bins
        self.histogram.view(-1).index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
        wanted = self._wanted()
        new = wanted[(wanted >= first) & (wanted < first + len(x))]
        self.kept.append((new, x[new - first]))
        if sum(len(rows) for rows, _ in self.kept) > self.limit:
            self._drop(wanted)
            self.limit = max(self.limit, 2 * len(self.kept[0][0]))

    def _wanted(self) -> Tensor:
        """Rows that are among the strongest of some latent, ascending."""
        rows = torch.cat([top.rows.flatten() for top in self.top]).unique()
        return rows[rows >= 0]

    def _drop(self, wanted: Tensor) -> None:
        """Keep the activations of these rows alone, in one piece."""
        rows, acts = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        good = torch.isin(rows, wanted)
        self.kept = [(rows[good], acts[good])]

    def _sample(self, kind: int, x: Tensor) -> None:
        """A uniform sample: the tokens with the largest of random numbers."""
        if len(self.random) <= kind:
            self.random.append((torch.zeros(0), x[:0]))
            self.sums.append(torch.zeros(x.shape[1], dtype=torch.float64))
        self.sums[kind] += x.double().sum(0)
        self.counts[kind] += len(x)
        draws = torch.cat([self.random[kind][0], torch.rand(len(x), generator=self.g)])
        best = draws.topk(min(self.n_random, len(draws))).indices
        self.random[kind] = draws[best], torch.cat([self.random[kind][1], x])[best]

    @torch.no_grad()
    def conclude(self, delta: float = 0.1) -> CrossModal:
        """Weights of all latents.

        Args:
            delta: Share of a latent's 99.9th percentile (over the tokens where it fires) that a code must exceed.
        """
        for kind, name in KINDS.items():
            if self.counts[kind] < self.n:
                raise MmsaeError(
                    f"there are {int(self.counts[kind])} {name} tokens, too few for the {self.n} strongest of a "
                    "latent: give conversations about pictures, and a source that reads all tokens."
                )
        threshold = delta * self.quantile()
        self._drop(self._wanted())
        rows, acts = self.kept[0]
        order = rows.argsort()
        rows, acts = rows[order], acts[order]
        enough = torch.stack([top.values.abs()[:, -1] > threshold for top in self.top]).all(0)
        latents = enough.nonzero()[:, 0]
        means = [(total / count).float() for total, count in zip(self.sums, self.counts, strict=True)]
        weights, centred = torch.zeros(2, self.d_latent)
        for part in latents.split(256):  # bounds the memory
            text, image = (acts[torch.searchsorted(rows, top.rows[part])] for top in self.top)
            weights[part] = cross_modal_weight(text, image)
            centred[part] = cross_modal_weight(text - means[TEXT], image - means[IMAGE])
        text, image = (x[torch.randperm(len(x), generator=self.g)] for _, x in self.random)
        n = min(len(text), len(image))
        null = [
            cross_modal_weight(text[:n], image[:n]),
            cross_modal_weight(text[:n] - means[TEXT], image[:n] - means[IMAGE]),
        ]
        draws = [
            cross_modal_weight(*(x[torch.randint(len(x), (self.n,), generator=self.g)] for x in (text, image)))
            for _ in latents
        ]
        return CrossModal(
            weights, centred, threshold, torch.stack(null), torch.stack(draws) if draws else torch.zeros(0),
            torch.stack([top.rows for top in self.top]), torch.stack([top.firings for top in self.top]), self.counts,
        )  # fmt: skip

    def quantile(self) -> Tensor:
        """The 99.9th percentile of each latent's codes, to within an eighth of an octave; inf where it never fires."""
        total = self.histogram.sum(1)
        rank = (QUANTILE * (total - 1).clamp_min(0)).double()
        upto = self.histogram.cumsum(1).double()
        place = (upto <= rank[:, None]).sum(1).clamp_max(OCTAVES * STEPS - 1)
        before = upto.gather(1, place[:, None])[:, 0] - self.histogram.gather(1, place[:, None])[:, 0]
        inside = (rank - before + 0.5) / self.histogram.gather(1, place[:, None])[:, 0].clamp_min(1)
        low, high = (((place + LOWEST + i) << 20).to(torch.int32).view(torch.float32) for i in (0, 1))
        largest = torch.stack([top.values[:, 0].abs() for top in self.top]).amax(0)
        found = torch.minimum(low + (high - low) * inside.float(), largest)
        return torch.where(total > 0, found, torch.inf)


def strongest_tokens(
    core: SAECore, batches: Iterable[Batch], n: int = 16, delta: float = 0.1, max_rows: int = 200_000, seed: int = 0
) -> CrossModal:
    """Weights of a dictionary over activation rows.

    Args:
        core: A folded dictionary in `eval` mode.
        batches: With the column `token_type`.
        n: Tokens of each kind.
        delta: See `StrongestTokens.conclude`.
        max_rows: Stop after so many rows.
        seed: Of the random tokens.
    """
    found = StrongestTokens(core.d_latent, n, seed=seed)
    seen = 0
    with tqdm(batches, desc="strongest tokens", leave=False, disable=None) as bar:
        for batch in bar:
            if "token_type" not in batch:
                raise MmsaeError(
                    "the activations do not tell text from image tokens: they need a column 'token_type', as "
                    "data.source=VisionLanguage gives at every token (not at a mean)."
                )
            batch = in_float32(batch)
            x = core.inputs(batch)
            found.update(x, core.encode(x, batch), batch["token_type"])
            seen += rows_of(batch)
            if seen >= max_rows:
                break
    if not seen:
        raise MmsaeError("there are no activations to weigh latents on.")
    return found.conclude(delta)

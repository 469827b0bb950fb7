"""ECG-JEPA: the encoder of 12-lead ECGs, its masks, and the objective that trains it."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, relu

from mmsae.encoders.signal_transformer import Block, SignalTransformer, start, waves
from mmsae.errors import checked

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
"""The order in which the encoder reads them."""


class ECGJEPA(SignalTransformer):
    """The encoder of ECG-JEPA (arXiv 2410.13867): a vision transformer over windows of all twelve leads.

    Defaults are those of the paper's ViT-XS, for 500 Hz: one token for 50 ms.

    Args:
        n_channels: Leads.
        patch: Samples of a token.
        dim: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
    """

    def __init__(self, n_channels: int = 12, patch: int = 25, dim: int = 192, depth: int = 8, heads: int = 4) -> None:
        super().__init__(n_channels, patch, dim, depth, heads, tokens="joint", n_registers=1)


class JEPA(nn.Module):
    """Predict the features of masked stretches, as a slowly following copy sees them, from the rest (arXiv 2410.13867).

    The context encoder sees the kept tokens alone; a narrow predictor gets its output and a mask token for each masked
    place; the loss is the mean absolute difference to what the target encoder, an exponential average of the context
    encoder that sees everything, says of those places. Nothing in that keeps the tokens from lying in a few directions;
    with `variance` and `covariance` the terms of VICReg (arXiv 2105.04906; in a JEPA: 2410.19560) do.

    Args:
        encoder: The context encoder.
        dim: Width of the predictor.
        depth: Its blocks.
        heads: Its attention heads.
        min_block: Shortest masked stretch, tokens.
        variance: Weight of what every number of the context encoder's tokens lacks to a standard deviation of 1.
        covariance: Weight of the mean squared covariance of one number with the others.
    """

    def __init__(
        self,
        encoder: SignalTransformer,
        dim: int = 96,
        depth: int = 8,
        heads: int = 4,
        min_block: int = 10,
        variance: float = 0.0,
        covariance: float = 0.0,
    ) -> None:
        super().__init__()
        self.variance, self.covariance = checked("variance", variance, 0), checked("covariance", covariance, 0)
        self.context = encoder
        self.target = copy.deepcopy(encoder).requires_grad_(False)
        self.min_block = checked("min_block", min_block, 1)
        width = encoder.norm.weight.shape[0]
        self.into = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.out_of = nn.Linear(dim, width)
        own = nn.ModuleDict({"into": self.into, "blocks": self.blocks, "out_of": self.out_of})
        start(own)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer in (self.into, self.out_of):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, g: torch.Generator) -> Tensor:
        """The loss of a batch `[B, C, T]`, its masks drawn from `g` on the CPU."""
        with torch.no_grad():
            truth = self.target(x)[:, self.target.n_registers :]
        patches = self.context.embedded(x)  # positions are added before tokens are left out
        B, N, _ = patches.shape
        masked = torch.stack(masked_blocks(B, N, kept_count(N, g), self.min_block, g)).to(x.device)
        order = masked.int().argsort(dim=1, stable=True)  # the kept ones first, both in order
        n_kept = int((~masked[0]).sum())
        kept, hidden = order[:, :n_kept], order[:, n_kept:]
        seen = self.context.encoded(take(patches, kept))[:, self.context.n_registers :]
        loss = l1_loss(self.predicted(seen, kept, hidden, N), take(truth, hidden))
        if self.variance or self.covariance:
            lack, shared = spread(seen.flatten(0, 1))
            loss = loss + self.variance * lack + self.covariance * shared
        return loss

    def predicted(self, seen: Tensor, kept: Tensor, hidden: Tensor, N: int) -> Tensor:
        """Features of the hidden places `[B, n_hidden, width]` from those of the kept ones `[B, n_kept, width]`."""
        code = waves(N, self.mask_token.shape[1]).to(seen)
        x = torch.cat([self.into(seen) + code[kept], self.mask_token + code[hidden]], 1)
        for block in self.blocks:
            x = block(x)
        return self.out_of(self.norm(x[:, kept.shape[1] :]))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the target encoder towards the context encoder; once for each optimizer step, after it."""
        for old, new in zip(self.target.parameters(), self.context.parameters(), strict=True):
            old.lerp_(new, 1 - momentum)


def spread(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What keeps tokens `[n, d]` from collapsing: the lack of deviation below 1, and squared covariances per number."""
    centred = tokens - tokens.mean(0)
    covariance = centred.T @ centred / (len(tokens) - 1)
    variance = covariance.diagonal()
    return relu(1 - (variance + 1e-4).sqrt()).mean(), (covariance.square().sum() - variance.square().sum()) / len(
        variance
    )


def kept_count(N: int, g: torch.Generator) -> int:
    """How many of `N` tokens every example of a batch keeps: between 15 and 25 of a hundred."""
    return math.ceil((0.15 + 0.1 * float(torch.rand((), generator=g))) * N)


def masked_blocks(B: int, N: int, n_kept: int, min_block: int, g: torch.Generator) -> list[Tensor]:
    """Masks of contiguous stretches: for each of `B` examples bool `[N]`, true where masked, `n_kept` of them false.

    Until enough is masked, a free stretch is chosen with a probability in proportion to its length, and a block of
    uniform length from `min_block` to what is left is put into it, anywhere; a stretch that is not longer than the
    block is masked whole. What is left of fewer than `min_block` is attached to a block.

    Args:
        B: Number of examples.
        N: Tokens of each.
        n_kept: Tokens that stay.
        min_block: Shortest masked stretch.
        g: Of the random numbers.
    """
    return [_masked(N, N - n_kept, min_block, g) for _ in range(B)]


def _masked(N: int, left: int, min_block: int, g: torch.Generator) -> Tensor:
    masked = torch.zeros(N, dtype=torch.bool)
    free = [(0, N)]
    while left > 0:
        if left < min_block:
            low, high, at_start = _beside_a_block(free, N, g)
            length = min(left, high - low)
            first = low if at_start else high - length
        else:
            low, high = free[int(torch.multinomial(torch.tensor([float(b - a) for a, b in free]), 1, generator=g))]
            length = min(int(torch.randint(min_block, left + 1, (), generator=g)), high - low)
            first = low + int(torch.randint(high - low - length + 1, (), generator=g))
        masked[first : first + length] = True
        left -= length
        free.remove((low, high))
        free += [part for part in ((low, first), (first + length, high)) if part[0] < part[1]]
    return masked


def _beside_a_block(free: list[tuple[int, int]], N: int, g: torch.Generator) -> tuple[int, int, bool]:
    """A free stretch and which of its ends touches a block; the start of the signal where there is no block yet."""
    edges = [(a, b, True) for a, b in free if a > 0] + [(a, b, False) for a, b in free if b < N]
    if not edges:
        return 0, N, True
    lengths = torch.tensor([float(b - a) for a, b, _ in edges])
    return edges[int(torch.multinomial(lengths, 1, generator=g))]


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens `[B, n, dim]` at `index` `[B, n]` of `[B, N, dim]`."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))

"""A pre-norm transformer over patches of a signal: all channels jointly, or one token for each channel and window."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mmsae.errors import MmsaeError, checked

Tokens = Literal["joint", "channels"]


class SignalTransformer(nn.Module):
    """Tokens of a signal: one for each window over all channels ("joint"), or one for each channel and window.

    The 12-lead ViT of ECG-JEPA (arXiv 2410.13867) is the joint form: a convolution over all leads whose stride is its
    width, fixed sine and cosine positions, a learned register in front, pre-norm blocks without biases. With
    tokens="channels" all channels share one patch embedding, each has a learned code of its own, and tokens stand
    channel by channel.

    Args:
        n_channels: Channels of the signal.
        patch: Samples of a window.
        dim: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        tokens: What one token is.
        n_registers: Learned tokens in front.
    """

    def __init__(
        self,
        n_channels: int = 12,
        patch: int = 25,
        dim: int = 192,
        depth: int = 8,
        heads: int = 4,
        tokens: Tokens = "joint",
        n_registers: int = 1,
    ) -> None:
        super().__init__()
        if dim % heads or dim % 2:
            raise MmsaeError(f"dim={dim} must be even and a multiple of heads={heads}.")
        self.n_channels, self.patch = checked("n_channels", n_channels, 1), checked("patch", patch, 1)
        self.tokens: Tokens = tokens
        joint = tokens == "joint"
        self.embed = nn.Conv1d(n_channels if joint else 1, dim, patch, stride=patch, bias=False)
        self.channel = None if joint else nn.Parameter(torch.zeros(n_channels, 1, dim))
        self.register = nn.Parameter(torch.zeros(checked("n_registers", n_registers, 0), dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(checked("depth", depth, 1)))
        self.norm = nn.LayerNorm(dim, eps=1e-6, bias=False)
        start(self)

    @property
    def n_registers(self) -> int:
        """Learned tokens in front of the others."""
        return len(self.register)

    def embedded(self, x: Tensor) -> Tensor:
        """Patches with their positions, without registers: `[B, C, T]` to `[B, N, dim]`."""
        if x.dim() != 3 or x.shape[1] != self.n_channels or x.shape[2] < self.patch:
            raise MmsaeError(
                f"a signal of shape {tuple(x.shape)} does not fit an encoder of [batch, {self.n_channels} channels, "
                f"at least {self.patch} samples]."
            )
        if self.channel is None:
            patches = self.embed(x).transpose(1, 2)  # [B, windows, dim]
            return patches + waves(patches.shape[1], patches.shape[2]).to(patches)
        patches = self.embed(x.flatten(0, 1)[:, None]).transpose(1, 2)  # [B * C, windows, dim]
        patches = patches + waves(patches.shape[1], patches.shape[2]).to(patches)
        return (patches.unflatten(0, x.shape[:2]) + self.channel).flatten(1, 2)

    def encoded(self, tokens: Tensor) -> Tensor:
        """Blocks and the final norm over registers and the given tokens `[B, n, dim]`, registers still in front."""
        x = torch.cat([self.register.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, n_registers + N, dim]` of signals `[B, C, T]`; samples behind the last whole patch are unseen."""
        return self.encoded(self.embedded(x))


class Block(nn.Module):
    """Attention and a perceptron of ratio 4, each behind a norm and beside a residual path; no biases.

    Args:
        dim: Width of the tokens.
        heads: Attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm_2 = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to the same."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


def start(model: nn.Module) -> None:
    """Truncated normals of 0.02; projections into a residual path are smaller by the root of twice their number."""
    depth = sum(isinstance(module, Block) for module in model.modules())
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            into_residual = name.endswith(("out.weight", "mlp.2.weight"))
            nn.init.trunc_normal_(weight, std=0.02 / math.sqrt(2 * depth) if into_residual else 0.02)


def waves(n: int, dim: int) -> Tensor:
    """Sines, then cosines of `n` positions, `[n, dim]`, with wavelengths from 2 pi to 10000 times that."""
    frequency = 10000.0 ** (-torch.arange(dim // 2) / (dim / 2))
    angle = torch.arange(n)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)

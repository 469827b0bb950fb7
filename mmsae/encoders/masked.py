"""Masked reconstruction of signals, as E4SelfLearning trains its encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmsae.encoders.ecg_jepa import spread
from mmsae.encoders.signal_transformer import SignalTransformer
from mmsae.errors import MmsaeError, checked


class MaskedReconstruction(nn.Module):
    """Fill in stretches of single channels that were set to zero, from the rest (E4SelfLearning, arXiv 2311.04215).

    Every channel is masked by itself, in runs of a few windows; the loss is the root mean squared error over what was
    masked, the mean over channels. The paper's code divides by all samples, so that its loss grows with the share that
    is masked; here by the masked ones. Nothing is asked of tokens of windows that are seen, and levels are easier to
    fill in than waves, so tokens end in a few directions; `variance` and `covariance` are the terms of VICReg (arXiv
    2105.04906) over all tokens, which hold them apart.

    Args:
        encoder: With one token for each channel and window (`tokens="channels"`).
        share: Of the windows of a channel that are masked, on average.
        run: Mean length of a masked run, windows.
        variance: Weight of what every number of the tokens lacks to a standard deviation of 1.
        covariance: Weight of the mean squared covariance of one number with the others.
    """

    def __init__(
        self,
        encoder: SignalTransformer,
        share: float = 0.15,
        run: float = 3.0,
        variance: float = 0.0,
        covariance: float = 0.0,
    ) -> None:
        super().__init__()
        self.variance, self.covariance = checked("variance", variance, 0), checked("covariance", covariance, 0)
        if encoder.tokens != "channels":
            raise MmsaeError(
                "MaskedReconstruction masks channels one by one: build the encoder with tokens='channels'."
            )
        self.encoder = encoder
        self.share, self.run = checked("share", share, 0.01, 0.9), checked("run", run, 1)
        self.head = nn.Linear(encoder.norm.weight.shape[0], encoder.patch)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, g: torch.Generator) -> Tensor:
        """The loss of standardised signals `[B, C, T]`, its masks drawn from `g` on the CPU."""
        loss, tokens = self.error(x, g)
        if self.variance or self.covariance:
            lack, shared = spread(tokens.flatten(0, 1))
            loss = loss + self.variance * lack + self.covariance * shared
        return loss

    def error(self, x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """The error of what was masked alone, and the tokens `[B, C * N, dim]`."""
        B, C, T = x.shape
        patch = self.encoder.patch
        N = T // patch
        masked = markov_masks((B, C), N, self.share, self.run, g).to(x.device)
        truth = x[..., : N * patch].unflatten(2, (N, patch))
        tokens = self.tokens(truth.masked_fill(masked[..., None], 0.0).flatten(2))
        found = self.head(tokens).unflatten(1, (C, N))
        missed = ((found - truth).square() * masked[..., None]).sum((0, 2, 3))
        squared = missed / (masked.sum((0, 2)).clamp(min=1) * patch)
        return squared.clamp(min=1e-12).sqrt().mean(), tokens  # a channel may have no mask, and a root no slope at 0

    def tokens(self, x: Tensor) -> Tensor:
        """Those of the encoder without registers, `[B, C, T]` to `[B, C * N, dim]`."""
        return self.encoder(x)[:, self.encoder.n_registers :]


def markov_masks(shape: tuple[int, int], N: int, share: float, run: float, g: torch.Generator) -> Tensor:
    """Masks of a chain of two states, bool `[*shape, N]`, true where masked.

    Args:
        shape: How many masks.
        N: Windows of each.
        share: That are masked on average.
        run: Mean length of a masked run.
        g: Of the random numbers.
    """
    leave = 1 / run
    enter = min(leave * share / (1 - share), 1.0)  # so that the share is that of the chain at rest
    draws = torch.rand((N, *shape), generator=g)
    states = [draws[0] < share]
    for draw in draws[1:]:
        states.append(torch.where(states[-1], draw >= leave, draw < enter))
    return torch.stack(states, -1)

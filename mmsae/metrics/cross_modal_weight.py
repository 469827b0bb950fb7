"""Do words and pictures make the same latents fire? Weights of latents, scores of samples and of image tokens.

After SAE-V (arXiv 2502.17514), with what its equations leave open decided as `docs/sae_v.md` says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.codes import Codes

TEXT, IMAGE = 0, 1
SCORES = ("cosine_co", "cosine", "co_l0", "l0", "l1", "co_occurrence")
"""Of samples, the higher the better; `sample_scores` says what they are."""
PATCH_SCORES = ("cosine", "co_l0", "l0", "l1")
"""Of image tokens."""


def cross_modal_weight(text: Tensor, image: Tensor) -> Tensor:
    """Mean cosine of the strongest text and image tokens of a latent, matched by rank.

    Args:
        text: Activations (not codes) of text tokens, strongest first, `[..., n, d]`.
        image: Of image tokens.

    Returns:
        `[...]`, -1 to 1.
    """
    return (normalize(text.float(), dim=-1) * normalize(image.float(), dim=-1)).sum(-1).mean(-1)


class Firing(NamedTuple):
    """What fires on the tokens of some samples.

    Attributes:
        text: Text tokens on which each latent fires, float `[n_samples, d_latent]`.
        image: Image tokens on which it does.
        total: Sum of all codes of a sample, `[n_samples]`.
        n_text: Text tokens of a sample, `[n_samples]`.
        n_image: Image tokens.
    """

    text: Tensor
    image: Tensor
    total: Tensor
    n_text: Tensor
    n_image: Tensor


def firing(codes: Codes, token_type: Tensor, sample: Tensor, n_samples: int, threshold: Tensor | None = None) -> Firing:
    """Count, for every sample, the tokens of each kind on which each latent fires.

    Args:
        codes: Of tokens `[rows, ...]`.
        token_type: 0 text, 1 image, `[rows]`.
        sample: Place of the sample of each token, `[rows]`.
        n_samples: How many samples.
        threshold: Codes up to this do not count, `[d_latent]`; None is 0.
    """
    codes = codes.sparse()
    assert codes.indices is not None
    values = codes.values.abs()
    on = values > (0 if threshold is None else threshold[codes.indices])
    group = (sample * 2 + (token_type == IMAGE).long())[:, None].expand_as(on)
    key = group[on] * codes.d_latent + codes.indices[on]
    counts = torch.bincount(key, minlength=2 * n_samples * codes.d_latent).view(n_samples, 2, codes.d_latent)
    tokens = torch.bincount(sample * 2 + (token_type == IMAGE).long(), minlength=2 * n_samples).view(n_samples, 2)
    total = values.new_zeros(n_samples).index_add_(0, sample, (values * on).sum(1))
    counts, tokens = counts.to(values.dtype), tokens.to(values.dtype)
    return Firing(counts[:, TEXT], counts[:, IMAGE], total, tokens[:, TEXT], tokens[:, IMAGE])


def sample_scores(found: Firing, weights: Tensor) -> dict[str, Tensor]:
    """How well words and picture of each sample go together.

    With `A_t` and `A_v` the latents that fire on any text and any image token of a sample, and the weights `w`:
    `cosine_co` is the sum of `w` over `A_t ∩ A_v`, `cosine` that over `A_t ∪ A_v` (the literal reading of the paper,
    which ranks pairs that do not match higher, for they touch more latents), `co_l0` and `l0` the sizes of these sets,
    `l1` the sum of all codes, `co_occurrence` the pairs of a text and an image token with a latent that fires on both.

    Args:
        found: What fires.
        weights: Of the latents `[d_latent]`.

    Returns:
        Name (`SCORES`) to `[n_samples]`.
    """
    text, image = found.text > 0, found.image > 0
    both, any_ = (text & image).to(weights.dtype), (text | image).to(weights.dtype)
    return {
        "cosine_co": both @ weights,
        "cosine": any_ @ weights,
        "co_l0": both.sum(1),
        "l0": any_.sum(1),
        "l1": found.total,
        "co_occurrence": (found.text * found.image).sum(1),
    }


def per_token(name: str, scores: Tensor, n_text: Tensor, n_image: Tensor) -> Tensor:
    """A score that does not grow with the length of a sample.

    `co_occurrence` is divided by the pairs of a text and an image token, `l1` by all tokens; the sets of the others
    grow with the words, and are divided by the number of text tokens.
    """
    if name == "co_occurrence":
        return scores / (n_text * n_image).clamp_min(1)
    return scores / (n_text + n_image if name == "l1" else n_text).clamp_min(1)


def patch_scores(codes: Codes, sample: Tensor, found: Firing, weights: Tensor) -> dict[str, Tensor]:
    """Which image tokens matter for the words of their sample.

    `l0` is the number of latents that fire, `l1` the sum of their codes, `co_l0` the number of those that also fire on
    a text token of the sample, `cosine` the sum of the weights of the latents that fire.

    Args:
        codes: Of image tokens `[rows, ...]`.
        sample: Place of their samples in `found`, `[rows]`.
        found: What fires on all tokens of these samples.
        weights: Of the latents `[d_latent]`.

    Returns:
        Name (`PATCH_SCORES`) to `[rows]`.
    """
    codes = codes.sparse()
    assert codes.indices is not None
    on = (codes.values != 0).to(weights.dtype)
    told = (found.text > 0).to(weights.dtype)[sample[:, None], codes.indices]
    return {
        "cosine": (on * weights[codes.indices]).sum(1),
        "co_l0": (on * told).sum(1),
        "l0": on.sum(1),
        "l1": codes.values.abs().sum(1),
    }

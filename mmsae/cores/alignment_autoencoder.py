"""The autoencoder that makes an implicit alignment of streams explicit, stage A of VL-SAE."""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from mmsae.codes import Codes
from mmsae.cores.frame import Frame, both, times
from mmsae.cores.shared_dictionary import PAIR, SharedDictionary, paired_rows
from mmsae.errors import checked
from mmsae.kernels import dense_linear
from mmsae.spec import ActivationSpec, Batch


class AlignmentAutoencoder(SharedDictionary):
    """Affine maps of each stream into a space where pairs are close by cosine, and back (VL-SAE, arXiv 2510.21323).

    Hidden states of a multimodal model are aligned only implicitly; `VLSAE` codes by cosine, so it reads these
    embeddings in their place (`--model.alignment=RUN`). The loss is InfoNCE in both directions over the batch, plus the
    mean squared error of each stream. Its codes are dense: the embeddings.

    Args:
        spec: Widths of the streams.
        d_latent: Width of the common space.
        temperature: Cosines are divided by it.
        normalize_contrastive: Compare by cosine, as the paper says; False by raw dot products, as its code does.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        temperature: float = 0.07,
        normalize_contrastive: bool = True,
    ) -> None:
        super().__init__(spec, d_latent)
        self.temperature = checked("temperature", temperature, 1e-6)
        self.normalize_contrastive = normalize_contrastive
        widths = list(self.spec.streams.values())
        self.encoders = nn.ParameterList([uniform(d_latent, width, fan_in=width) for width in widths])
        self.b_enc = nn.ParameterList([uniform(d_latent, fan_in=width) for width in widths])
        self.decoders = nn.ParameterList([uniform(d_latent, width, fan_in=d_latent) for width in widths])
        self.b_dec = nn.ParameterList([uniform(width, fan_in=d_latent) for width in widths])

    def code(self, number: int, x: Tensor) -> Codes:
        """The embedding."""
        return Codes(dense_linear(x, self.encoders[number], self.b_enc[number]), None, self.d_latent)

    def write(self, number: int, codes: Codes) -> Tensor:
        """From an embedding back."""
        return dense_linear(codes.dense(), self.decoders[number].t()) + self.b_dec[number]

    def rows(self, number: int) -> Tensor:
        """Decoder rows."""
        return self.decoders[number]

    def terms(self, x: list[Tensor], out: list[Tensor], codes: list[Codes], batch: Batch) -> dict[str, Tensor]:
        """InfoNCE of paired rows (the mean over pairs of streams), mean squared errors (their sum)."""
        errors = [(target - part).pow(2).mean() for target, part in zip(x, out, strict=True)]
        embedded = [normalize(e.values, dim=-1) if self.normalize_contrastive else e.values for e in codes]
        paired, ids = paired_rows(batch, x[0]) > 0, batch.get(PAIR)
        if ids is not None:
            embedded, ids = [e[paired] for e in embedded], ids[paired]
        found = [info_nce(one @ other.t() / self.temperature, ids) for one, other in combinations(embedded, 2)]
        return {"contrastive": torch.stack(found).mean(), "reconstruction": torch.stack(errors).sum()}

    @torch.no_grad()
    def joint_frame(self, number: int) -> Frame:
        """The whole way of a stream into the common space, and back, for a dictionary that works there."""
        old = {name: buffer.double() for name, buffer in self.frames[number].named_buffers()}
        encoder, decoder = self.encoders[number].double().t(), self.decoders[number].double()
        frame = Frame(len(old["centre"]))
        frame.put(
            centre=old["centre"],
            scale=both(old["scale"], encoder),
            shift=self.b_enc[number].double() + (old["shift"] @ encoder if old["shift"].ndim else 0.0),
            unscale=both(decoder, old["unscale"]),
            offset=times(self.b_dec[number].double(), old["unscale"]) + old["offset"],
        )
        return frame


def info_nce(logits: Tensor, ids: Tensor | None = None) -> Tensor:
    """Cross entropy of finding each row's partner among all columns, and the reverse; the mean of both.

    Args:
        logits: Similarity of row i of one stream with row j of the other, over the temperature, `[n, n]`.
        ids: Rows of the same pair, as of several captions of a picture, are not each other's negatives, `[n]`.
    """
    if len(logits) == 0:
        return logits.sum()
    own = torch.arange(len(logits), device=logits.device)
    if ids is not None:
        same = (ids[:, None] == ids[None]).fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    return (cross_entropy(logits, own) + cross_entropy(logits.t(), own)) / 2


def uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """Drawn from U(-1, 1) / sqrt(fan_in), as a linear layer of PyTorch begins."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

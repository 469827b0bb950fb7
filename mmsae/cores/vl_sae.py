"""VL-SAE: a code by distance that streams share, and a decoder for each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmsae.codes import Codes
from mmsae.cores.alignment_autoencoder import AlignmentAutoencoder, uniform
from mmsae.cores.shared_dictionary import SharedDictionary
from mmsae.errors import MmsaeError, checked
from mmsae.kernels import dense_linear, linear_topk, sparse_decode
from mmsae.spec import ActivationSpec, Batch


class VLSAE(SharedDictionary):
    """Keeps the k latents nearest by cosine, in one encoder for all streams, with a decoder each (arXiv 2510.21323).

    The code of latent i is `2 - ||x/|x| - E_i/|E_i||`, in [0, 2]: it differs between two inputs by no more than
    they do. Decoders are unconstrained; the loss is the mean squared error of each stream. Its baselines by arguments:
    SAE-S is `encoder="linear", shared_decoder=True`, SAE-D is `encoder="linear", shared_encoder=False`.

    Streams that no contrastive training has aligned, such as hidden states of a multimodal model, want an
    `AlignmentAutoencoder` before (`--model.alignment`, and `aligned`).

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents; 8 times the width in the paper.
        k: Latents kept per stream and row; all of them fire, whatever the input.
        encoder: "distance", or "linear": the positive part of the k largest of `x @ W.T + b`.
        shared_encoder: One encoder for all streams, which must then be of one width.
        shared_decoder: One decoder for all streams.
        aligned: Width of the space of an alignment autoencoder; None reads the streams as they are.
    """

    def __init__(
        self,
        spec: ActivationSpec | int,
        d_latent: int,
        k: int = 256,
        encoder: Literal["distance", "linear"] = "distance",
        shared_encoder: bool = True,
        shared_decoder: bool = False,
        aligned: int | None = None,
    ) -> None:
        super().__init__(spec, d_latent)
        if k > d_latent:
            raise MmsaeError(f"k={k} is larger than d_latent={d_latent}: choose k of at most {d_latent}.")
        self.k = checked("k", k, 1)
        self.encoder, self.shared_encoder, self.shared_decoder = encoder, shared_encoder, shared_decoder
        self.aligned = aligned if aligned is None else checked("aligned", aligned, 1)
        widths = [aligned or width for width in self.spec.streams.values()]
        if len(set(widths)) > 1 and (shared_encoder or shared_decoder):
            has = ", ".join(f"{name} ({width})" for name, width in self.spec.streams.items())
            raise MmsaeError(
                f"VLSAE shares weights between streams, which must be of one width, but the data have {has}: "
                "train an AlignmentAutoencoder first and set aligned and --model.alignment."
            )
        readers, writers = (widths[:1] if shared else widths for shared in (shared_encoder, shared_decoder))
        self.encoders = nn.ParameterList([uniform(d_latent, width, fan_in=width) for width in readers])
        self.b_enc = nn.ParameterList(
            [uniform(d_latent, fan_in=width) for width in readers] if encoder == "linear" else []
        )
        self.decoders = nn.ParameterList([uniform(d_latent, width, fan_in=d_latent) for width in writers])
        self.b_dec = nn.ParameterList([uniform(width, fan_in=d_latent) for width in writers])

    def align(self, autoencoder: AlignmentAutoencoder) -> None:
        """Read the embeddings of a trained autoencoder, and write through its decoders.

        Args:
            autoencoder: Of the same streams, taking them as this core gets them.
        """
        if self.aligned != autoencoder.d_latent:
            raise MmsaeError(
                f"the alignment autoencoder's space has {autoencoder.d_latent} dimensions, but this VLSAE has "
                f"aligned={self.aligned}: set aligned={autoencoder.d_latent}."
            )
        for stream, width in self.spec.streams.items():
            autoencoder.spec.require(stream, width)
        for number, stream in enumerate(self.outputs):
            joint = autoencoder.joint_frame(autoencoder.number(stream))
            self.frame(number).put(**dict(joint.named_buffers()))

    def start(self, batch: Batch) -> None:
        """Refuse to learn in a space that nobody has defined."""
        if self.aligned and self.frame(0).scale.ndim == 0:
            raise MmsaeError(
                f"VLSAE with aligned={self.aligned} reads the embeddings of an AlignmentAutoencoder: "
                "give the folder of a trained one (--model.alignment)."
            )

    def code(self, number: int, x: Tensor) -> Codes:
        """The k nearest, or the positive part of the k largest; chosen in full precision also under autocast."""
        table = self.encoders[0 if self.shared_encoder else number]
        if self.encoder == "linear":
            values, indices = linear_topk(x, table, self.b_enc[0 if self.shared_encoder else number], self.k)
            return Codes(values.relu(), indices, self.d_latent)
        with torch.autocast(x.device.type, enabled=False):
            # The nearest have the largest cosine. One is added, since the kernel looks for positive values only.
            above, indices = linear_topk(
                normalize(x, dim=-1), normalize(table, dim=-1), table.new_ones(self.d_latent), self.k
            )
            values = 2 - (4 - 2 * above).clamp_min(1e-9).sqrt()
        return Codes(values, indices, self.d_latent)

    def write(self, number: int, codes: Codes) -> Tensor:
        """From the decoder of the stream."""
        bias, rows = self.b_dec[0 if self.shared_decoder else number], self.rows(number)
        if codes.indices is None:
            return dense_linear(codes.values, rows.t()) + bias
        return sparse_decode(codes.values, codes.indices, rows) + bias

    def rows(self, number: int) -> Tensor:
        """Of the decoder of the stream."""
        return self.decoders[0 if self.shared_decoder else number]

    def terms(self, x: list[Tensor], out: list[Tensor], codes: list[Codes], batch: Batch) -> dict[str, Tensor]:
        """Mean squared error over rows and width, summed over the streams."""
        errors = [(target - part).pow(2).mean() for target, part in zip(x, out, strict=True)]
        return {"reconstruction": torch.stack(errors).sum()}

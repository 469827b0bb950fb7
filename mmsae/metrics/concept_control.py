"""Cross-modal control: raise a latent in the code of one stream, and see what is then found in the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.codes import Codes
from mmsae.cores import SharedDictionary
from mmsae.errors import MmsaeError, checked


class Control(NamedTuple):
    """What an edit does to the share of items with the attribute among those found.

    Attributes:
        before: Precision at k of the reconstructions without an edit.
        after: With the latent raised.
        random: With random live latents raised, so that the reconstruction moves as far, `[n_random]`.
    """

    before: float
    after: float
    random: Tensor

    @property
    def delta(self) -> float:
        """What the edit gains."""
        return self.after - self.before

    @property
    def over_random(self) -> float:
        """What it gains more than a random latent does."""
        return self.after - float(self.random.mean())


@torch.no_grad()
def cross_modal_control(
    core: SharedDictionary,
    queries: Tensor,
    gallery: Tensor,
    has: Tensor,
    latent: int,
    strength: float,
    stream: str | None = None,
    k: int = 10,
    n_random: int = 20,
    seed: int = 0,
) -> Control:
    """Add `strength` to a latent in the codes of queries of one stream, decode, and rank a gallery of the other.

    Args:
        core: In `eval` mode.
        queries: Activations of `stream`, `[n, width]`; best those without the attribute.
        gallery: Activations of the other stream in the same space, `[m, width]`, ranked by cosine.
        has: Which items of the gallery have the attribute, bool `[m]`.
        latent: That stands for it.
        strength: Added to its code.
        stream: Of the queries; None is the first.
        k: Items that count as found.
        n_random: Control latents, drawn from those that fire on the queries.
        seed: Of the draw.
    """
    stream = stream or core.outputs[0]
    if gallery.shape[1] != queries.shape[1]:
        raise MmsaeError(
            f"queries have width {queries.shape[1]} and the gallery {gallery.shape[1]}: they need a common space."
        )
    checked("k", k, 1, len(gallery))
    codes = core.encode_stream(stream, queries)
    plain, rows, items = core.decode_stream(stream, codes), core.dictionaries[stream], normalize(gallery, dim=-1)

    def precision(x: Tensor) -> float:
        found = (normalize(x, dim=-1) @ items.t()).topk(k, dim=-1).indices
        return float(has[found].float().mean())

    live = codes.firings().nonzero()[:, 0]
    live = live[(live != latent) & (rows[live].norm(dim=-1) > 0)]
    chosen = live[torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))[:n_random]]
    distance = strength * rows[latent].norm()
    random = [precision(raised(core, stream, codes, int(i), float(distance / rows[i].norm()))) for i in chosen]
    return Control(precision(plain), precision(raised(core, stream, codes, latent, strength)), torch.tensor(random))


def raised(core: SharedDictionary, stream: str, codes: Codes, latent: int, strength: float) -> Tensor:
    """Reconstructions in a stream of codes with `strength` added to one latent, whether it fires there or not."""
    pairs = codes.sparse()
    assert pairs.indices is not None
    here = (pairs.indices == latent) & (pairs.values != 0)
    indices = torch.cat([pairs.indices.masked_fill(here, latent), torch.full_like(pairs.indices[..., :1], latent)], -1)
    added = torch.full_like(pairs.values[..., :1], strength) + (pairs.values * here).sum(-1, keepdim=True)
    return core.decode_stream(stream, Codes(torch.cat([pairs.values * ~here, added], -1), indices, codes.d_latent))

"""How right is a dictionary, where the true features are known?

Throughout, `dictionary` holds one direction per latent `[d_latent, d]` of any norm, `features` unit rows
`[n_features, d]`. With `bipolar` a latent and its opposite are the same, so that magnitudes of cosines are compared:
for features of either sign, and for cores whose codes have either (`core.signed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mmsae.codes import Codes
from mmsae.errors import MmsaeError, checked

FOUND = 0.9
"""Cosine from which a feature counts as found (arXiv 2506.14002)."""
HALF = 0.5**0.5
"""A latent can be closer than this to only one of two orthogonal features."""
CARRIED = 0.4
"""Share of a parent that a child's latent must carry to have absorbed it (SAEBench)."""


# ---- directions


def cosines(dictionary: Tensor, features: Tensor, bipolar: bool = False) -> Tensor:
    """Of each feature with each latent `[n_features, d_latent]`; a latent of norm 0 has cosine 0."""
    if dictionary.shape[-1] != features.shape[-1]:
        raise MmsaeError(
            f"latents of width {dictionary.shape[-1]} cannot match features of width {features.shape[-1]}."
        )
    rows = dictionary / dictionary.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    found = features @ rows.T
    return found.abs() if bipolar else found


def best_cosines(dictionary: Tensor, features: Tensor, bipolar: bool = False) -> Tensor:
    """Cosine of each feature with its best latent, `[n_features]`; several features may have the same."""
    return cosines(dictionary, features, bipolar).max(dim=1).values


def recovery_rate(dictionary: Tensor, features: Tensor, at: float = FOUND, bipolar: bool = False) -> float:
    """Share of features whose best latent has a cosine above `at`: the feature recovery rate of arXiv 2506.14002."""
    return float((best_cosines(dictionary, features, bipolar) > at).float().mean())


class Matching(NamedTuple):
    """One latent at most for each feature, and one feature at most for each latent.

    Attributes:
        latent: Latent of each feature, int64 `[n_features]`; -1 where there were too few.
        cosine: Their cosines, `[n_features]`; 0 where there is no latent.
    """

    latent: Tensor
    cosine: Tensor


def match(dictionary: Tensor, features: Tensor, bipolar: bool = False) -> Matching:
    """The one-to-one assignment of largest summed cosine (Hungarian algorithm); its mean is the matched cosine.

    Unlike the best cosine, it gives no credit for one latent that resembles several features.
    """
    table = cosines(dictionary, features, bipolar).detach().cpu()
    one, other = (torch.from_numpy(found) for found in linear_sum_assignment(-table.double().numpy()))
    latent = torch.full((len(features),), -1)
    latent[one] = other
    cosine = torch.zeros(len(features))
    cosine[one] = table[one, other].float()
    return Matching(latent, cosine)


def splitting(dictionary: Tensor, features: Tensor, at: float = HALF, bipolar: bool = False) -> Tensor:
    """How many latents share each feature, int64 `[n_features]`: 1 is right, 0 none, more means that it is split.

    A latent belongs to the feature it resembles most, if their cosine exceeds `at`: feature splitting (Towards
    Monosemanticity, Transformer Circuits 2023) seen on directions. Leave latents that never fire out of `dictionary`.
    """
    nearest = cosines(dictionary, features, bipolar).max(dim=0)
    counts = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    return counts.index_add_(0, nearest.indices, (nearest.values > at).long())


class Composition(NamedTuple):
    """What each latent is made of.

    Attributes:
        size: Features in the sum that resembles it most, int64 `[d_latent]`; 1 is a feature by itself.
        cosine: With that sum, `[d_latent]`.
        parts: Which features those are, bool `[d_latent, n_features]`.
    """

    size: Tensor
    cosine: Tensor
    parts: Tensor

    def share(self, at: float = FOUND) -> float:
        """Share of latents that are sums of two features or more: size above 1, and cosine above `at`."""
        return float(((self.size > 1) & (self.cosine > at)).float().mean())


def composition(
    dictionary: Tensor, features: Tensor, on: Tensor, at_least: float = 1e-3, largest: int = 4, bipolar: bool = False
) -> Composition:
    """Which latents are sums of features that occur together, closer to the sum than to any of them.

    For each latent, features are added to its best one as long as `cos(w, f_1 + f_2 + ..)` grows, each time the one
    that makes it grow most, among those that are on together with all before it in a share `at_least` of the rows.
    Two orthogonal features are a better explanation than one if the lesser has more than tan(22.5°) = .41 of the
    other's weight. (Composed features: arXiv 2405.14860 and 2503.17547 describe them; the greedy search is ours.)

    Args:
        dictionary: Of the latents that fire.
        features: Unit rows.
        on: Which features are on, bool `[n_rows, n_features]`.
        at_least: Share of the rows in which two features must be on together.
        largest: Most features in a sum, at least 1.
        bipolar: Whether features may enter with either sign.
    """
    checked("largest", largest, 1)
    known = on.float()
    together = known.T @ known >= at_least * len(on)
    towards = cosines(dictionary, features).T  # [m, n]
    sign = towards.sign() if bipolar else torch.ones_like(towards)
    gain, products = towards * sign, features @ features.T
    cosine, first = gain.max(dim=1)
    parts = torch.nn.functional.one_hot(first, len(features)).bool()
    total = cosine.clone()  # <w, sum>
    square = torch.ones_like(cosine)  # ||sum||^2
    for _ in range(largest - 1):
        allowed = ~parts & ~(parts.float() @ (~together).float() > 0)
        cross = (parts * sign) @ products * sign  # <sum, f_j>
        grown = (total[:, None] + gain) / (square[:, None] + 2 * cross + 1).clamp_min(1e-12).sqrt()
        best, which = grown.masked_fill(~allowed, -torch.inf).max(dim=1)
        better = (best > cosine + 1e-6).nonzero()[:, 0]
        chosen = which[better]
        total[better] += gain[better, chosen]
        square[better] += 2 * cross[better, chosen] + 1
        cosine[better] = best[better]
        parts[better, chosen] = True
    return Composition(parts.sum(1), cosine, parts)


class Leak(NamedTuple):
    """Where the latents of features of several streams write to.

    Attributes:
        private: Mean share of the norm that the best latents of private features put into other streams.
        told_apart: Share of features whose best latent has, in each stream, the feature's own share within 0.1.
    """

    private: float
    told_apart: float


def leak(dictionary: Tensor, features: Tensor, widths: Mapping[str, int], bipolar: bool = False) -> Leak:
    """Are features of one stream and features of all told apart? Streams stand side by side in both arguments.

    The share of stream s in a direction is `||w_s|| / sum_t ||w_t||` (Crosscoders, Transformer Circuits 2024).
    """
    latent = cosines(dictionary, features, bipolar).argmax(dim=1)
    true, found = (_shares(rows, widths) for rows in (features, dictionary[latent]))
    private = (true == 0).any(1)
    foreign = (found * (true == 0)).sum(1)[private]
    right = ((true - found).abs() < 0.1).all(1)
    return Leak(float(foreign.mean()), float(right.float().mean()))


def _shares(rows: Tensor, widths: Mapping[str, int]) -> Tensor:
    norms = torch.stack([part.norm(dim=-1) for part in rows.split(list(widths.values()), -1)], -1)
    return norms / norms.sum(-1, keepdim=True).clamp_min(1e-8)


# ---- codes


class FeatureF1(NamedTuple):
    """For each feature, the latent that tells best when it is on.

    Attributes:
        latent: Chosen on the first half of the rows, int64 `[n_features]`.
        f1: On the second half, `[n_features]`; NaN where the feature was not on in both halves.
    """

    latent: Tensor
    f1: Tensor


def feature_f1(codes: Codes, on: Tensor) -> FeatureF1:
    """How well "this latent fires" says "this feature is on": `F1 = 2 hits / (firings + times on)`.

    A latent fires where its code is not 0, with whatever sign; no threshold is fitted.

    Args:
        codes: Of rows that are in no order.
        on: Which features are on in the same rows, bool `[n_rows, n_features]`.
    """
    half = len(on) // 2
    first, second = (f1_table(codes[rows], on[rows]) for rows in (slice(half), slice(half, None)))
    latent = first.argmax(dim=1)
    f1 = second.gather(1, latent[:, None])[:, 0]
    seen = on[:half].any(0) & on[half:].any(0)
    return FeatureF1(latent, torch.where(seen, f1, torch.nan))


def f1_table(codes: Codes, on: Tensor) -> Tensor:
    """F1 of every feature with every latent, `[n_features, d_latent]`, without a matrix of rows and latents."""
    hits = torch.zeros(codes.d_latent, on.shape[1], device=on.device)
    truth = on.float()
    if codes.indices is None:
        hits += (codes.values != 0).float().T @ truth
    else:
        for value, index in zip(codes.values.unbind(1), codes.indices.unbind(1), strict=True):
            fired = value != 0
            hits.index_add_(0, index[fired], truth[fired])
    return (2 * hits / (codes.firings()[:, None] + on.sum(0)).clamp_min(1)).T


class Absorption(NamedTuple):
    """For each parent with children.

    Attributes:
        parent: Which feature it is, int64 `[n_parents]`.
        latent: Its own latent, int64 `[n_parents]`.
        rate: Share of the rows with the parent and a child of it on in which its latent is silent and a child's latent
            carries it, `[n_parents]`; NaN without such rows.
        silent: Share of those rows in which its latent is silent, whoever carries it, `[n_parents]`.
    """

    parent: Tensor
    latent: Tensor
    rate: Tensor
    silent: Tensor


def absorption(
    codes: Codes, dictionary: Tensor, features: Tensor, coefficients: Tensor, parents: Tensor, bipolar: bool = False
) -> Absorption:
    """Does the latent of a general feature fall silent where one of a special feature took over its direction?

    After full absorption in SAEBench (arXiv 2409.14507), with the true features in place of probes. The latent of a
    parent is the one with the largest product of cosine and F1: one that keeps silent beside children still has the
    parent's direction. Latents of its children are those that, the parent aside, resemble one of its children most.
    A child's latent j carries parent p where `z_j <w_j, p>` is at least 0.4 of the parent's coefficient.

    Args:
        codes: Of the rows.
        dictionary: Decoder rows in the same units as the codes.
        features: Unit rows.
        coefficients: Of the features in the rows, `[n_rows, n_features]`, 0 where off.
        parents: Index of the parent of each feature, -1 for none, `[n_features]`.
        bipolar: Whether codes have either sign.
    """
    on, table = coefficients != 0, cosines(dictionary, features, bipolar)
    f1 = f1_table(codes, on)
    codes = codes.sparse()
    assert codes.indices is not None
    own, rates, silences = [], [], []
    general = parents[parents >= 0].unique()
    for parent in general.tolist():
        latent = int((table[parent] * (f1[parent] + 1e-6)).argmax())  # the nearest if none fires
        children = parents == parent
        others = table.clone()
        others[parent] = -torch.inf
        of_child = children[others.argmax(dim=0)]
        of_child[latent] = False
        rows = on[:, parent] & on[:, children].any(1)
        assert codes.indices is not None
        values, indices = codes.values[rows], codes.indices[rows]
        silent = ~((indices == latent) & (values != 0)).any(1)
        weight = (dictionary @ features[parent]) * of_child
        carried = (values * weight[indices]).amax(1) >= CARRIED * coefficients[rows, parent]
        own.append(latent)
        silences.append(silent.float().mean())
        rates.append((silent & carried).float().mean())
    return Absorption(general, torch.tensor(own), torch.stack(rates), torch.stack(silences))

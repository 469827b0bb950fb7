"""What an intervention does: new codes for some latents, new codes altogether, or a move of the activation itself.

Edits in a list apply in order. Those of latents that follow one another share one encoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.errors import MmsaeError, checked
from mmsae.steering.context import Context
from mmsae.steering.posterior import ConceptPosterior

Latents = int | Sequence[int] | Tensor
Amount = float | Sequence[float] | Tensor


class Rows(NamedTuple):
    """Which rows an edit is given.

    Attributes:
        context: The running call.
        example: Example of each row, int64 `[R]`.
        place: Its place among the T positions of the activation, int64 `[R]`.
    """

    context: Context
    example: Tensor
    place: Tensor


class Edit:
    """One thing that is done to activations."""


class LatentEdit(Edit, ABC):
    """New codes for some latents; the reconstruction changes by their decoder rows.

    Args:
        latents: Their numbers.
        amount: One number, or one for each latent.
    """

    reads: ClassVar[bool] = True
    """Whether the present codes matter; without them nothing is encoded."""

    def __init__(self, latents: Latents, amount: Amount = 0.0) -> None:
        chosen = torch.as_tensor(latents).reshape(-1)
        if not len(chosen) or chosen.is_floating_point():
            raise MmsaeError(f"{type(self).__name__} needs the numbers of latents, not {latents!r}.")
        if len(chosen.unique()) != len(chosen):
            raise MmsaeError(f"{type(self).__name__} names a latent twice: {chosen.tolist()}.")
        self.latents = chosen.long()
        self.amount = torch.as_tensor(amount, dtype=torch.float32)
        if self.amount.dim() > 1 or (self.amount.dim() and len(self.amount) != len(self.latents)):
            raise MmsaeError(
                f"{type(self).__name__} has {len(self.latents)} latents and amounts of shape "
                f"{tuple(self.amount.shape)}; give one number, or one for each latent."
            )

    @abstractmethod
    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """The new codes.

        Args:
            z: Present codes of `latents`, `[R, n]`.
            unit: What an amount of 1 is worth for each latent, `[n]`.
            rows: Where the rows come from.
        """

    def _amount(self, z: Tensor) -> Tensor:
        return self.amount.to(z)


class Add(LatentEdit):
    """Adds to the code: the activation moves along the decoder rows. Nothing is encoded.

    Args:
        latents: One latent, or several that form one vector.
        strength: In units of each latent's `scale`, if the intervention has one, else of its code.
    """

    reads = False

    def __init__(self, latents: Latents, strength: Amount = 1.0) -> None:
        super().__init__(latents, strength)

    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """`z + strength`."""
        return z + self._amount(z) * unit


class Scale(LatentEdit):
    """Multiplies the code by `factor`."""

    def __init__(self, latents: Latents, factor: Amount = 2.0) -> None:
        super().__init__(latents, factor)

    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """`factor * z`."""
        return self._amount(z) * z


class Suppress(LatentEdit):
    """Takes away a share of the code: 1 is full masking, 0 nothing.

    Args:
        latents: Their numbers.
        share: 0 to 1.
    """

    def __init__(self, latents: Latents, share: float = 0.5) -> None:
        super().__init__(latents, checked("share", share, 0, 1))

    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """`(1 - share) * z`."""
        return (1 - self._amount(z)) * z


class Ablate(LatentEdit):
    """Sets the code to 0, or to what it is on average.

    Args:
        latents: Their numbers.
        mean: Of the code of each latent over some data (`mmsae.steering.means`), for mean ablation.
    """

    def __init__(self, latents: Latents, mean: Amount = 0.0) -> None:
        super().__init__(latents, mean)

    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """0, or the mean."""
        return self._amount(z).expand_as(z)


class Clamp(LatentEdit):
    """Sets the code to a value.

    Args:
        latents: Their numbers.
        value: In units of `scale`, if the intervention has one.
        active: Only where the latent fires.
    """

    def __init__(self, latents: Latents, value: Amount = 1.0, active: bool = False) -> None:
        super().__init__(latents, value)
        self.active = active

    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """`value`, where wanted."""
        new = (self._amount(z) * unit).expand_as(z)
        return torch.where(z != 0, new, z) if self.active else new


class Swap(LatentEdit):
    """Moves the codes of some latents over to another one: it fires where they did, and as strongly for its unit.

    So a picture's red becomes blue where there is red, and nothing else gets blue, which `Add` would do everywhere.

    Args:
        target: The latent that gains.
        sources: Those that become 0, such as the latents of all other colours.
        factor: How much of their codes, in units of each one's `scale` if the intervention has one, the target gets.
    """

    def __init__(self, target: int, sources: Latents, factor: float = 1.0) -> None:
        super().__init__(torch.cat([torch.tensor([int(target)]), torch.as_tensor(sources).reshape(-1).long()]))
        self.factor = float(factor)

    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """`z_target + factor * unit_target * sum(z_source / unit_source)`, and 0 for the sources."""
        gained = (z[:, 1:] / unit[1:]).sum(1) * unit[0]
        new = torch.zeros_like(z) if self.factor else z.clone()
        new[:, 0] = z[:, 0] + self.factor * gained
        return new


class Attenuate(LatentEdit):
    """APP: takes away the share of a code that is likely to speak of a concept, `z * (1 - p(concept | z))`.

    Source: *Evaluating Sparse Autoencoders for Monosemantic Representation*, arXiv 2508.15094.

    Args:
        posterior: Fitted densities; its latents are edited.
        concept: Which of its concepts to remove.
    """

    def __init__(self, posterior: ConceptPosterior, concept: int) -> None:
        super().__init__(posterior.latents)
        self.posterior = posterior
        self.concept = int(checked("concept", concept, 0, posterior.n_concepts - 1))

    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """See the class."""
        return z * (1 - self.posterior(z, self.concept))


class SuppressRange(LatentEdit):
    """Sets a code to 0 (or the mean) where it lies within `width` standard deviations of what a concept makes of it.

    Source: range masking of arXiv 2502.06809, compared with APP in 2508.15094.

    Args:
        latents: Their numbers.
        mean: Of each latent's code over the rows of the concept.
        deviation: Their standard deviation.
        width: Half of the range, in deviations; 2 in the public code.
        value: What is put in place of these codes.
    """

    def __init__(
        self, latents: Latents, mean: Amount, deviation: Amount, width: float = 2.0, value: Amount = 0.0
    ) -> None:
        super().__init__(latents, value)
        self.mean, self.deviation = torch.as_tensor(mean), torch.as_tensor(deviation)
        self.width = checked("width", width, 0)

    def change(self, z: Tensor, unit: Tensor, rows: Rows) -> Tensor:
        """See the class."""
        inside = (z - self.mean.to(z)).abs() <= self.width * self.deviation.to(z)
        return torch.where(inside, self._amount(z).expand_as(z), z)


class CodesEdit(Edit, ABC):
    """New codes altogether."""

    @abstractmethod
    def codes(self, codes: Codes, rows: Rows) -> Codes:
        """The codes of the rows `[R, …]` that take the place of `codes`."""


class Patch(CodesEdit):
    """Transplants the codes of another input, position by position or everywhere the same.

    Args:
        source: Codes `[B, T, …]` as the core encodes the activation of the other input (1 in place of B or T: the same
            for all), see `mmsae.steering.codes_at`.
        latents: Those to transplant; None takes the whole code.
    """

    def __init__(self, source: Codes, latents: Latents | None = None) -> None:
        if source.values.dim() != 3:
            raise MmsaeError(
                f"Patch needs codes with the axes example, position, latent, not {tuple(source.values.shape)}."
            )
        self.source = source
        self.latents = None if latents is None else torch.as_tensor(latents).reshape(-1).long()

    def codes(self, codes: Codes, rows: Rows) -> Codes:
        """See the class."""
        B, T = self.source.values.shape[:2]
        needed = rows.context.shape
        if B not in (1, needed[0]) or T not in (1, needed[1]):
            raise MmsaeError(
                f"Patch has codes of {B} examples and {T} positions for an activation of {needed[0]} and {needed[1]}."
            )
        device = codes.values.device
        at = (rows.example if B > 1 else rows.example * 0).cpu(), (rows.place if T > 1 else rows.place * 0).cpu()
        values = self.source.values[at].to(codes.values)
        indices = None if self.source.indices is None else self.source.indices[at].to(device)
        theirs = Codes(values, indices, self.source.d_latent, codes.extra)
        return theirs if self.latents is None else _mixed(theirs, codes, self.latents.to(device))


class Only(CodesEdit):
    """Silences all latents but these.

    Args:
        latents: Those that stay as they are.
    """

    def __init__(self, latents: Latents) -> None:
        self.latents = torch.as_tensor(latents).reshape(-1).long()

    def codes(self, codes: Codes, rows: Rows) -> Codes:
        """See the class."""
        kept = self.latents.to(codes.values.device)
        if codes.indices is None:
            mask = torch.zeros(codes.d_latent, dtype=torch.bool, device=kept.device).index_fill_(0, kept, True)
            return replace(codes, values=codes.values * mask)
        return replace(codes, values=codes.values * torch.isin(codes.indices, kept))


class Reconstruct(CodesEdit):
    """Leaves the codes alone: with `keep_error=False` the activation becomes its reconstruction."""

    def codes(self, codes: Codes, rows: Rows) -> Codes:
        """As they are."""
        return codes


class VectorEdit(Edit, ABC):
    """Moves the activation itself; needs no dictionary, and always keeps what the dictionary does not explain."""

    @abstractmethod
    def moved(self, x: Tensor, rows: Rows) -> Tensor:
        """New activations `[R, d]`."""


class AddVector(VectorEdit):
    """Adds a vector: a difference of means, a probe's weights, a sum of decoder rows.

    Args:
        vector: `[d]`.
        strength: Its multiple.
        relative: In multiples of the norm of the activation at hand, along the unit vector.
    """

    def __init__(self, vector: Tensor, strength: float = 1.0, relative: bool = False) -> None:
        self.vector, self.strength, self.relative = _vector(vector), float(strength), relative

    def moved(self, x: Tensor, rows: Rows) -> Tensor:
        """`x + strength * v`, or `x + strength * |x| * v / |v|`."""
        v = self.vector.to(x)
        if self.relative:
            v = v / v.norm() * x.norm(dim=-1, keepdim=True)
        return x + self.strength * v


class Project(VectorEdit):
    """Removes the component along a vector, or sets it to a value.

    Args:
        vector: `[d]`.
        value: Component along the unit vector afterwards.
    """

    def __init__(self, vector: Tensor, value: float = 0.0) -> None:
        self.vector, self.value = _vector(vector), float(value)

    def moved(self, x: Tensor, rows: Rows) -> Tensor:
        """`x - (x · v) v + value * v`, v of length 1."""
        v = (self.vector / self.vector.norm()).to(x)
        return x + (self.value - x @ v)[:, None] * v


class Replace(VectorEdit):
    """Puts a vector in place of the activation; at a `:delta` point, of what the block writes (0 skips the block).

    Args:
        vector: `[d]`, or a number for a constant.
    """

    def __init__(self, vector: Tensor | float = 0.0) -> None:
        self.vector: Any = torch.as_tensor(vector, dtype=torch.float32)

    def moved(self, x: Tensor, rows: Rows) -> Tensor:
        """The vector for every row."""
        return self.vector.to(x).expand_as(x)


def _vector(vector: Tensor) -> Tensor:
    vector = torch.as_tensor(vector).float()
    if vector.dim() != 1 or not torch.isfinite(vector).all() or not vector.any():
        raise MmsaeError(f"a direction is one finite vector [d] other than 0, not of shape {tuple(vector.shape)}.")
    return vector


def _mixed(theirs: Codes, ours: Codes, latents: Tensor) -> Codes:
    """Some latents of the one, the rest of the other, as a pair list."""
    theirs, ours = theirs.sparse(), ours.sparse()
    assert theirs.indices is not None
    assert ours.indices is not None
    taken = theirs.values * torch.isin(theirs.indices, latents)
    kept = ours.values * ~torch.isin(ours.indices, latents)
    indices = torch.cat([ours.indices, theirs.indices], -1)
    return Codes(torch.cat([kept, taken], -1), indices, ours.d_latent, ours.extra)

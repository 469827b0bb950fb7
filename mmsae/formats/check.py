"""Whether two forms of a dictionary compute the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.codes import Codes
from mmsae.cores import SAECore, SharedDictionary
from mmsae.formats.tensors import Answer

TOLERANCE = 1e-5
CHUNK = 64  # rows whose codes are held as a dense matrix
N_NUDGES = 4
NUDGE = 2e-6  # of the root mean square of a row: what float32 sums lose in another order


class Difference(NamedTuple):
    """How far two forms of a dictionary are apart, relative to the largest number of a row where that exceeds 1.

    Attributes:
        codes: Largest difference of a code, in the unit of the second form.
        reconstructions: Largest difference of a reconstruction.
        n_rows: Rows that were compared.
        n_undecided: Rows that were left out of them, since their selection hangs on the last digit.
        l0: Latents that fire per row.
        unit: Largest change of unit of a latent, as a factor of at least 1.
    """

    codes: float
    reconstructions: float
    n_rows: int
    n_undecided: int
    l0: float
    unit: float

    @property
    def agrees(self) -> bool:
        """Whether both differences are within the tolerance, on rows enough."""
        return max(self.codes, self.reconstructions) <= TOLERANCE and self.n_undecided <= 0.05 * self.n_rows

    def __str__(self) -> str:
        left_out = f", {self.n_undecided} more left out as ties" if self.n_undecided else ""
        unit = f"; codes change unit by up to {self.unit:.3g}" if self.unit > 1 + TOLERANCE else ""
        return (
            f"largest difference of codes {self.codes:.1e}, of reconstructions {self.reconstructions:.1e} "
            f"({self.n_rows} rows{left_out}, {self.l0:.1f} latents per row{unit})"
        )


def answer_of(core: SAECore) -> Answer:
    """What a core of ours answers; several streams stand side by side."""

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = encoded(core, x)
        return in_rows(codes), core.joined(core.decode(codes))

    return answer


def encoded(core: SAECore, x: Tensor) -> Codes:
    """Codes of rows in which several streams stand side by side."""
    return core.encode(core.by_stream(x) if isinstance(core, SharedDictionary) else x)


def in_rows(codes: Codes) -> Tensor:
    """Dense codes `[n, d_latent]`; those of several streams side by side."""
    dense = codes.dense()
    return dense if dense.ndim == 2 else dense.transpose(0, 1).flatten(1)


def width_of(core: SAECore) -> int:
    """How wide the rows are that a core is asked about: several streams stand side by side."""
    return core.spec.d_in if len(core.outputs) == 1 else sum(core.spec.streams.values())


def random_rows(core: SAECore, n_rows: int = 256, seed: int = 0) -> Tensor:
    """Gaussian rows `[n, d_in]` at scales from 0.1 to 100, since a dictionary does not say how large its inputs are."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** torch.linspace(-1, 2, n_rows)
    return scales[:, None] * torch.randn(n_rows, width_of(core), generator=generator)


@torch.no_grad()
def compare(core: SAECore, other: Answer, rows: Tensor, dictionary: Tensor | None = None) -> Difference:
    """Ask two forms of a dictionary about the same activations.

    Args:
        core: The first form, in `eval` mode.
        other: The second form.
        rows: Activations `[n, d_in]`.
        dictionary: Decoder rows of the second form `[d_latent, d_out]`: a format may change the unit of a latent's
            codes by the norm of its row. None if it keeps them.
    """
    unit = torch.ones(core.d_latent)
    if dictionary is not None:
        mine, theirs = core.dictionary.norm(dim=-1), dictionary.norm(dim=-1)
        unit = torch.where((mine > 0) & (theirs > 0), mine / theirs, 1.0)
    largest = [0.0, 0.0]
    n_rows, n_fired = 0, 0
    generator = torch.Generator().manual_seed(1)
    for part in rows.float().split(CHUNK):
        codes, reconstruction = answer_of(core)(part)
        decided = _decided(core, part, codes, generator)
        pairs = zip((codes * unit.repeat(codes.shape[1] // len(unit)), reconstruction), other(part), strict=True)
        for i, (ours, theirs) in enumerate(pairs):
            scale = torch.cat([ours, part], dim=-1).abs().amax(-1).clamp_min(1)
            apart = ((ours - theirs).abs().amax(-1) / scale)[decided]
            apart = apart.nan_to_num(torch.inf)  # a NaN would pass every comparison
            largest[i] = max(largest[i], float(apart.max()) if len(apart) else 0.0)
        n_rows += int(decided.sum())
        n_fired += int((codes[decided] != 0).sum())
    change = float(torch.maximum(unit, 1 / unit).max())
    return Difference(largest[0], largest[1], n_rows, len(rows) - n_rows, n_fired / max(n_rows, 1), change)


def _decided(core: SAECore, x: Tensor, codes: Tensor, generator: torch.Generator) -> Tensor:
    """Rows whose latents stay chosen when the input moves by as much as float32 rounds, `[n]`."""
    size = NUDGE * x.pow(2).mean(-1, keepdim=True).sqrt()
    same = torch.ones(len(x), dtype=torch.bool)
    for _ in range(N_NUDGES):
        near = in_rows(encoded(core, x + size * torch.randn(x.shape, generator=generator)))
        appeared = (near != 0) != (codes != 0)
        # where a ReLU lets go, nothing jumps: only a jump in the value makes a row undecided
        scale = torch.cat([codes, x], dim=-1).abs().amax(-1, keepdim=True).clamp_min(1)
        jumped = appeared & ((near - codes).abs() > TOLERANCE * scale)
        same &= ~jumped.any(-1)
    return same

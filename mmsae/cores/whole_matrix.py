"""What dictionaries need that are fitted to all rows at once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmsae.cores.linear import LinearCore
from mmsae.errors import MmsaeError, checked
from mmsae.spec import TARGET, ActivationSpec, Batch


class WholeMatrix(LinearCore):
    """Holds the first rows of the pass, and fits them in `finish`.

    The rows are part of a checkpoint, so that a pass can be resumed, and are given up after the fit.

    Args:
        spec: Widths of the streams.
        d_latent: Number of latents.
        max_rows: Rows that are held; later ones are ignored.
    """

    gradient_free: ClassVar[bool] = True

    rows: Tensor
    n_rows: Tensor

    def __init__(self, spec: ActivationSpec | int, d_latent: int, max_rows: int = 65536) -> None:
        super().__init__(spec, d_latent)
        if TARGET in self.spec.streams:
            raise MmsaeError(f"{type(self).__name__} factors one stream, so it has no target to transcode to.")
        self.max_rows = checked("max_rows", max_rows, 1)
        self.requires_grad_(False)
        self.register_buffer("rows", torch.zeros(0, self.spec.d_in))
        self.register_buffer("n_rows", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def partial_fit(self, batch: Batch) -> None:
        """Keep the rows while there is room."""
        n = int(self.n_rows)
        x = self.inputs(batch)[: self.max_rows - n].to(self.rows)
        if n + len(x) > len(self.rows):  # doubled, so that a pass copies each row about once
            grown = min(max(2 * len(self.rows), n + len(x)), self.max_rows)
            self.rows = torch.cat([self.rows[:n], x.new_zeros(grown - n, x.shape[1])])
        self.rows[n : n + len(x)] = x
        self.n_rows += len(x)

    @torch.no_grad()
    def finish(self) -> None:
        """Fit the rows that were kept."""
        x = self.rows[: int(self.n_rows)]
        if len(x) < self.d_latent:
            raise MmsaeError(
                f"{type(self).__name__} has seen {len(x)} rows, fewer than d_latent={self.d_latent}: "
                "give it more rows, or lower d_latent."
            )
        self.fit_rows(x)
        self.rows, self.n_rows = self.rows[:0].clone(), torch.zeros_like(self.n_rows)

    @abstractmethod
    def fit_rows(self, x: Tensor) -> None:
        """Set the weights from rows `[n, d_in]`."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "rows" in state_dict:  # as many as the checkpoint holds
            self.rows = self.rows.new_zeros(state_dict[prefix + "rows"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

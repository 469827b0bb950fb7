"""What an analysis is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from mmsae.results import Result

if TYPE_CHECKING:
    from mmsae.cores import SAECore
    from mmsae.latents import LatentStore


class Analysis(ABC):
    """A question asked of a trained dictionary; constructor arguments are its settings.

    Subclasses are found by class name: `mmsae evaluate --analyses+=FactorRecovery`.
    """

    @abstractmethod
    def run(self, core: SAECore, latents: LatentStore, data: Any) -> Result:
        """Answer it.

        Args:
            core: The dictionary, folded: it takes raw activations.
            latents: Its codes over the evaluation split, with the metadata of every row.
            data: The datamodule, for items to render and for the model (`data.source`) when it can be run.
        """

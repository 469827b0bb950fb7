"""A store by itself."""

from __future__ import annotations

from datamodules.base import ActivationDataModule


class Stored(ActivationDataModule):
    """Activations that somebody extracted; the model and the data need not be at hand (`--data.store=FOLDER`)."""

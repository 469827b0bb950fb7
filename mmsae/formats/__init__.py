"""Foreign checkpoint formats: one file each, with `export` and `load`."""

from mmsae.formats import saelens

__all__ = ["saelens"]

"""mmsae: sparse autoencoders for every modality.

`import mmsae` loads nothing heavy; the names below are looked up on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmsae.artifact import load as load
    from mmsae.artifact import save as save
    from mmsae.errors import MmsaeError as MmsaeError
    from mmsae.spec import ActivationSpec as ActivationSpec
    from mmsae.training.module import SAEModule as SAEModule

_HOME = {
    "load": "mmsae.artifact",
    "save": "mmsae.artifact",
    "SAEModule": "mmsae.training.module",
    "ActivationSpec": "mmsae.spec",
    "MmsaeError": "mmsae.errors",
}

__all__ = ["ActivationSpec", "MmsaeError", "SAEModule", "__version__", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmsae' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

"""mmsae: sparse autoencoders for every modality.

`import mmsae` loads nothing heavy; the names below are looked up on first use.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Weights, moments and gradients are large: in pages of 2 MB a step at 32k latents is 5 to 8 % faster. torch reads this
# with its first allocation; elsewhere than on Linux, and where the user has chosen, it changes nothing.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

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

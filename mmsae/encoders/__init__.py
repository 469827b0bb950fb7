"""Small networks that we train ourselves, because no public weights can be read offline."""

from mmsae.encoders.ecg_jepa import ECGJEPA, JEPA, masked_blocks
from mmsae.encoders.folders import ENCODERS, built, described, read_encoder, write_encoder
from mmsae.encoders.masked import MaskedReconstruction, markov_masks
from mmsae.encoders.signal_transformer import SignalTransformer

__all__ = [
    "ECGJEPA", "ENCODERS", "JEPA", "MaskedReconstruction", "SignalTransformer", "built", "described", "markov_masks",
    "masked_blocks", "read_encoder", "write_encoder",
]  # fmt: skip

"""Small networks that we train ourselves, because no public weights can be read offline."""

from mmsae.encoders.ecg_jepa import ECGJEPA, JEPA, masked_blocks
from mmsae.encoders.folders import ENCODERS, built, described, read_encoder, write_encoder
from mmsae.encoders.signal_transformer import SignalTransformer

__all__ = [
    "ECGJEPA", "ENCODERS", "JEPA", "SignalTransformer", "built", "described", "masked_blocks", "read_encoder",
    "write_encoder",
]  # fmt: skip

"""Models and how to read them; importing this loads torch and nothing heavier."""

from mmsae.sources.base import MODALITIES, Source
from mmsae.sources.clip import OpenCLIP, SceneCLIP
from mmsae.sources.custom import Custom
from mmsae.sources.image import ImageSource
from mmsae.sources.positions import Positions
from mmsae.sources.text import CausalLM
from mmsae.sources.text_encoder import TextEncoder
from mmsae.sources.vision import Timm, Torchvision

__all__ = [
    "MODALITIES", "CausalLM", "Custom", "ImageSource", "OpenCLIP", "Positions", "SceneCLIP", "Source", "TextEncoder",
    "Timm", "Torchvision",
]  # fmt: skip

"""Models and how to read them; importing this loads torch and nothing heavier."""

from mmsae.sources.base import MODALITIES, Source
from mmsae.sources.clap import CLAP
from mmsae.sources.clip import OpenCLIP, SceneCLIP
from mmsae.sources.custom import Custom
from mmsae.sources.diffusion import Diffusion
from mmsae.sources.hf_clip import HFCLIP
from mmsae.sources.image import ImageSource
from mmsae.sources.lmm import VisionLanguage
from mmsae.sources.paired import PairedEmbeddings
from mmsae.sources.pooled import PooledModalities
from mmsae.sources.positions import Positions
from mmsae.sources.signal import Signal
from mmsae.sources.text import CausalLM
from mmsae.sources.text_encoder import TextEncoder
from mmsae.sources.vision import Timm, Torchvision
from mmsae.sources.vision_encoder import VisionEncoder

__all__ = [
    "CLAP", "HFCLIP", "MODALITIES", "CausalLM", "Custom", "Diffusion", "ImageSource", "OpenCLIP", "PairedEmbeddings",
    "PooledModalities", "Positions", "SceneCLIP", "Signal", "Source", "TextEncoder", "Timm", "Torchvision",
    "VisionEncoder", "VisionLanguage",
]  # fmt: skip

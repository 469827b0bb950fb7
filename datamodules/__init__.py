"""Datamodules: one file per data set or file format. The imports below are the registry."""

from datamodules.base import ActivationDataModule
from datamodules.dialogues import Dialogues
from datamodules.hugging_face_text import HuggingFaceText
from datamodules.image_folder import ImageFolder
from datamodules.scenes import Scenes
from datamodules.stored import Stored
from datamodules.text_files import TextFiles

__all__ = ["ActivationDataModule", "Dialogues", "HuggingFaceText", "ImageFolder", "Scenes", "Stored", "TextFiles"]

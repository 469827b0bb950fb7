"""Datamodules: one file per data set or file format. The imports below are the registry."""

from datamodules.base import ActivationDataModule
from datamodules.image_folder import ImageFolder
from datamodules.scenes import Scenes
from datamodules.stored import Stored
from datamodules.text_files import TextFiles

__all__ = ["ActivationDataModule", "ImageFolder", "Scenes", "Stored", "TextFiles"]

"""Datamodules: one file per data set or file format. The imports below are the registry."""

from datamodules.audio_folder import AudioFolder
from datamodules.base import ActivationDataModule
from datamodules.conversations import Conversations
from datamodules.dialogues import Dialogues
from datamodules.e4_sessions import E4Sessions
from datamodules.edf_recordings import EDFRecordings
from datamodules.hugging_face_text import HuggingFaceText
from datamodules.image_folder import ImageFolder
from datamodules.image_text import ImageText
from datamodules.prompts import Prompts
from datamodules.scene_prompts import ScenePrompts
from datamodules.scene_questions import SceneQuestions
from datamodules.scenes import Scenes
from datamodules.science_images import ScienceImages
from datamodules.signal_arrays import SignalArrays
from datamodules.simulated_e4_sessions import SimulatedE4Sessions
from datamodules.simulated_ecgs import SimulatedECGs
from datamodules.sounds import Sounds
from datamodules.stored import Stored
from datamodules.stories import Stories
from datamodules.text_files import TextFiles
from datamodules.torchvision_data import TorchvisionData
from datamodules.wfdb_records import WFDBRecords

__all__ = [
    "ActivationDataModule", "AudioFolder", "Conversations", "Dialogues", "E4Sessions", "EDFRecordings",
    "HuggingFaceText", "ImageFolder", "ImageText", "Prompts", "ScenePrompts", "SceneQuestions", "Scenes",
    "ScienceImages", "SignalArrays", "SimulatedE4Sessions", "SimulatedECGs", "Sounds", "Stored", "Stories", "TextFiles",
    "TorchvisionData", "WFDBRecords",
]  # fmt: skip

"""What our LightningCLIs share."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any, ClassVar

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import mmsae
from mmsae.cli.messages import Parser
from mmsae.errors import MmsaeError, checked
from mmsae.training.progress import StepProgress

NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",
    r".*LightningCLI's args parameter.*",
    r".*exists and is not empty.*",
    r".*number of training batches .* is smaller than the logging interval.*",
    r".*you defined a .?validation_step.? but.*",
    r".*predict returned None.*",
    r".*Total length of .* is zero.*",
    r".*configure_optimizers` returned `None`.*",
    r".*training_step` returned `None`.*",
    r"(?s).*was deprecated in v4.*",  # jsonargparse, of what Lightning calls
    r"(?s).*only one JsonargparseDeprecationWarning.*",
    r".*skip_none parameter was deprecated.*",
    r".*The dirpath has changed from.*",
    r".*No pretrained weights loaded.*",
    r".*`Trainer.fit` stopped.*",
)


def quiet() -> None:
    """Leave out messages of libraries that a user can do nothing about."""
    for pattern in NOISE:
        warnings.filterwarnings("ignore", message=pattern)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # else it asks for accelerate at every start
    logging.getLogger().addFilter(_worth_reading)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _worth_reading(record: logging.LogRecord) -> bool:
    return "No pretrained weights loaded" not in record.getMessage()  # of open_clip, also where they come right after


class MmsaeCLI(LightningCLI):
    """LightningCLI with readable errors and a switch for the number of threads."""

    callbacks: ClassVar[list[dict[str, Any]]] = [{"class_path": "mmsae.training.progress.StepProgress"}]
    """Default callbacks."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with our messages."""
        kwargs.setdefault("dump_header", [f"mmsae=={mmsae.__version__}"])
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="YAML file; flags after it win.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Threads; the default callbacks are part of the config and can be replaced there."""
        parser.set_defaults({"trainer.callbacks": self.callbacks})
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch.")

    def before_instantiate_classes(self) -> None:
        """Threads first; default callbacks that a switch of the Trainer turns off are taken away."""
        nulls(self.config)
        config = self.config.get(str(self.subcommand), self.config)
        switches = {"StepProgress": "enable_progress_bar", "ModelCheckpoint": "enable_checkpointing"}
        off = tuple(name for name, switch in switches.items() if config.trainer.get(switch) is False)
        if off and isinstance(config.trainer.callbacks, list):
            config.trainer.callbacks = [c for c in config.trainer.callbacks if not c.class_path.endswith(off)]
        threads = config.get("threads")
        if threads:
            torch.set_num_threads(checked("threads", threads, 1))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's refusals (no such accelerator, ...) are the user's to read."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise MmsaeError(f"--trainer: {str(error).strip().splitlines()[0]}") from error


def predictor(accelerator: str, devices: int | str, threads: int | None) -> Trainer:
    """A trainer that only predicts, with our progress bar."""
    if threads:
        torch.set_num_threads(checked("threads", threads, 1))
    bar = StepProgress()
    try:
        return Trainer(
            accelerator=accelerator, devices=devices, callbacks=[bar], logger=False, enable_checkpointing=False,
            enable_model_summary=False,
        )  # fmt: skip
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise MmsaeError(f"--accelerator, --devices: {str(error).strip().splitlines()[0]}") from error


def nulls(config: Namespace) -> None:
    """Undo what jsonargparse makes of a null that is given by a flag to a nested class: the text "None"."""
    for key, value in config.items():
        if value == "None":
            config[key] = None

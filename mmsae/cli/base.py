"""What our LightningCLIs share."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import mmsae
from mmsae.cli.help import shorten
from mmsae.cli.messages import Parser
from mmsae.errors import MmsaeError, checked

NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",
    r".*LightningCLI's args parameter.*",
    r".*exists and is not empty.*",
    r".*number of training batches .* is smaller than the logging interval.*",
    r".*you defined a .?validation_step.? but.*",
)


def quiet() -> None:
    """Leave out messages of Lightning that a user can do nothing about."""
    for pattern in NOISE:
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


class MmsaeCLI(LightningCLI):
    """LightningCLI with readable errors and a switch for the number of threads."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with our messages."""
        kwargs.setdefault("dump_header", [f"mmsae=={mmsae.__version__}"])
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="YAML file; flags after it win.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Threads."""
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch.")

    def before_instantiate_classes(self) -> None:
        """Threads first."""
        threads = self.config.get(str(self.subcommand), self.config).get("threads")
        if threads:
            torch.set_num_threads(checked("threads", threads, 1))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's refusals (no such accelerator, ...) are the user's to read."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise MmsaeError(f"--trainer: {str(error).strip().splitlines()[0]}") from error

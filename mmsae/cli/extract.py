"""`mmsae extract`."""

from __future__ import annotations

from typing import Any

from datamodules import ActivationDataModule
from mmsae.cli.base import MmsaeCLI, quiet
from mmsae.cli.help import shorten
from mmsae.training.extract import ExtractModule


class ExtractCLI(MmsaeCLI):
    """LightningCLI on ExtractModule."""

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """A short help."""
        super().setup_parser(*args, **kwargs)
        shorten(self.parser, "extract")


def run(args: list[str]) -> None:
    """Parse, run what is left to do, and say where it is."""
    quiet()
    cli = ExtractCLI(
        ExtractModule,
        ActivationDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=0,
        parser_kwargs={"description": "Run a model over a data set and write its activations to --model.out."},
        trainer_defaults={"logger": False, "enable_checkpointing": False, "enable_model_summary": False},
        run=False,
        args=args[1:],
    )
    cli.model.prepare(cli.datamodule)
    cli.trainer.predict(cli.model, return_predictions=False)
    if cli.trainer.is_global_zero:
        print(f"activations: {cli.model.out}")
        print(f"next:        mmsae fit --data.store={cli.model.out} --data=... --model.core=TopK")

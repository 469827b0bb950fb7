"""`mmsae extract`."""

from __future__ import annotations

from datamodules import ActivationDataModule
from mmsae.cli.base import MmsaeCLI, quiet
from mmsae.training.extract import ExtractModule


def run(args: list[str]) -> None:
    """Parse, run what is left to do, and say where it is."""
    quiet()
    cli = MmsaeCLI(
        ExtractModule,
        ActivationDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        trainer_defaults={"logger": False, "enable_checkpointing": False, "enable_model_summary": False},
        run=False,
        args=args[1:],
    )
    cli.model.prepare(cli.datamodule)
    cli.trainer.predict(cli.model, return_predictions=False)
    if cli.trainer.is_global_zero:
        print(f"activations: {cli.model.out}")
        print(f"next:        mmsae fit --data.store={cli.model.out} --data=... --model.core=TopK")

"""`mmsae fit`, `validate`, `test` and `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LightningArgumentParser
from safetensors.torch import save as save_tensors

import mmsae
from datamodules import ActivationDataModule
from mmsae.cli.base import MmsaeCLI, quiet
from mmsae.cli.help import shorten
from mmsae.errors import MmsaeError
from mmsae.files import write_atomic
from mmsae.kernels import fast_precision
from mmsae.training.module import MAIN, SAEModule

LOGGERS = [
    {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": "runs", "name": ""}}
    for name in ("CSVLogger", "TensorBoardLogger")
]
VERBS = {
    "fit": "Train a dictionary on the activations of --data, or with --resume RUN go on with an interrupted run.",
    "validate": "Measure the dictionary of --ckpt_path on the validation split.",
    "test": "Measure the dictionary of --ckpt_path on the test split.",
    "predict": "Write the codes of the test split by the dictionary of --ckpt_path.",
}


class FitCLI(MmsaeCLI):
    """LightningCLI on SAEModule; writes the artifact after `fit`."""

    callbacks: ClassVar[list[dict[str, Any]]] = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"save_last": True, "filename": "{step}", "every_n_train_steps": 1000},
        },
        *MmsaeCLI.callbacks,
    ]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data decide the widths."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--resume", metavar="RUN", help="Folder of a run to go on with; stands for its two files.")
        parser.link_arguments("data.spec", "model.spec", apply_on="instantiate")

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """A short help for each verb."""
        super().setup_parser(*args, **kwargs)
        for verb, parser in self._subcommand_parsers.items():
            shorten(parser, verb)

    def before_instantiate_classes(self) -> None:
        """A resume must name its checkpoint; checkpoints are read without running code that is pickled in them."""
        super().before_instantiate_classes()
        config = self.config.get(str(self.subcommand), self.config)
        if config.get("weights_only") is None:
            config["weights_only"] = True
        checkpoint = config.get("ckpt_path")
        if checkpoint in ("last", "best", "hpc") and self.subcommand == "fit":
            raise MmsaeError(
                f"ckpt_path={checkpoint} would look into the new, empty run: name the file, "
                "such as runs/version_0/checkpoints/last.ckpt."
            )
        if checkpoint is None and self.subcommand != "fit":
            raise MmsaeError(f"give --ckpt_path: without a checkpoint there is nothing to {self.subcommand}.")
        if checkpoint and checkpoint not in ("last", "best", "hpc", "registry") and not Path(checkpoint).is_file():
            raise MmsaeError(f"ckpt_path={checkpoint} does not exist.")

    def _parse_ckpt_path(self) -> None:
        """Look into the checkpoint early, and never let hyperparameters in it override the command line."""
        checkpoint = self.config.get(str(self.config.get("subcommand")), self.config).get("ckpt_path")
        if not checkpoint or not Path(checkpoint).is_file():
            return
        try:
            torch.load(checkpoint, weights_only=True, mmap=True, map_location="cpu")
        except Exception as error:
            raise MmsaeError(
                f"{checkpoint} is damaged, or holds more than tensors ({type(error).__name__}): it is not loaded."
            ) from error

    def instantiate_classes(self) -> None:
        """Loggers without a version share the next free one, so that a run is one folder; the config stays free."""
        trainer = self.config.get(str(self.subcommand), self.config).trainer
        chosen = trainer.get("logger")
        loggers = [entry.init_args for entry in chosen if "init_args" in entry] if isinstance(chosen, list) else []
        loggers = [init for init in loggers if "version" in init and init.version is None]
        for init in loggers:
            folder = Path(init.get("save_dir") or ".") / (init.get("name") or "")
            taken = [int(p.name[8:]) for p in folder.glob("version_*") if p.name[8:].isdigit()]
            init.version = max(taken, default=-1) + 1
        super().instantiate_classes()
        for init in loggers:
            init.version = None

    def after_fit(self) -> None:
        """Write every dictionary of the run."""
        trainer, model = self.trainer, self.model
        if trainer.log_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.validate(model, datamodule=self.datamodule, verbose=False)  # on all ranks
        if not trainer.is_global_zero:
            return
        for name in model.cores:
            folder = Path(trainer.log_dir) / ("sae" if name == MAIN else f"sae-{name.replace('/', '.')}")
            mmsae.save(model.export(name), folder, **self._description(name))
            print(f"dictionary: {folder}")
        print(f"next:       mmsae evaluate --run {trainer.log_dir}")

    def _description(self, name: str) -> dict[str, Any]:
        prefix = "" if name == MAIN else f"{name}/"
        metrics = {
            key: float(value)
            for key, value in self.trainer.callback_metrics.items()
            if key.startswith(f"val/{prefix}") and key.count("/") == 1 + prefix.count("/")
        }
        core = self.model.cores[name]
        return {
            "activations": {
                **self.datamodule.origin(),
                "stream": core.spec.input,
                "normalise": self.model.normalise,
            },
            "training": {
                "rows": int(core.rows_seen),
                "steps": self.trainer.global_step,
                "seed": self._get(self.config, "seed_everything"),
            },
            "metrics": metrics,
        }

    def after_predict(self) -> None:
        """Write the codes."""
        parts = self.trainer.predict_loop.predictions
        if not parts or self.trainer.log_dir is None:
            return
        width = max(p["values"].shape[1] for p in parts)
        pad = torch.nn.functional.pad
        tensors = {
            key: torch.cat([pad(p[key], (0, width - p[key].shape[1])) if p[key].ndim == 2 else p[key] for p in parts])
            for key in parts[0]
        }
        path = Path(self.trainer.log_dir) / "codes.safetensors"
        write_atomic(path, save_tensors(tensors))
        print(f"codes: {path}")


def resume(args: list[str]) -> list[str]:
    """Replace `--resume RUN` by the run's configuration and its last checkpoint, if it came that far."""
    words: list[str] = []
    rest = iter(args)
    for word in rest:
        if word != "--resume" and not word.startswith("--resume="):
            words.append(word)
            continue
        folder = Path(word.partition("=")[2] or next(rest, ""))
        config = folder / "config.yaml"
        if not config.is_file() or not config.stat().st_size:
            raise MmsaeError(f"--resume {folder} is no run that has begun: it has no config.yaml; start it anew.")
        last = folder / "checkpoints" / "last.ckpt"
        words += [f"--config={config}", *([f"--ckpt_path={last}"] if last.is_file() else [])]
    return words


def run(args: list[str]) -> None:
    """Parse and run."""
    quiet()
    FitCLI(
        SAEModule,
        ActivationDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={verb: {"description": text} for verb, text in VERBS.items()},
        trainer_defaults={
            "logger": LOGGERS,
            "precision": fast_precision(),
            "max_steps": 20_000,
            "max_epochs": -1,
            "val_check_interval": 1000,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
        args=resume(args),
    )

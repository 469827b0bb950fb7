"""Other libraries, each through its own trainer."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from contenders import CORES, PREFIXES, Contender, Task
from rounds import Batches
from torch import Tensor, nn


class SAELens(Contender):
    """`SAETrainer(...).fit()` on an iterator of activations; inference with the class that it saves for inference."""

    package = "sae_lens"
    autocast: ClassVar[bool] = False

    def make(self) -> Any:
        """The SAE for training."""
        import sae_lens

        task = self.task
        extra: dict[str, Any] = {"k": task.k}
        if task.core == "TopK":
            config, made = sae_lens.TopKTrainingSAEConfig, sae_lens.TopKTrainingSAE
        elif task.core == "BatchTopK":
            config, made = sae_lens.BatchTopKTrainingSAEConfig, sae_lens.BatchTopKTrainingSAE
        elif task.core == "Matryoshka":
            config, made = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig, sae_lens.MatryoshkaBatchTopKTrainingSAE
            extra["matryoshka_widths"] = [round(share * task.d_latent) for share in PREFIXES]
        elif task.core == "JumpReLU":
            config, made = sae_lens.JumpReLUTrainingSAEConfig, sae_lens.JumpReLUTrainingSAE
            extra = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(task.k)}
        else:
            config, made, extra = sae_lens.StandardTrainingSAEConfig, sae_lens.StandardTrainingSAE, {}
        return made(config(d_in=task.d_in, d_sae=task.d_latent, device=task.device, **extra))

    def build(self) -> None:
        self.load(self.make())

    def load(self, trained: Any) -> None:
        """Save for inference and load."""
        from sae_lens import SAE

        with tempfile.TemporaryDirectory() as folder:
            trained.save_inference_model(folder)
            self.sae = SAE.load_from_disk(folder, device=self.task.device)

    def train(self, batches: Batches) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        task = self.task
        config = SAETrainerConfig(
            total_training_samples=task.steps * task.batch_size,
            train_batch_size_samples=task.batch_size,
            lr=task.learning_rate,
            lr_end=task.learning_rate,  # unused by the constant schedule, but it must be given
            lr_warm_up_steps=task.warmup_steps,
            lr_decay_steps=task.steps - task.decay_start,
            device=task.device,
            autocast=self.autocast,
        )
        self.load(SAETrainer(config, self.make(), iter(batches)).fit())

    def encode(self, x: Tensor) -> Tensor:
        codes: Tensor = self.sae.encode(x)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        reconstruction: Tensor = self.sae.decode(codes)
        return reconstruction

    def dictionary(self) -> Tensor:
        rows: Tensor = self.sae.W_dec.detach()
        return rows


class SAELensBfloat16(SAELens):
    """With its own switch for mixed precision."""

    autocast = True


class DictionaryLearning(Contender):
    """`trainSAE` on an iterator of activations."""

    package = "dictionary_learning"
    autocast: ClassVar[torch.dtype] = torch.float32

    def config(self) -> dict[str, Any]:
        """Trainer class and its arguments."""
        from dictionary_learning.trainers import BatchTopKTrainer, JumpReluTrainer, TopKTrainer
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
        from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

        task = self.task
        shared = {
            "steps": task.steps,
            "activation_dim": task.d_in,
            "dict_size": task.d_latent,
            "layer": 0,
            "lm_name": "none",
            "lr": task.learning_rate,
            "warmup_steps": task.warmup_steps,
            "decay_start": task.decay_start,
            "device": task.device,
        }
        if task.core == "TopK":
            return {"trainer": TopKTrainer, "k": task.k, **shared}
        if task.core == "BatchTopK":
            return {"trainer": BatchTopKTrainer, "k": task.k, **shared}
        if task.core == "Matryoshka":
            shares = [b - a for a, b in zip((0.0, *PREFIXES), PREFIXES, strict=False)]
            return {"trainer": MatryoshkaBatchTopKTrainer, "k": task.k, "group_fractions": shares, **shared}
        shared["sparsity_warmup_steps"] = task.warmup_steps
        if task.core == "JumpReLU":
            return {"trainer": JumpReluTrainer, "target_l0": task.k, **shared}
        return {"trainer": StandardTrainerAprilUpdate, **shared}

    def build(self) -> None:
        config = self.config()
        self.model = config.pop("trainer")(**config).ae

    def train(self, batches: Batches) -> None:
        from dictionary_learning.training import trainSAE

        config = self.config()
        trainer = config["trainer"]

        def kept(**arguments: Any) -> Any:  # trainSAE returns nothing
            made = trainer(**arguments)
            self.model = made.ae
            return made

        config["trainer"] = kept
        trainSAE(iter(batches), [config], self.task.steps, device=self.task.device, autocast_dtype=self.autocast)

    def encode(self, x: Tensor) -> Tensor:
        codes: Tensor = self.model.encode(x)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        reconstruction: Tensor = self.model.decode(codes)
        return reconstruction

    def dictionary(self) -> Tensor:
        rows = self.model.W_dec if hasattr(self.model, "W_dec") else self.model.decoder.weight.T
        return rows.detach()


class DictionaryLearningBfloat16(DictionaryLearning):
    """With its own switch for mixed precision, which works on accelerators only."""

    devices = ("cuda",)
    autocast = torch.bfloat16


class Sparsify(Contender):
    """`Trainer(...).fit()` with its own optimizer and learning rate.

    Its trainer takes activations from a language model only, so here is a model of one module that gives the next
    batch, whatever the tokens; a step has one sequence of `batch_size` tokens.
    """

    package = "sparsify"
    cores = ("TopK",)
    optimizer: ClassVar[str] = "signum"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if task.device == "cpu":  # else it calls Triton wherever that is installed
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

    def config(self) -> Any:
        """Of the dictionary."""
        from sparsify import SparseCoderConfig

        return SparseCoderConfig(num_latents=self.task.d_latent, k=self.task.k)

    def build(self) -> None:
        from sparsify import SparseCoder

        self.model = SparseCoder(self.task.d_in, self.config(), device=self.task.device)

    def train(self, batches: Batches) -> None:
        from sparsify import SparseCoder, TrainConfig, Trainer

        task = self.task
        adam = self.optimizer == "adam"
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                self.config(),
                batch_size=1,
                optimizer=self.optimizer,  # type: ignore[arg-type]
                lr=task.learning_rate if adam else None,
                lr_warmup_steps=task.warmup_steps,
                hookpoints=["activations"],
                save_every=task.steps + 2,
                save_dir=folder,
                log_to_wandb=False,
            )
            tokens = [{"input_ids": torch.arange(task.batch_size)}] * task.steps
            model = OneModule(task)
            trainer = Trainer(config, tokens, model)  # type: ignore[arg-type]
            model.activations.batches = iter(batches)
            trainer.fit()
            saved = Path(folder) / "unnamed" / "activations"  # of the averaged weights, if the optimizer averages
            self.model = SparseCoder.load_from_disk(saved, device=task.device)

    def encode(self, x: Tensor) -> Any:
        return self.model.encode(x)

    def decode(self, codes: Any) -> Tensor:
        reconstruction: Tensor = self.model.decode(codes.top_acts, codes.top_indices)
        return reconstruction

    def firings(self, codes: Any) -> Tensor:
        counts = torch.zeros(self.task.d_latent, dtype=torch.int64, device=codes.top_acts.device)
        return counts.index_add_(0, codes.top_indices.flatten(), (codes.top_acts != 0).flatten().long())

    def dictionary(self) -> Tensor:
        rows: Tensor = self.model.W_dec.detach()
        return rows


class SparsifyAdam(Sparsify):
    """With Adam at the shared learning rate instead."""

    optimizer = "adam"


class OneModule(nn.Module):
    """What sparsify's trainer asks of a language model, with the one hook point "activations"."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.activations = Next(task)
        self.device = torch.device(task.device)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    @property
    def base_model(self) -> nn.Module:
        """Itself."""
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """The next batch as one sequence, `[1, batch_size, d_in]`."""
        out: Tensor = self.activations(input_ids)
        return out


class Next(nn.Module):
    """Gives the next of some batches, zeros before there are any."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.batches: Any = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[1, batch_size, d_in]`."""
        if self.batches is None:
            return torch.zeros(1, 1, self.task.d_in, device=self.task.device)
        batch: Tensor = next(self.batches)
        return batch[None]


class Overcomplete(Contender):
    """`train_sae` with a loader of batches; BatchTopK counts k per batch there, and JumpReLU pays an L1 price."""

    package = "overcomplete"
    cores = tuple(core for core in CORES if core != "Matryoshka")

    def build(self) -> None:
        from overcomplete import sae

        task = self.task
        made = {
            "TopK": partial(sae.TopKSAE, top_k=task.k),
            "BatchTopK": partial(sae.BatchTopKSAE, top_k=task.k * task.batch_size),
            "JumpReLU": sae.JumpSAE,
            "ReLU": sae.SAE,
        }[task.core]
        self.model = made(task.d_in, nb_concepts=task.d_latent, device=task.device).eval()

    def train(self, batches: Batches) -> None:
        from overcomplete.sae import mse_l1, train_sae

        def mean_squared_error(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, rows: Tensor) -> Tensor:
            return (x - x_hat).square().mean()  # as in its README

        self.build()
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.task.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.task.rate)
        criterion = mse_l1 if self.task.core in ("JumpReLU", "ReLU") else mean_squared_error
        train_sae(self.model, batches, criterion, optimizer, scheduler, nb_epochs=1, device=self.task.device)
        self.model.eval()

    def encode(self, x: Tensor) -> Tensor:
        codes: Tensor = self.model.encode(x)[1]
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        reconstruction: Tensor = self.model.decode(codes)
        return reconstruction

    def dictionary(self) -> Tensor:
        rows: Tensor = self.model.get_dictionary().detach()
        return rows

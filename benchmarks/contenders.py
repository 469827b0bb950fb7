"""What every contender does, the contenders of this library, and a plain control."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from rounds import Batches
from torch import Tensor, nn

CORES = ("TopK", "BatchTopK", "Matryoshka", "JumpReLU", "ReLU")
PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Nested shares of a Matryoshka dictionary, for everybody."""


@dataclass(frozen=True)
class Task:
    """The same for all contenders.

    Attributes:
        d_in: Width of the activations.
        d_latent: Number of latents.
        k: Active latents per row; the target L0 of JumpReLU.
        batch_size: Rows per step.
        steps: Steps in all, over which the schedule spans.
        core: Which dictionary.
        learning_rate: Its peak.
        warmup: Share of the steps over which the learning rate rises.
        decay: Share of the steps over which it falls to 0, at the end.
        device: "cpu" or "cuda".
        precision: Of our own contenders, in Lightning's words.
    """

    d_in: int
    d_latent: int
    k: int
    batch_size: int
    steps: int = 100
    core: str = "TopK"
    learning_rate: float = 3e-4
    warmup: float = 0.05
    decay: float = 0.2
    device: str = "cpu"
    precision: str = "32-true"

    @property
    def warmup_steps(self) -> int:
        """Steps of rising learning rate."""
        return int(self.warmup * self.steps)

    @property
    def decay_start(self) -> int:
        """First step of falling learning rate."""
        return int((1 - self.decay) * self.steps)

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        rising = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return rising * min(1.0, (self.steps - step) / (self.steps - self.decay_start))


class Contender(ABC):
    """One library, driven as its documentation says, at its own defaults.

    Args:
        task: What to train.
    """

    package: ClassVar[str] = ""
    """Module whose absence means that the contender cannot take part."""
    cores: ClassVar[tuple[str, ...]] = CORES
    """The dictionaries that it has."""
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def build(self) -> None:
        """Make an untrained dictionary that can encode."""

    @abstractmethod
    def train(self, batches: Batches) -> None:
        """Train on all batches, `[batch_size, d_in]` in float32 on the device; then it can encode."""

    @abstractmethod
    def encode(self, x: Tensor) -> Any:
        """Codes of `x` `[rows, d_in]`, in whatever form the library gives."""

    @abstractmethod
    def decode(self, codes: Any) -> Tensor:
        """Reconstruction `[rows, d_in]` from what `encode` gave."""

    @abstractmethod
    def dictionary(self) -> Tensor:
        """Decoder rows `[d_latent, d_in]`."""

    def firings(self, codes: Any) -> Tensor:
        """Rows in which each latent is active, `[d_latent]`; for dense codes."""
        return (codes != 0).sum(0)


class Mmsae(Contender):
    """The full path: `Trainer.fit` with the module, on batches from memory."""

    @property
    def precision(self) -> str:
        """Lightning's name of it."""
        return self.task.precision

    def make_core(self) -> Callable[..., Any]:
        """The core, but for the widths."""
        from mmsae import cores

        task = self.task
        if task.core == "JumpReLU":
            return partial(cores.JumpReLU, d_latent=task.d_latent, sparsity_loss="target_l0", target_l0=task.k)
        if task.core == "ReLU":
            return partial(cores.ReLU, d_latent=task.d_latent)
        if task.core == "Matryoshka":
            return partial(cores.Matryoshka, d_latent=task.d_latent, k=task.k, prefixes=PREFIXES)
        return partial(getattr(cores, task.core), d_latent=task.d_latent, k=task.k)

    def make_module(self) -> Any:
        """The Lightning module, with its own optimizer at the shared learning rate."""
        from mmsae.spec import ActivationSpec
        from mmsae.training.module import SAEModule

        default = inspect.signature(SAEModule.__init__).parameters["optimizer"].default

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = default(parameters)
            for group in made.param_groups:
                group["lr"] = self.task.learning_rate
            return made

        return SAEModule(
            self.make_core(),
            ActivationSpec({"x": self.task.d_in}),
            normalise="center_scale" if self.task.core in ("JumpReLU", "ReLU") else "center",
            optimizer=optimizer,
            lr_warmup_steps=self.task.warmup_steps,
            lr_decay=self.task.decay,
        )

    def build(self) -> None:
        self.core = self.make_core()(self.task.d_in).to(self.task.device).eval()

    def train(self, batches: Batches) -> None:
        import lightning as L

        module = self.make_module()
        trainer = L.Trainer(
            max_steps=self.task.steps,
            accelerator="gpu" if self.task.device == "cuda" else "cpu",
            devices=1,
            precision=self.precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Loader(batches))
        self.core = module.export().to(self.task.device)

    def autocast(self) -> AbstractContextManager[None]:
        """What Lightning puts around a step."""
        return torch.autocast(self.task.device, torch.bfloat16, enabled=self.precision == "bf16-mixed")

    def encode(self, x: Tensor) -> Any:
        with self.autocast():
            return self.core.encode(x)

    def decode(self, codes: Any) -> Tensor:
        reconstruction: Tensor = self.core.decode(codes)
        return reconstruction

    def firings(self, codes: Any) -> Tensor:
        counts: Tensor = codes.firings()
        return counts

    def dictionary(self) -> Tensor:
        rows: Tensor = self.core.dictionary
        return rows


class Loader:
    """Batches in memory as the Lightning module takes them."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        for x in self.batches:
            yield {"acts": {"x": x}}

    def sample(self, n_rows: int) -> dict[str, dict[str, Tensor]]:
        """The first rows."""
        return {"acts": {"x": self.batches.rows[:n_rows]}}


class MmsaeFloat32(Mmsae):
    """The same in strict float32."""

    @property
    def precision(self) -> str:
        return "32-true"


class MmsaeLoop(Mmsae):
    """The same core, normalisation, clipping, optimizer and books in a bare loop: what Lightning costs."""

    def train(self, batches: Batches) -> None:
        module = self.make_module().to(self.task.device)
        core, sample = module.core, batches.rows[: module.sample_rows]
        mean, scale = sample.mean(0), torch.ones((), device=sample.device)
        if module.normalise == "center_scale":
            scale = (self.task.d_in / (sample - mean).pow(2).sum(-1).mean()).sqrt()
        core.start({"acts": {"x": (sample - mean) * scale}})
        del sample
        optimizer = module.optimizer(core.parameter_groups())
        for group in optimizer.param_groups:  # as the module does
            group["fused"] = True
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.task.rate)
        core.train()
        for step, x in enumerate(batches, start=1):
            optimizer.zero_grad()
            with self.autocast():
                losses = core.losses({"acts": {"x": (x - mean) * scale}})
                total = torch.stack(list(losses.terms.values())).sum()
            core.count(losses.codes.firings(), len(x))
            total.backward()
            core.before_step()
            nn.utils.clip_grad_norm_(core.parameters(), module.gradient_clip)
            optimizer.step()
            scheduler.step()
            core.after_step(step, losses.codes.detach())
        core.finish()
        from mmsae.cores import Affine

        core.fold({"x": Affine(mean, scale)})
        self.core = core.eval().requires_grad_(False)


class Dense(Contender):
    """TopK as a textbook writes it: dense products, `torch.topk`, `scatter`, Adam."""

    cores = ("TopK",)

    def build(self) -> None:
        task = self.task
        rows = nn.functional.normalize(torch.randn(task.d_latent, task.d_in), dim=-1)
        self.decoder = nn.Parameter(rows.to(task.device))
        self.encoder = nn.Parameter(rows.T.contiguous().to(task.device))
        self.latent_bias = nn.Parameter(torch.zeros(task.d_latent, device=task.device))
        self.bias = nn.Parameter(torch.zeros(task.d_in, device=task.device))

    def train(self, batches: Batches) -> None:
        self.build()
        self.bias.data = batches.rows[: self.task.batch_size].mean(0)
        optimizer = torch.optim.Adam(
            [self.encoder, self.decoder, self.latent_bias, self.bias], lr=self.task.learning_rate
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.task.rate)
        for x in batches:
            optimizer.zero_grad()
            (x - self.decode(self.encode(x))).pow(2).sum(-1).mean().backward()
            optimizer.step()
            scheduler.step()
            self.decoder.data /= self.decoder.data.norm(dim=-1, keepdim=True)

    def encode(self, x: Tensor) -> Tensor:
        scores = (x - self.bias) @ self.encoder + self.latent_bias  # [rows, d_latent]
        values, indices = scores.topk(self.task.k, dim=-1)
        return torch.zeros_like(scores).scatter(-1, indices, values.relu())

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.decoder + self.bias

    def dictionary(self) -> Tensor:
        return self.decoder.detach()

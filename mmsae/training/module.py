"""The Lightning module that trains any core."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from mmsae import artifact
from mmsae.codes import Codes
from mmsae.cores import VLSAE, AlignmentAutoencoder, Losses, SAECore
from mmsae.cores.base import squared_error, variance
from mmsae.errors import MmsaeError, checked
from mmsae.metrics import Fidelity
from mmsae.spec import ACTS, GRADS, ActivationSpec, Batch, map_batch, rows_of
from mmsae.store.batches import first_rows
from mmsae.training.end_to_end import EndToEnd
from mmsae.training.normalise import Mode, Normaliser, moments
from mmsae.training.resume import check_description, describe, restore_rng, rng_state

CoreFactory = Callable[[ActivationSpec], SAECore]
MAIN = "main"


class SAEModule(L.LightningModule):
    """Trains sparse dictionaries on activations; the data decide the width.

    Args:
        core: The dictionary: a class with its arguments but the first, such as TopK with d_latent and k.
        spec: Widths of the streams; on the command line the data fill it in.
        also: More dictionaries to train in the same pass, by name. One named like a hook point reads that hook point,
            any other reads what `core` reads.
        normalise: What is done to activations before the core sees them, and folded into the exported weights: "none",
            "center" (subtract the mean), "scale" (mean squared norm = width), "center_scale", or "whiten".
        optimizer: Makes the optimizer from parameter groups.
        lr_warmup_steps: Steps over which the learning rate rises from 0.
        lr_decay: Share of all steps at the end over which the learning rate falls to 0.
        sparsity_warmup: Share of all steps over which a sparsity price rises from 0.
        gradient_clip: Largest gradient norm of each dictionary; 0 does not clip.
        sample_rows: Rows looked at before the first step, for statistics and initialisation.
        schedule_steps: Length of the schedules in steps; None is the length of this run. Set it when a run is to be
            continued later beyond its own end, so that both parts follow one schedule.
        end_to_end: Train for what the model does with the reconstructions; needs `data.whole_examples=true`.
        alignment: Run, or sae folder, of a trained AlignmentAutoencoder, whose embeddings VLSAE (`aligned`) reads.
    """

    started: Tensor

    def __init__(
        self,
        core: CoreFactory,
        spec: ActivationSpec | None = None,
        also: dict[str, CoreFactory] | None = None,
        normalise: Mode = "center",
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=3e-4),
        lr_warmup_steps: int = 1000,
        lr_decay: float = 0.2,
        sparsity_warmup: float = 0.05,
        gradient_clip: float = 1.0,
        sample_rows: int = 65536,
        schedule_steps: int | None = None,
        end_to_end: EndToEnd | None = None,
        alignment: str | None = None,
    ) -> None:
        super().__init__()
        if spec is None:
            if not isinstance(core, SAECore):
                raise MmsaeError("SAEModule needs the spec of the data, such as data.spec, to build its core.")
            spec = core.spec
        self.spec = spec
        self.optimizer = optimizer
        self.lr_warmup_steps = checked("lr_warmup_steps", lr_warmup_steps, 0)
        self.lr_decay = checked("lr_decay", lr_decay, 0, 1)
        self.sparsity_warmup = checked("sparsity_warmup", sparsity_warmup, 0, 1)
        self.gradient_clip = checked("gradient_clip", gradient_clip, 0)
        self.sample_rows = checked("sample_rows", sample_rows, 1)
        self.schedule_steps = schedule_steps if schedule_steps is None else checked("schedule_steps", schedule_steps, 1)
        self.normalise = normalise
        self.end_to_end = end_to_end
        self.cores = nn.ModuleDict()
        for name, factory in {MAIN: core, **(also or {})}.items():
            if name in self.cores or ("." in name and name not in spec.streams):
                raise MmsaeError(f"also has an entry {name!r}: choose another name.")
            own = ActivationSpec({name: spec.streams[name]}) if name in spec.streams else spec
            built = factory if isinstance(factory, SAECore) else factory(own)
            _ = built.config  # an argument that was not stored must fail here, not at the export
            self.cores[name.replace(".", "/")] = built
        self.normalisers = nn.ModuleDict(
            {stream.replace(".", "/"): Normaliser(width, normalise) for stream, width in spec.streams.items()}
        )
        self.alignment = alignment
        if alignment is not None:
            align([core for _, core in self._cores()], alignment, normalise)
        widths = {name: sum(core.spec.streams[stream] for stream in core.outputs) for name, core in self._cores()}
        self.fidelity = nn.ModuleDict({name: Fidelity(widths[name], core.d_latent) for name, core in self._cores()})
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._rng: dict[str, Any] | None = None  # of a checkpoint, until training takes it up

    # ---- the pieces

    @property
    def core(self) -> SAECore:
        """The main dictionary."""
        return self.cores[MAIN]  # type: ignore[return-value]

    def _cores(self) -> Iterator[tuple[str, SAECore]]:
        yield from self.cores.items()  # type: ignore[misc]

    def _normaliser(self, stream: str) -> Normaliser:
        return self.normalisers[stream.replace(".", "/")]  # type: ignore[return-value]

    def _label(self, core: str, metric: str) -> str:
        return metric if core == MAIN else f"{core}/{metric}"

    def normalised(self, batch: Batch) -> Batch:
        """The batch with every stream normalised, in float32, and gradients by the normalised streams."""
        missing = [stream for stream in self.spec.streams if stream not in batch[ACTS]]
        if missing:
            raise MmsaeError(f"the batch has no stream {missing[0]!r}; it has {', '.join(batch[ACTS])}.")
        normalised = {ACTS: {s: self._normaliser(s)(batch[ACTS][s]) for s in self.spec.streams}}
        if GRADS in batch:
            normalised[GRADS] = {s: self._normaliser(s).slope(batch[GRADS][s]) for s in self.spec.streams}
        return {**batch, **normalised}

    def setup(self, stage: str) -> None:
        """Refuse data of another width, and devices that a core cannot share, before any work."""
        alone = [type(core).__name__ for _, core in self._cores() if core.gradient_free]
        if alone and stage == "fit" and self.trainer.world_size > 1:
            raise MmsaeError(f"{alone[0]} learns from one pass on one device: set trainer.devices=1.")
        data = getattr(self.trainer, "datamodule", None)
        blind = [type(core).__name__ for _, core in self._cores() if GRADS in core.needs]
        if blind and stage == "fit" and not getattr(data, "gradients", True):
            raise MmsaeError(f"{blind[0]} reads gradients of the model's loss: set data.gradients=true.")
        if stage == "fit" and (self.end_to_end is not None) != getattr(data, "whole_examples", False):
            raise MmsaeError(
                "end-to-end training needs both: model.end_to_end (a loss) and data.whole_examples=true (its batches)."
            )
        if self.end_to_end is not None and data is not None:
            self.end_to_end.check(data.source)
        spec = getattr(data, "spec", None)
        if spec is not None:
            for stream, width in self.spec.streams.items():
                spec.require(stream, width)

    # ---- training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer with each core's parameter groups; linear warm-up and decay."""
        groups = [g for _, core in self._cores() if not core.gradient_free for g in core.parameter_groups()]
        if not groups:
            return None
        optimizer = self.optimizer(groups)
        for group in optimizer.param_groups:  # one pass over weights and moments in place of a dozen
            if group.get("fused", False) is None and group.get("foreach") is None:
                group["fused"] = self.device.type in ("cpu", "cuda")
        total = self.total_steps

        def factor(step: int) -> float:
            rate = min(1.0, (step + 1) / self.lr_warmup_steps) if self.lr_warmup_steps else 1.0
            if total is not None and self.lr_decay:
                rate *= min(1.0, (total - step) / (self.lr_decay * total))
            return max(rate, 0.0)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps that the schedules span, or None when nobody knows beforehand."""
        if self.schedule_steps is not None:
            return self.schedule_steps
        total = self.trainer.estimated_stepping_batches
        return int(total) if 0 < total < float("inf") else None

    def on_train_start(self) -> None:
        """Statistics and data-dependent initialisation, once; a resumed run takes up its random generators instead."""
        self._sparsity_steps = self.sparsity_warmup * (self.total_steps or 20_000)
        if self._rng is not None:  # not at the start of an epoch: in the middle of one there is none
            restore_rng(self._rng)
            self._rng = None
        if self.started:
            return
        with torch.no_grad():
            sample = self._sample()
            data = getattr(self.trainer, "datamodule", None)
            known = getattr(data, "statistics", None) or {}
            for stream in self.spec.streams:
                x = sample[ACTS][stream]
                if not torch.isfinite(x).all():
                    raise MmsaeError(f"activations at {stream} are not finite in the first {len(x)} rows.")
                needs_covariance = self.normalise == "whiten"
                statistics = known.get(stream)
                if statistics is None or (needs_covariance and statistics.covariance is None):
                    statistics = moments(x, needs_covariance)
                self._normaliser(stream).fit(statistics)
            sample = self.normalised(map_batch(sample, lambda t: t.to(self.device)))
            for _, core in self._cores():
                core.start(sample)
            self.started.fill_(True)
            if self.trainer.world_size > 1:
                for tensor in self.state_dict().values():
                    torch.distributed.broadcast(tensor, 0)

    def _sample(self) -> Batch:
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "sample"):
            return loader.sample(self.sample_rows)
        return first_rows(loader, self.sample_rows)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Sum of all loss terms of all cores."""
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "trained"):
            loader.trained()
        downstream = None
        if self.end_to_end is not None:
            downstream = self.end_to_end.run(self.trainer.datamodule.source, batch)  # type: ignore[attr-defined]
            batch = downstream.rows
        batch = self.normalised(batch)
        n_rows = int(self._join(torch.tensor(rows_of(batch)), "sum"))
        loss: Tensor | None = None
        self._codes: dict[str, Codes] = {}
        for name, core in self._cores():
            if core.gradient_free:
                core.partial_fit(batch)
                core.count(torch.ones_like(core.rows_since_fired), n_rows)
                continue
            losses = core.losses(batch)
            if downstream is not None:
                downstream.adjust(losses.terms, self._raw(core, losses.reconstruction))
            if "sparsity" in losses.terms and self._sparsity_steps:
                ramp = min(1.0, (self.global_step + 1) / self._sparsity_steps)
                losses.terms["sparsity"] = losses.terms["sparsity"] * ramp
            total = torch.stack(list(losses.terms.values())).sum()
            self._refuse_nan(name, core, batch, total)
            self._codes[name] = losses.codes.detach()
            core.count(self._join(losses.codes.firings(), "sum"), n_rows)
            self._log_step(name, core, batch, losses, total)
            loss = total if loss is None else loss + total
        return loss

    def _refuse_nan(self, name: str, core: SAECore, batch: Batch, loss: Tensor) -> None:
        # on an accelerator the check would wait for the device, so there it is made when numbers are logged anyway
        if (self.device.type == "cpu" or self._logging) and not torch.isfinite(loss):
            step = self.global_step + 1
            for stream, x in batch[ACTS].items():
                if not torch.isfinite(x).all():
                    raise MmsaeError(
                        f"step {step}: activations at {stream} are not finite, training stopped; "
                        "the last good checkpoint is kept."
                    )
            raise MmsaeError(
                f"step {step}: the loss of {type(core).__name__} on {core.spec.input} is not finite, training stopped; "
                "the last good checkpoint is kept. A lower learning rate may help."
            )

    @property
    def _logging(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (bool(every) and (self.global_step + 1) % every == 0) or self.global_step == 0

    @torch.no_grad()
    def _log_step(self, name: str, core: SAECore, batch: Batch, losses: Losses, total: Tensor) -> None:
        if not self._logging:
            return
        numbers = {"loss": total, **{f"loss/{term}": value for term, value in losses.terms.items()}}
        target = torch.cat([batch[ACTS][stream] for stream in core.outputs], -1)
        reconstruction = torch.cat(list(core.by_stream(losses.reconstruction).values()), -1)
        numbers["fvu"] = squared_error(target, reconstruction.float()) / variance(target)
        numbers["l0"] = losses.codes.l0().float().mean()
        dead_after = getattr(core, "dead_after", 10_000_000)
        numbers["dead_fraction"] = (core.rows_since_fired >= dead_after).float().mean()
        for key, value in numbers.items():
            shown = name == MAIN and key in ("fvu", "l0")
            self.log(self._label(name, key), value.detach(), prog_bar=shown, batch_size=1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradient projections, then clipping, each dictionary by itself."""
        for name, core in self._cores():
            if core.gradient_free:
                continue
            core.before_step()
            if self.gradient_clip:
                norm = nn.utils.clip_grad_norm_(core.parameters(), self.gradient_clip)
                if self._logging:
                    self.log(self._label(name, "gradient_norm"), norm, batch_size=1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, then constraints and thresholds: before any callback can save a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        for name, codes in self._codes.items():
            core = self.cores[name]
            assert isinstance(core, SAECore)
            core.after_step(self.global_step + 1, codes)
            for buffer, how in core.reduce.items():
                value = core.get_buffer(buffer)
                joined = self._join(value, "sum" if how == "mean" else how)
                value.copy_(joined / self.trainer.world_size if how == "mean" else joined)

    def _join(self, value: Tensor, how: str) -> Tensor:
        if self.trainer.world_size > 1:
            value = value.to(self.device).clone()  # the original may be a buffer
            operation = {"sum": "SUM", "min": "MIN", "max": "MAX"}[how]
            torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, operation))
        return value

    def on_train_epoch_end(self) -> None:
        """Cores without gradients need one pass."""
        if all(core.gradient_free for _, core in self._cores()):
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Conclude."""
        for _, core in self._cores():
            core.finish()

    # ---- evaluation

    def _evaluate(self, batch: Batch) -> None:
        if self.trainer.sanity_checking:  # before the first step there is nothing to measure, nor statistics
            return
        normalised = self.normalised(batch)
        for name, core in self._cores():
            codes = core.encode(core.inputs(normalised), normalised)
            outputs = self._raw(core, core.decode(codes))
            raw = torch.cat(list(outputs.values()), -1)
            x = torch.cat([batch[ACTS][stream].float() for stream in outputs], -1)
            self.fidelity[name].update(x, raw, codes)  # type: ignore[operator]

    def _raw(self, core: SAECore, reconstruction: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        """A reconstruction by stream, in the units of the model."""
        return {s: self._normaliser(s).invert(x.float()) for s, x in core.by_stream(reconstruction).items()}

    def _log_fidelity(self, split: str) -> None:
        if self.trainer.sanity_checking:
            return
        for name, _ in self._cores():
            metric = self.fidelity[name]
            assert isinstance(metric, Fidelity)
            for key, value in metric.compute().items():
                shown = name == MAIN and key in ("fvu", "l0")
                self.log(f"{split}/{self._label(name, key)}", value.float(), prog_bar=shown)
            for logger in self.loggers:
                log_density(logger, f"{split}/{self._label(name, 'log10_density')}", metric, self.global_step)
            metric.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the numbers of the split."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """FVU, L0 and the rest over the whole validation split."""
        self._log_fidelity("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the numbers of the split."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """FVU, L0 and the rest over the whole test split."""
        self._log_fidelity("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Codes of the main dictionary as a pair list, with the metadata of the rows."""
        normalised = self.normalised(batch)
        codes = self.core.encode(self.core.inputs(normalised), normalised).sparse()
        assert codes.indices is not None
        codes, columns = self.core.by_row(codes, {k: v for k, v in batch.items() if isinstance(v, Tensor)})
        return {"values": codes.values, "indices": codes.indices, **columns}

    # ---- checkpoints and the export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Descriptions of the cores and the state of the random generators; never broken weights."""
        for name, tensor in self.cores.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise MmsaeError(f"{name} is not finite at step {self.global_step}: the last good checkpoint is kept.")
        checkpoint["mmsae"] = {"cores": describe(dict(self._cores())), "normalise": self.normalise}
        checkpoint["rng"] = rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another dictionary; shapes alone would not tell."""
        check_description(checkpoint, describe(dict(self._cores())), self.normalise)
        self._rng = checkpoint.get("rng")

    @torch.no_grad()
    def export(self, name: str = MAIN) -> SAECore:
        """A copy of a dictionary that takes raw activations: normalisation folded in, in `eval` mode, on the CPU."""
        core = copy.deepcopy(self.cores[name]).cpu()
        assert isinstance(core, SAECore)
        if self.normalise != "none":
            affine = {s: self._normaliser(s).affine for s in core.spec.streams}
            core.fold({s: a._replace(mean=a.mean.cpu(), scale=a.scale.cpu()) for s, a in affine.items()})
        return core.eval().requires_grad_(False)


def align(cores: list[SAECore], folder: str, normalise: Mode) -> None:
    """Put a trained alignment autoencoder before the cores that read its embeddings."""
    autoencoder = artifact.load(folder)
    reading = [core for core in cores if isinstance(core, VLSAE) and core.aligned]
    if not isinstance(autoencoder, AlignmentAutoencoder) or not reading:
        raise MmsaeError(
            f"model.alignment={folder} holds a {type(autoencoder).__name__}, and goes with an AlignmentAutoencoder and "
            "a VLSAE with aligned=WIDTH: check both."
        )
    if normalise != "none":
        raise MmsaeError(f"an alignment autoencoder reads raw activations: set normalise=none instead of {normalise}.")
    for core in reading:
        core.align(autoencoder)


def log_density(logger: Any, name: str, metric: Fidelity, step: int) -> None:
    """Histogram of log10 firing frequency, for loggers that draw histograms (TensorBoard)."""
    draw = getattr(getattr(logger, "experiment", None), "add_histogram", None)
    if draw is not None:
        draw(name, metric.density().clamp_min(1e-10).log10().float().cpu(), step)

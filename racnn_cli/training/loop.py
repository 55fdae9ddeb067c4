"""The one training loop: `fit` runs every phase of every stage."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from racnn_cli.core import distributed, draws
from racnn_cli.core.model import RACNN
from racnn_cli.errors import RunError, is_out_of_memory
from racnn_cli.events import EpochEvent, Validation
from racnn_cli.recipe import Recipe
from racnn_cli.training import checkpoint
from racnn_cli.training.checkpoint import Candidate
from racnn_cli.training.ema import Ema
from racnn_cli.training.interrupts import StopRequested
from racnn_cli.training.phases import Phase
from racnn_cli.training.trainer import Trainer, seed_step

LOST_PROCESS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "nccl error",
    "timed out waiting",
)
"""What gloo and NCCL say when the process at the other end has died."""


SINGLE_VALUE = "expected more than 1"
"""What torch's normalization layers say of an input with one value per channel."""


def fit(trainer: Trainer, phase: Phase) -> None:
    """Run one phase from where the run stands to its end.

    Raises:
        RunError: a loss or a gradient is not finite (nothing was updated with it), or memory ran out.
        Interrupted: a signal arrived; the state is saved.
    """
    _Fit(trainer, phase).run()


def freeze_all_but(model: RACNN, modules: list[nn.Module]) -> list[nn.Parameter]:
    """Freeze every parameter outside of `modules`; returns those that are trained."""
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_training_mode(model: RACNN, modules: list[nn.Module], *, freeze_batchnorm: bool) -> None:
    """Put `modules` into training mode and everything else into eval mode, so that frozen buffers do not move.

    Args:
        model, modules: the network, and what is trained of it.
        freeze_batchnorm: let the BatchNorm layers of `modules` keep and use their running statistics.
    """
    model.eval()
    for module in modules:
        module.train()
        if freeze_batchnorm:
            for layer in module.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()


def make_optimizer(recipe: Recipe, phase: Phase, model: RACNN) -> torch.optim.Optimizer:
    """AdamW or SGD over what is trained.

    Parameters of one dimension (biases, norms), and those that a backbone names, such as position embeddings, have no
    weight decay.
    """
    heads, scales, undecayed = phase.heads(model), dict[nn.Parameter, float](), set[nn.Parameter]()
    for number in range(len(model.sizes)):
        backbone = model.scale(number).backbone
        named = dict(backbone.named_parameters())
        undecayed |= {named[name] for name in backbone.no_weight_decay() if name in named}
        if recipe.train.layer_decay < 1:
            scales |= {named[name]: scale for name, scale in backbone.layer_scales(recipe.train.layer_decay).items()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        lr = phase.lr * (phase.head_lr if parameter in heads else scales.get(parameter, 1.0))
        decay = recipe.train.weight_decay if parameter.ndim > 1 and parameter not in undecayed else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    options = [
        {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]
    if recipe.train.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=phase.lr)
    return torch.optim.SGD(options, lr=phase.lr, momentum=recipe.train.momentum)


def lr_factor(recipe: Recipe, update: int, updates: int, updates_per_epoch: int) -> float:
    """The learning rate at an update, as a multiple of the phase's own."""
    train = recipe.train
    warmup = round(train.warmup * updates)
    if update < warmup:
        return (update + 1) / warmup
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(updates - warmup, 1)))
    if train.schedule == "step":
        return 0.1 ** (update // (train.step_epochs * updates_per_epoch))
    return 1.0


class _Fit:
    """One phase under way."""

    def __init__(self, trainer: Trainer, phase: Phase) -> None:
        self.trainer, self.phase = trainer, phase
        self.recipe, self.model, self.progress = trainer.recipe, trainer.model, trainer.progress
        self.accumulate = self.recipe.train.accumulate
        self.modules = phase.modules(self.model)
        self.parameters = freeze_all_but(self.model, self.modules)
        self._set_training_mode()
        self.trained = [self._distribute(module) for module in self.modules]
        self.optimizer = make_optimizer(self.recipe, phase, self.model)
        self.ema = Ema(self.model, self.modules, self.recipe.train.ema)
        if (saved := trainer.take_checkpoint()) is not None:
            checkpoint.restore_training_state(
                optimizer=self.optimizer, averages=self.ema.values, saved=saved, folder=trainer.run.state
            )
        self.steps = len(trainer.batches("train"))
        size = self.recipe.train.batch * distributed.world()
        self.images = (self.steps - 1) * size + self._images_of(self.steps - 1)
        self.update_images = min(size * self.accumulate, self.images)
        self.updates_per_epoch = math.ceil(self.steps / self.accumulate)
        updates = self.progress.epoch * self.updates_per_epoch + math.ceil(self.progress.step / self.accumulate)
        self.ema.updates = updates
        if updates:  # the log has the last update's rate, also where no step of the epoch is left
            self._set_lr(updates - 1)
        # Finer scales are not trained before `pretrain-cnn` has ended: their figures say nothing.
        self.validated_scales = 1 if phase.stage == "pretrain-cnn" else self.recipe.model.scales

    def run(self) -> None:
        phase, progress, trainer = self.phase, self.progress, self.trainer
        done = progress.epoch * self.steps + progress.step
        trainer.console.begin(phase.title, epochs=phase.epochs, steps=self.steps, done=done)
        try:
            with translate_errors(trainer):
                if phase.keep_best and phase.from_start and progress.best is None:
                    self._keep_if_best(0, self._validate())
                while progress.epoch < phase.epochs and not (phase.patience and progress.stall >= phase.patience):
                    self._epoch()
        except StopRequested:
            self._save()
            raise trainer.interrupted() from None
        finally:
            trainer.console.end()
        self.ema.copy_to_model()
        if phase.keep_best and progress.best is not None:
            distributed.barrier()
            checkpoint.restore_snapshot(trainer.run, "best", self.model)
            trainer.log_choice(progress.best, progress.last or progress.best, phase=phase.name, unit="epoch")
        self.model.eval().requires_grad_(False)
        progress.epoch, progress.step, progress.images, progress.stall = 0, 0, 0, 0
        progress.best, progress.last = None, None

    def _epoch(self) -> None:
        """The rest of an epoch, its validation, its line in the log and its checkpoint."""
        progress, trainer = self.progress, self.trainer
        started = time.perf_counter()
        self._set_training_mode()
        self.optimizer.zero_grad(set_to_none=True)
        trainer.console.begin_epoch(progress.epoch, self.phase.epochs)
        for step, batch in enumerate(trainer.batches("train", skip=progress.step), start=progress.step):
            self._step(step, batch)
        losses = {name: total / self.images for name, total in progress.sums.items()}
        seconds = time.perf_counter() - started
        self._average_buffers()
        val = self._validate()
        progress.epoch, progress.views = progress.epoch + 1, progress.views + 1
        progress.step, progress.images = 0, 0
        progress.sums = {}
        if self.phase.keep_best:
            self._keep_if_best(progress.epoch, val)
        self._log(losses, val, seconds)
        self._save()
        if distributed.any_process([bool(trainer.interrupts.number)], trainer.device)[0]:
            raise trainer.interrupted()

    def _step(self, step: int, batch: dict[str, Tensor]) -> None:
        """Forward and backward of one batch, and an update where it completes one."""
        recipe, progress, trainer = self.recipe, self.progress, self.trainer
        seed_step(recipe.seed, progress.views, step, distributed.rank())
        batch = {name: value.to(trainer.device, non_blocking=True) for name, value in batch.items()}
        batch["key"] = draws.keys(recipe.seed, progress.views, batch["index"])
        # Every image of an epoch weighs the same, also those of a last update that has fewer of them.
        images, of_step = len(batch["label"]), self._images_of(step)
        weight = images * distributed.world() / self.update_images
        completes_update = (step + 1) % self.accumulate == 0 or step + 1 == self.steps
        figures: dict[str, float] = {}
        with self._no_sync(not completes_update):
            for name, loss in self._losses(batch):
                figures[name] = distributed.mean(loss.detach() * images * distributed.world() / of_step)
                if not math.isfinite(figures[name]):
                    raise self._not_finite(f"the loss `{name}` is {figures[name]}", step)
                (loss * weight).backward()
        update = progress.epoch * self.updates_per_epoch + step // self.accumulate
        if completes_update:
            self._update(update, step)
        for name, value in figures.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value * of_step
        if completes_update:
            progress.step, progress.batch = step + 1, recipe.train.batch * distributed.world()
            progress.images = progress.step * progress.batch if progress.step < self.steps else len(trainer.train)
            if progress.step < self.steps:
                self._save_or_stop(update)
        trainer.console.step(figures, images=images)

    def _losses(self, batch: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The phase's losses, each computed under autocast; `backward` of the one before it runs outside of it."""
        device = self.trainer.device.type
        losses = self.phase.losses(self.model, self.trained, batch)
        while True:
            with torch.autocast(device, torch.bfloat16, enabled=self.recipe.train.amp and device == "cuda"):
                pair = next(losses, None)
            if pair is None:
                return
            yield pair

    def _update(self, update: int, step: int) -> None:
        """One update of the weights, unless a gradient is not finite."""
        limit = self.recipe.train.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            raise self._not_finite(f"the gradient's norm is {norm}", step)
        self._set_lr(update)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()

    def _set_lr(self, update: int) -> None:
        phase, per_epoch = self.phase, self.updates_per_epoch
        before = phase.epochs_before if phase.span else 0
        updates = (phase.span or phase.epochs) * per_epoch
        factor = lr_factor(self.recipe, before * per_epoch + update, updates, per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def _images_of(self, step: int) -> int:
        """The number of images of a step, over all processes."""
        world = distributed.world()
        size = self.recipe.train.batch * world
        if step + 1 < self.steps:
            return size
        # Smaller, or larger by images that would have been a batch of their own.
        return max(len(self.trainer.train) - step * size, world)

    def _distribute(self, module: nn.Module) -> nn.Module:
        """The module in DistributedDataParallel, which averages gradients in buckets while `backward` runs."""
        if distributed.world() == 1:
            return module
        device = self.trainer.device
        wrapped = DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
        # Each process keeps its own BatchNorm statistics during an epoch; they are averaged at its end. (The argument
        # for this has different names in different versions of torch.)
        wrapped.broadcast_buffers = False
        return wrapped

    @contextmanager
    def _no_sync(self, enabled: bool) -> Iterator[None]:
        """Within it gradients are accumulated in each process and not averaged."""
        with ExitStack() as stack:
            for module in self.trained:
                if enabled and isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    def _set_training_mode(self) -> None:
        set_training_mode(self.model, self.modules, freeze_batchnorm=self.recipe.train.batchnorm == "frozen")

    def _validate(self) -> Validation:
        with self.ema.applied():
            return self.trainer.validate(self.validated_scales)

    def _keep_if_best(self, epoch: int, val: Validation) -> None:
        answer = val.fused if self.phase.part == "fusion" else val.scales[0]
        assert answer is not None
        self.progress.last = Candidate(number=epoch, val=answer)
        if self.progress.best is None or answer.score > self.progress.best.val.score:
            self.progress.best, self.progress.stall = self.progress.last, 0
            with self.ema.applied():
                if distributed.rank() == 0:
                    checkpoint.save_snapshot(self.trainer.run, "best", self.model, self.progress)
        else:
            self.progress.stall += 1

    def _average_buffers(self) -> None:
        distributed.average_buffers(buffer for module in self.modules for buffer in module.buffers())
        self.ema.average_buffers()

    def _save_or_stop(self, update: int) -> None:
        """Write a checkpoint in the middle of an epoch if one is due, and stop if a signal arrived."""
        trainer, train = self.trainer, self.recipe.train
        due = bool(train.save_steps) and (update + 1) % train.save_steps == 0
        due |= bool(train.save_minutes) and time.monotonic() - trainer.saved_at >= 60 * train.save_minutes
        stop, due = distributed.any_process([bool(trainer.interrupts.number), due], trainer.device)
        if stop or due:
            self._average_buffers()  # one process writes, and its BatchNorm statistics are not the others'
            self._save()
        if stop:
            raise trainer.interrupted()

    def _save(self) -> None:
        self.trainer.save(self.optimizer, self.ema.values)

    def _log(self, losses: dict[str, float], val: Validation, seconds: float) -> None:
        phase, progress = self.phase, self.progress
        event = EpochEvent(
            stage=phase.stage,
            phase=phase.name,
            round=progress.round + 1 if phase.stage == "alternate" else 0,
            epoch=progress.epoch,
            epochs=phase.epochs,
            views=progress.views,
            lr=max(group["lr"] for group in self.optimizer.param_groups),
            train_loss=losses,
            val=val,
            seconds=round(seconds, 3),
            images_per_second=round(len(self.trainer.train) / max(seconds, 1e-9), 2),
        )
        self.trainer.log(event)
        self.trainer.console.epoch(event)

    def _not_finite(self, what: str, step: int) -> RunError:
        checkpoints = checkpoint.list_checkpoints(self.trainer.run)
        last = f"the last checkpoint {checkpoints[0]} is intact" if checkpoints else "no checkpoint was written yet"
        command, phase = self.trainer.resume_command, self.phase
        return RunError(
            f"{phase.title}, epoch {self.progress.epoch + 1}, step {step + 1}: {what}; "
            f"the weights were not updated, {last}",
            f"a lower learning rate: `{command} --set {phase.lr_key}={phase.lr / 10:g}`",
            failure=True,
        )


@contextmanager
def translate_errors(trainer: Trainer) -> Iterator[None]:
    """Turn a failed allocation into an error that names the setting to lower, and the end of another process into one
    that says how to continue."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        text = str(error).lower()
        command, train = trainer.resume_command, trainer.recipe.train
        if SINGLE_VALUE in text:
            raise RunError(
                f"a layer of {trainer.recipe.model.backbone} cannot train on one value per channel: {error}",
                ("" if trainer.recipe.model.weights == "none" else f"`{command} --set train.batchnorm=frozen`, ")
                + "a larger train.batch, or a --backbone without BatchNorm",
                failure=True,
            ) from None
        if distributed.world() > 1 and any(phrase in text for phrase in LOST_PROCESS):
            raise RunError(
                f"another process of this training is gone: {str(error).splitlines()[0]}",
                f"`{command}`, or torchrun with --max-restarts, which continues by itself",
                failure=True,
            ) from None
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"{trainer.device} ran out of memory with train.batch = {train.batch}",
            f"`{command} --set train.batch={max(train.batch // 2, 1)} --set train.accumulate={train.accumulate * 2}`, "
            "which keeps the number of images per update, or smaller model.sizes",
            failure=True,
        ) from None

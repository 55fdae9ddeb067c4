"""The one training loop: every stage and phase runs through `fit`."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from racnn_cli import evaluation
from racnn_cli.core import distributed, draws
from racnn_cli.core.model import RACNN
from racnn_cli.data.images import ImageDataset, batches
from racnn_cli.errors import Interrupted, RacnnError, is_out_of_memory
from racnn_cli.events import EpochEvent, Validation
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run
from racnn_cli.training import checkpoint, stages
from racnn_cli.training.checkpoint import Progress, Saved
from racnn_cli.training.console import Console
from racnn_cli.training.stages import Stage


class Stopped(Exception):
    """A signal came while nothing was learned: there is nothing to finish first."""


class Signals:
    """Remembers SIGINT and SIGTERM, so that training can stop between two steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A scheduler may signal a launcher and its processes, and the launcher them again.
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number

    @contextmanager
    def caught(self) -> Iterator[None]:
        try:
            before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Context:
    """What all stages of a run share."""

    run: Run
    recipe: Recipe
    model: RACNN
    train: ImageDataset
    val: ImageDataset
    device: torch.device
    console: Console
    progress: Progress
    guide: stages.Guide | None  # boxes instead of the APNs'
    teacher: stages.Teacher | None  # what the APNs learn instead of the peak and the rank loss
    signals: Signals
    saved: float  # when the last checkpoint was written, on a clock that never jumps
    resume: Path  # the folder that `--resume --run` names: for a baseline, that of the run it belongs to

    @property
    def again(self) -> str:
        """The command that continues the run."""
        words = f"train --resume --run {self.resume}"
        # Without the two dashes, torchrun on Python 3.11 would take --run for an abbreviation of its own --run-path.
        return f"racnn {words}" if distributed.world() == 1 else f"torchrun ... -m racnn_cli -- {words}"

    def interrupted(self) -> Interrupted:
        """What to raise once everything is saved after a signal (another process' own, if none came here)."""
        return Interrupted(self.again, self.signals.number or signal.SIGTERM)


LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "nccl error",
    "timed out waiting",
)
"""What gloo and NCCL say when the process at the other end has died."""


@contextmanager
def translate_errors(context: Context) -> Iterator[None]:
    """Turn a failed allocation, on a device or on the CPU, into a error that says which setting to lower; and a
    process that has died into one that says how to go on."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if distributed.world() > 1 and any(said in text for said in LOST):
            raise RacnnError(
                f"another process of this training is gone: {str(error).splitlines()[0]}",
                f"`{context.again}`, or torchrun with --max-restarts, which goes on by itself",
                failure=True,
            ) from None
        if not is_out_of_memory(error):
            raise
        train = context.recipe.train
        raise RacnnError(
            f"{context.device} ran out of memory with train.batch = {train.batch}",
            f"`{context.again} --set train.batch={max(train.batch // 2, 1)} "
            f"--set train.accumulate={train.accumulate * 2}`, which keeps the images an update, or smaller model.sizes",
            failure=True,
        ) from None


def freeze_all_but(
    model: RACNN, moving: list[nn.Module], freeze_batchnorm: bool = False
) -> list[nn.Parameter]:
    """Let only `moving` learn: everything else is in eval mode (buffers stay) and has no gradient.

    Args:
        model: the network.
        moving: the modules that learn.
        freeze_batchnorm: their BatchNorm layers keep their running statistics, and use them.

    Returns:
        the parameters that move.
    """
    model.eval().requires_grad_(False)
    for module in moving:
        module.train().requires_grad_(True)
        if freeze_batchnorm:
            for layer in module.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizer(recipe: Recipe, stage: Stage, model: RACNN) -> torch.optim.Optimizer:
    """AdamW or SGD over what moves; biases and norms (one dimension) are not decayed."""
    heads = stage.heads(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        lr = stage.lr * (stage.head_lr if parameter in heads else 1.0)
        decay = recipe.train.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    lists: list[dict[str, Any]] = [
        {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay}
        for (lr, decay), members in groups.items()
    ]
    if recipe.train.optimizer == "adamw":
        return torch.optim.AdamW(lists, lr=stage.lr)
    return torch.optim.SGD(lists, lr=stage.lr, momentum=recipe.train.momentum)


def rate_at(recipe: Recipe, update: int, updates: int, updates_per_epoch: int) -> float:
    """The learning rate at an update, as a multiple of the stage's own."""
    train = recipe.train
    warmup = round(train.warmup * updates)
    if update < warmup:
        return (update + 1) / warmup
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(updates - warmup, 1)))
    if train.schedule == "step":
        return 0.1 ** (update // (train.step_epochs * updates_per_epoch))
    return 1.0


class Averaged:
    """Exponential moving average of what moves (parameters and buffers); takes the network's place at the end."""

    def __init__(self, model: RACNN, moving: list[nn.Module], decay: float) -> None:
        mine = {id(t) for module in moving for t in (*module.parameters(), *module.buffers())}
        self.live = {
            name: t for name, t in model.state_dict(keep_vars=True).items() if id(t) in mine and decay > 0
        }
        self.decay = decay
        self.values = {name: t.detach().clone() for name, t in self.live.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        # A short run must not be an average over its start: the decay grows with the number of updates.
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in self.values.items():
            if value.is_floating_point():
                value.lerp_(self.live[name].detach().to(value.dtype), 1 - decay)
            else:
                value.copy_(self.live[name])

    def share(self) -> None:
        """Give every process the mean of the processes' averaged statistics; averaged weights are alike anyway."""
        distributed.average_buffers(
            value for name, value in self.values.items() if not isinstance(self.live[name], nn.Parameter)
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged values and the network's."""
        for name, value in self.values.items():
            kept = self.live[name].detach().clone()
            self.live[name].copy_(value)
            value.copy_(kept)


def seed_step(seed: int, *position: int) -> None:
    """Seed dropout, jitter and the like as a pure function of (seed, position), for exact resume."""
    mixed = seed
    for part in position:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63 - 1)
    torch.manual_seed(mixed)


def fit(context: Context, stage: Stage, resumed: Saved | None = None) -> None:
    """Run one stage from where `context.progress` stands to its end.

    Raises:
        RacnnError: a loss or a gradient is not finite (nothing was updated with it).
        Interrupted: a signal came; the state is saved.
    """
    recipe, model, progress, device = context.recipe, context.model, context.progress, context.device
    moving = stage.moving(model)
    parameters = freeze_all_but(model, moving, recipe.train.batchnorm == "frozen")
    optimizer = make_optimizer(recipe, stage, model)
    averaged = Averaged(model, moving, recipe.train.ema)
    if resumed is not None:
        checkpoint.restore_moving(optimizer, averaged.values, resumed, context.run.state)
    accumulate = recipe.train.accumulate
    steps = len(loader(context, context.train, shuffle=True))
    updates_per_epoch = math.ceil(steps / accumulate)
    averaged.updates = progress.epoch * updates_per_epoch + math.ceil(progress.step / accumulate)
    if averaged.updates:  # the log names the last one's, also where no step of the epoch is left
        _set_rate(recipe, stage, optimizer, averaged.updates - 1, updates_per_epoch)
    watched = len(stage.scales) if stage.name == "pretrain-cnn" else recipe.model.scales

    def check() -> Validation:
        averaged.swap()
        try:
            return measure(context, watched)
        finally:
            averaged.swap()

    def save(optimizer: torch.optim.Optimizer | None) -> None:
        if distributed.rank() == 0:
            keep = recipe.train.keep
            checkpoint.save(context.run, model, progress, optimizer, averaged.values, keep=keep)
        context.saved = time.monotonic()

    def share() -> None:
        distributed.average_buffers(buffer for module in moving for buffer in module.buffers())
        averaged.share()

    def save_midway(optimizer: torch.optim.Optimizer) -> None:
        share()  # of several processes one writes, and its BatchNorm statistics are not the others'
        save(optimizer)

    def keep_if_best(val: Validation) -> None:
        loss = val.fused.nll if stage.part == "fusion" else val.scales[0].nll
        if progress.best is None or loss < progress.best:
            progress.best, progress.stall = loss, 0
            averaged.swap()
            if distributed.rank() == 0:
                checkpoint.save_snapshot(context.run, "best", model, progress)
            averaged.swap()
        else:
            progress.stall += 1

    context.console.begin(stage.name, stage.epochs, steps, progress.epoch * steps + progress.step)
    try:
        with translate_errors(context):
            if stage.keep_best and stage.from_start and progress.best is None:
                keep_if_best(check())
            while progress.epoch < stage.epochs and not (stage.patience and progress.stall >= stage.patience):
                started = time.perf_counter()
                freeze_all_but(model, moving, recipe.train.batchnorm == "frozen")
                losses = _epoch(context, stage, optimizer, parameters, averaged, steps, save_midway)
                seconds = time.perf_counter() - started
                share()
                val = check()
                progress.epoch, progress.step, progress.views = progress.epoch + 1, 0, progress.views + 1
                progress.sums = {}
                if stage.keep_best:
                    keep_if_best(val)
                _log(context, stage, losses, val, seconds, optimizer)
                save(optimizer)
                if distributed.any_process([bool(context.signals.number)], device)[0]:
                    raise context.interrupted()
    except Stopped:
        save(optimizer)
        raise context.interrupted() from None
    finally:
        context.console.end()
    averaged.swap()
    if stage.keep_best and progress.best is not None:
        distributed.barrier()
        checkpoint.restore(context.run, "best", model)
    model.eval().requires_grad_(False)
    progress.epoch, progress.step, progress.stall, progress.best = 0, 0, 0, None


def _epoch(
    context: Context,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    averaged: Averaged,
    steps: int,
    save: Callable[[torch.optim.Optimizer], None],
) -> dict[str, float]:
    """The rest of one epoch; returns the mean of every loss over its steps."""
    recipe, progress, device = context.recipe, context.progress, context.device
    accumulate = recipe.train.accumulate
    updates_per_epoch = math.ceil(steps / accumulate)
    sums = progress.sums
    first, began, images_seen = progress.step, time.perf_counter(), 0
    optimizer.zero_grad(set_to_none=True)
    for step, batch in enumerate(loader(context, context.train, shuffle=True, skip=first), start=first):
        seed_step(recipe.seed, progress.views, step, distributed.rank())
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        batch["key"] = draws.keys(recipe.seed, progress.views, batch["index"])
        share = _share(context, step, len(batch["label"]))
        # The batches of the last, shorter, update share its gradient evenly too.
        group = min(accumulate, steps - step // accumulate * accumulate)
        figures: dict[str, float] = {}
        losses = stage.losses(context.model, batch)
        while True:
            with torch.autocast(
                device.type, torch.bfloat16, enabled=recipe.train.amp and device.type == "cuda"
            ):
                name, loss = next(losses, ("", None))
            if loss is None:
                break
            loss = loss * share
            figures[name] = distributed.mean(loss.detach())
            if not math.isfinite(figures[name]):
                raise _not_finite(context, stage, f"the loss `{name}` is {figures[name]}", step)
            (loss / group).backward()
        if moved := (step + 1) % accumulate == 0 or step + 1 == steps:
            update = progress.epoch * updates_per_epoch + step // accumulate
            _update(context, stage, optimizer, parameters, update, updates_per_epoch, step)
            averaged.update()
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value
        if moved:
            progress.step, progress.batch = step + 1, recipe.train.batch * distributed.world()
            if progress.step < steps:
                stop, due = distributed.any_process(
                    [bool(context.signals.number), _due(context, update)], device
                )
                if stop or due:
                    save(optimizer)
                if stop:
                    raise context.interrupted()
        images_seen += len(batch["label"])
        context.console.step(
            progress.epoch, stage.epochs, figures, images_seen / (time.perf_counter() - began)
        )
    return {name: value / max(steps, 1) for name, value in sums.items()}


def _share(context: Context, step: int, images: int) -> float:
    """What a mean over this process' images counts in the mean over the processes: an epoch's last batch need not
    come out even, and every image of it weighs the same."""
    whole = context.recipe.train.batch * distributed.world()
    left = max(len(context.train) - step * whole, distributed.world())
    return images * distributed.world() / min(whole, left)


def _due(context: Context, update: int) -> bool:
    """Whether the recipe asks for a checkpoint after this update of a stage, counted from 0."""
    train = context.recipe.train
    if train.save_steps and (update + 1) % train.save_steps == 0:
        return True
    return bool(train.save_minutes) and time.monotonic() - context.saved >= 60 * train.save_minutes


def _update(
    context: Context,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    update: int,
    updates_per_epoch: int,
    step: int,
) -> None:
    """One move of the weights, unless a gradient is not finite."""
    recipe = context.recipe
    limit = recipe.train.clip or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    if not math.isfinite(norm):
        raise _not_finite(context, stage, f"the gradient's norm is {norm}", step)
    _set_rate(recipe, stage, optimizer, update, updates_per_epoch)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _set_rate(
    recipe: Recipe, stage: Stage, optimizer: torch.optim.Optimizer, update: int, updates_per_epoch: int
) -> None:
    """Give the optimizer the learning rates of an update."""
    rate = rate_at(recipe, update, stage.epochs * updates_per_epoch, updates_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * rate


def _not_finite(context: Context, stage: Stage, what: str, step: int) -> RacnnError:
    saved = checkpoint.saved(context.run)
    kept = f"the last checkpoint {saved[0]} is intact" if saved else "no checkpoint was written yet"
    return RacnnError(
        f"{stage.name}, epoch {context.progress.epoch + 1}, step {step + 1}: {what}; "
        f"the weights were not updated, {kept}",
        f"a lower learning rate: `{context.again} --set {stage.lr_key}={stage.lr / 10:g}`",
        failure=True,
    )


def measure(context: Context, scales: int) -> Validation:
    """The validation figures of the first `scales` scales as the network stands.

    Raises:
        Stopped: a signal came meanwhile.
    """
    plain = polled(context, loader(context, context.val, shuffle=False))
    margin = context.recipe.alternate.margin
    return evaluation.measure(
        context.model, plain, context.device, scales=scales, margin=margin, proposals=context.guide
    ).validation()


def polled(context: Context, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, unless a signal comes; of several processes, all go on to the end."""
    for batch in batches:
        if context.signals.number and distributed.world() == 1:
            raise Stopped
        yield batch


def loader(context: Context, images: ImageDataset, *, shuffle: bool, skip: int = 0) -> Any:
    """One epoch of images for this process: in a new order with `shuffle`, else as they are listed."""
    recipe = context.recipe
    return batches(
        images,
        batch=recipe.train.batch,
        epoch=context.progress.views if shuffle else 0,
        seed=recipe.seed,
        shuffle=shuffle,
        workers=recipe.data.workers,
        skip=skip,
        rank=distributed.rank(),
        world=distributed.world(),
        device_pin=context.device.type == "cuda",
    )


def _log(
    context: Context,
    stage: Stage,
    losses: dict[str, float],
    val: Validation,
    seconds: float,
    optimizer: torch.optim.Optimizer,
) -> None:
    """One line of log.jsonl, and the same for a person. The seconds are those of training, without validation."""
    progress = context.progress
    event = EpochEvent(
        stage=stage.name.partition(":")[0],
        phase=stage.name.partition(": ")[2],
        round=progress.round + 1 if progress.stage == "alternate" else 0,
        epoch=progress.epoch,
        epochs=stage.epochs,
        views=progress.views,
        lr=max(group["lr"] for group in optimizer.param_groups),
        train_loss=losses,
        val=val,
        seconds=round(seconds, 3),
        images_per_second=round(len(context.train) / max(seconds, 1e-9), 2),
    )
    if distributed.rank() == 0:
        context.run.append_log(event)
    context.console.epoch(event)

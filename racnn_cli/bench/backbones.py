"""`racnn bench backbones`: one training step of every stage and an ONNX export, for many backbones.

A step uses the losses of the stages, and the freezing and the optimizer of the training loop, on noise and random
weights with three scales. Afterwards, frozen tensors must be bit-identical, and every trained weight must have a
finite gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from racnn_cli.bench import BenchResult, Options
from racnn_cli.bench.summary import Entry, add_models, measure_models, new_table
from racnn_cli.core import store
from racnn_cli.core.model import RACNN, build, resolve
from racnn_cli.errors import RunError
from racnn_cli.export.onnx import export_onnx
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run
from racnn_cli.training import phases
from racnn_cli.training.loop import freeze_all_but, make_optimizer, set_training_mode
from racnn_cli.training.phases import Batch, Classifier, Phase
from racnn_cli.training.trainer import seed_step

SMALL = (96, 96, 96)
OWN: tuple[int, ...] = ()
MODELS: dict[str, tuple[int, ...]] = {
    "resnet18": SMALL,
    "regnetx_002": SMALL,
    "densenet121": SMALL,
    "mobilenetv3_small_050": SMALL,
    "tf_efficientnet_lite0": SMALL,
    "ghostnet_100": SMALL,
    "convnext_atto": SMALL,
    "mambaout_femto": SMALL,
    "swin_tiny_patch4_window7_224": OWN,
    "vit_tiny_patch16_224": OWN,
    "vgg11": OWN,
    "vgg19": OWN,
}
"""Backbone to sizes: ten families of timm, and VGG; an empty tuple stands for the model's own size."""

PHASES: dict[str, Callable[[Recipe], Phase]] = {
    "pretrain-cnn": phases.pretrain_cnn,
    "pretrain-apn": phases.pretrain_apn,
    "CNN phase": phases.cnn_phase,
    "APN phase": phases.apn_phase,
    "fusion": phases.fusion,
}
SHAPE_COLUMNS = ("sizes", "features", "width", "million\nweights")
CLASSES = ["a", "b", "c", "d"]
BATCH = 2


def run(options: Options) -> BenchResult:
    """Measure every backbone of `MODELS`."""
    return measure(MODELS)


def measure(models: Mapping[str, tuple[int, ...]]) -> BenchResult:
    """Train one step of every stage and export, per backbone.

    Args:
        models: name to a size for each of three scales; empty: the model's own.

    Returns:
        per backbone `model`, `sizes`, `features` (C, h, w of scale 1), `width`, `parameters`, `milliseconds` (stage to
        time of its step), `onnx_difference`, `onnx_bytes`, and `error`.
    """
    return summarize(measure_models(models, _measure_model))


def _measure_model(entry: Entry, sizes: Sequence[int], folder: Path) -> None:
    entry |= {"milliseconds": {}, "onnx_difference": None}
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            # Without images, the export is checked on noise.
            "data": {"path": str(folder / "none")},
            "model": {"backbone": entry["model"], "weights": "none", "scales": 3, "sizes": list(sizes)},
            "train": {"batch": BATCH, "device": "cpu"},
        }
    )
    seed_step(0)
    recipe = resolve(recipe)
    model = build(recipe.model, len(CLASSES))
    backbone = model.scale(0).backbone
    entry |= {
        "sizes": list(model.sizes),
        "features": [backbone.channels, *backbone.map_size],
        "width": backbone.width,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    images = torch.randint(256, (BATCH, 3, model.source, model.source), dtype=torch.uint8)
    batch = {"image": images, "label": torch.arange(BATCH) % len(CLASSES)}
    for name, make_phase in PHASES.items():
        seconds = train_step(recipe, make_phase(recipe), model=model, batch=batch)
        entry["milliseconds"][name] = 1000 * seconds
    run = Run.create(recipe, CLASSES, folder / "run", latest=False)
    store.save_weights(run.weights, model)
    report = export_onnx(run)
    entry["onnx_difference"] = max(report["max_difference"].values())
    entry["onnx_bytes"] = report["bytes"]


def train_step(recipe: Recipe, phase: Phase, *, model: RACNN, batch: Batch) -> float:
    """Make one update of one phase and return its seconds.

    Raises:
        RunError: a loss or a gradient is not finite, a frozen tensor changed, or a trained module did not.
    """
    modules = phase.modules(model)
    parameters = freeze_all_but(model, modules)
    set_training_mode(model, modules, freeze_batchnorm=False)
    optimizer = make_optimizer(recipe, phase, model)
    before = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
    start = time.perf_counter()
    for name, loss in phase.losses(model, modules, batch):
        if not math.isfinite(loss.item()):
            raise _error(phase, f"the loss `{name}` is {loss.item()}")
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.train.clip)
    optimizer.step()
    seconds = time.perf_counter() - start
    if not norm.isfinite():
        raise _error(phase, f"the norm of the gradient is {norm.item()}")
    after = _tensors(model)
    changed = {name: tensor for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    trained = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    leaked = [name for name, tensor in changed.items() if id(tensor) not in trained]
    if leaked:
        raise _error(phase, f"{len(leaked)} frozen tensors changed, such as {leaked[0]}")
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if unreached:
        raise _error(phase, f"{len(unreached)} weights got no gradient, such as {unreached[0]}")
    changed_ids = {id(tensor) for tensor in changed.values()}
    # Per module, not per weight: a residual branch whose last scale starts at 0 passes no gradient at first.
    parts = [part for m in modules for part in (m.children() if isinstance(m, Classifier) else [m])]
    for part in parts:
        own = {id(parameter) for parameter in part.parameters()}
        if own and not own & changed_ids:
            raise _error(phase, f"{type(part).__name__} did not change")
    return seconds


def _tensors(model: RACNN) -> dict[str, Tensor]:
    """Name every parameter and buffer, including those that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _error(phase: Phase, problem: str) -> RunError:
    return RunError(f"{phase.title}: {problem}", failure=True)


def summarize(entries: Sequence[Entry]) -> BenchResult:
    """Summarize the results of `measure`."""

    def cells(entry: Entry) -> list[str]:
        shape = [""] * len(SHAPE_COLUMNS)
        if "sizes" in entry:
            shape = [
                "/".join(map(str, entry["sizes"])),
                "×".join(map(str, entry["features"])),
                str(entry["width"]),
                f"{entry['parameters'] / 1e6:.1f}",
            ]
        times, difference = entry["milliseconds"], entry["onnx_difference"]
        return [
            *shape,
            *(f"{times[phase]:.0f}" if phase in times else "" for phase in PHASES),
            "" if difference is None else f"{difference:.0e}",
        ]

    table = new_table(
        f"One training step of every stage, batch {BATCH}, and export",
        text=["backbone"],
        numbers=[*SHAPE_COLUMNS, *(f"{name}\nms" for name in PHASES), "ONNX\ndiffers by"],
        notes=[
            "three scales together, with their APNs; random weights, one step each",
            "ok: losses and gradients are finite, frozen weights and buffers are bit-identical, the others changed,",
            "and ONNX Runtime agrees at two batch sizes",
        ],
    )
    add_models(table, entries, cells)
    return BenchResult([table], {"batch": BATCH, "models": list(entries)})

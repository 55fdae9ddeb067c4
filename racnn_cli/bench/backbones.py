"""`racnn bench backbones`: does every stage train one step, and does the network export, for many backbones?

A step goes through the stages' own losses and the loop's own freezing and optimizer, on noise, from random
weights, three scales, batch 2. After it, what is frozen must be what it was, bit for bit, and what moves
must have had a finite gradient in every weight.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from racnn_cli.bench import Figures, Options
from racnn_cli.core import store
from racnn_cli.core.model import RACNN, build, resolve
from racnn_cli.errors import RacnnError
from racnn_cli.export.onnx import export_onnx
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run
from racnn_cli.training import stages
from racnn_cli.training.loop import freeze_all_but, make_optimizer, seed_step
from racnn_cli.training.stages import Batch, Stage

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
"""Backbone to sizes: ten families of timm; the models that take only their own size, and VGG, have that."""

STAGES: dict[str, Callable[[Recipe], Stage]] = {
    "pretrain-cnn": stages.pretrain_cnn,
    "pretrain-apn": stages.pretrain_apn,
    "CNN phase": stages.cnn_phase,
    "APN phase": stages.apn_phase,
    "fusion": stages.fusion,
}
CLASSES = ["a", "b", "c", "d"]
BATCH = 2


def run(options: Options) -> Figures:
    """One line a backbone of `MODELS`."""
    return measure(MODELS)


def measure(models: dict[str, tuple[int, ...]]) -> Figures:
    """One line a backbone; a error of one does not keep the others from being measured.

    Args:
        models: name to a size for each of three scales; empty: the model's own.
    """
    return summary([told(name, partial(one, name, sizes)) for name, sizes in models.items()])


def told(name: str, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measured` returns of a backbone; how it went is said as soon as it is known."""
    start = time.perf_counter()
    entry = measured()
    Console(stderr=True, highlight=False).print(
        escape(f"{name}: {entry['error'] or 'ok'}, {time.perf_counter() - start:.0f} s")
    )
    return entry


def one(name: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Every stage and the export of one backbone.

    Returns:
        `model`, `sizes`, `features` (C, h, w of scale 1), `width`, `parameters`, `milliseconds` (stage to
        time of its step), `onnx_difference`, `onnx_bytes`, and `error`: empty, or what went wrong.
    """
    entry: dict[str, Any] = {"model": name, "milliseconds": {}, "onnx_difference": None, "error": ""}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.model_validate(
            {
                "name": "bench",
                # No images: the export is then checked on noise.
                "data": {"path": str(Path(folder) / "none")},
                "model": {"backbone": name, "weights": "none", "scales": 3, "sizes": list(sizes)},
                "train": {"batch": BATCH, "device": "cpu"},
            }
        )
        try:
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
            for stage_name, make in STAGES.items():
                entry["milliseconds"][stage_name] = 1000 * step(recipe, make(recipe), model, batch)
            target = Run.create(recipe, CLASSES, Path(folder) / "run", latest=False)
            store.save_weights(target.weights, model)
            report = export_onnx(target)
            entry["onnx_difference"] = max(report["max_difference"].values())
            entry["onnx_bytes"] = report["bytes"]
        except RacnnError as error:
            entry["error"] = error.message
    return entry


def step(recipe: Recipe, stage: Stage, model: RACNN, batch: Batch) -> float:
    """One update of one stage; returns its seconds.

    Raises:
        RacnnError: a loss or a gradient is not finite, a frozen tensor moved, what should move did not.
    """
    moving = stage.moving(model)
    parameters = freeze_all_but(model, moving)
    optimizer = make_optimizer(recipe, stage, model)
    before = {name: tensor.detach().clone() for name, tensor in tensors(model).items()}
    start = time.perf_counter()
    for name, loss in stage.losses(model, batch):
        if not math.isfinite(loss.item()):
            raise _error(stage, f"the loss `{name}` is {loss.item()}")
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.train.clip)
    optimizer.step()
    seconds = time.perf_counter() - start
    if not norm.isfinite():
        raise _error(stage, f"the gradient's norm is {norm.item()}")
    mine = {id(tensor) for module in moving for tensor in (*module.parameters(), *module.buffers())}
    after = tensors(model)
    leaked = [
        name
        for name, tensor in after.items()
        if id(tensor) not in mine and not torch.equal(tensor, before[name])
    ]
    if leaked:
        raise _error(stage, f"{len(leaked)} frozen tensors moved, such as {leaked[0]}")
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if unreached:
        raise _error(stage, f"{len(unreached)} weights got no gradient, such as {unreached[0]}")
    # Not weight by weight: a residual branch whose last scale starts at 0 passes no gradient at first.
    names = {id(tensor): name for name, tensor in after.items()}
    for module in moving:
        own = [(p, before[names[id(p)]]) for p in module.parameters()]
        if own and all(torch.equal(new, old) for new, old in own):
            raise _error(stage, f"{type(module).__name__} stood still")
    return seconds


def tensors(model: RACNN) -> dict[str, Tensor]:
    """Every parameter and every buffer by its name, also those that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _error(stage: Stage, what: str) -> RacnnError:
    return RacnnError(f"{stage.name}: {what}", failure=True)


def summary(found: Sequence[dict[str, Any]]) -> Figures:
    """What `one` found of each backbone, as a table."""
    table = Table(title=f"One training step of every stage, batch {BATCH}, and export", title_justify="left")
    table.add_column("backbone", no_wrap=True)
    for column in ("sizes", "features", "width", "million\nweights", *(f"{name}\nms" for name in STAGES)):
        table.add_column(column, justify="right")
    table.add_column("ONNX\ndiffers by", justify="right")
    table.add_column("")
    for entry in found:
        shape = ["", "", "", ""]
        if "sizes" in entry:
            channels, *map_size = entry["features"]
            shape = [
                "/".join(map(str, entry["sizes"])),
                f"{channels}×{'×'.join(map(str, map_size))}",
                str(entry["width"]),
                f"{entry['parameters'] / 1e6:.1f}",
            ]
        times, gap = entry["milliseconds"], entry["onnx_difference"]
        table.add_row(
            entry["model"],
            *shape,
            *(f"{times[stage]:.0f}" if stage in times else "" for stage in STAGES),
            "" if gap is None else f"{gap:.0e}",
            "FAILED" if entry["error"] else "ok",
        )
    notes = [
        "three scales together, with their APNs; random weights, one step each",
        "ok: losses and gradients finite, frozen weights and buffers bit-identical, the others moved,",
        "ONNX Runtime agrees at two batch sizes",
        *(escape(f"{entry['model']}: {entry['error']}") for entry in found if entry["error"]),
    ]
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return Figures([table], {"batch": BATCH, "models": list(found)})

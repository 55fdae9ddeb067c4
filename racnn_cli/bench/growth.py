"""`racnn bench growth`: how long a recipe takes on iNaturalist-2021 with one GPU, eight, and many nodes, and what it
waits for.

Measured here: what each phase computes for an image (multiply-adds of the forward passes are counted; where CNNs
move, a backward pass is taken as two of them), how fast one core reads images, how large the messages and the
checkpoints are, how fast a checkpoint gets on the disk. On a machine with CUDA the phases are timed as well; without,
a GPU is taken to sustain `SUSTAINED`. What connects GPUs is from data sheets. The rest is arithmetic.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from racnn_cli import recipe as recipes
from racnn_cli.bench import Figures, Options
from racnn_cli.bench.compute import multiply_adds
from racnn_cli.core import draws, store
from racnn_cli.core.device import select_device
from racnn_cli.core.model import RACNN, build, resolve
from racnn_cli.data.decode import check
from racnn_cli.data.images import ImageDataset, batches
from racnn_cli.data.index import Item, build_index
from racnn_cli.recipe import Data, Recipe
from racnn_cli.training import stages
from racnn_cli.training.loop import freeze_all_but
from racnn_cli.training.stages import Stage

# iNaturalist-2021 (Van Horn et al. 2021): photographs of at most 500 px, 224 GB of them for training.
CLASSES, TRAIN, VAL = 10_000, 2_686_843, 100_000
WIDTH, HEIGHT, BYTES = 500, 375, 83_000

SUSTAINED = {"slow": 50e12, "fast": 400e12}
"""Operations a second: a twentieth and two fifths of the 989e12 that an H100 is sold with (bfloat16, dense)."""
CORES = 16  # that read for a GPU
LINK, NETWORK = 450e9, 50e9  # bytes a second and direction: NVLink 4; 400 Gbit/s a GPU
CHECKERS = 4  # threads that look at the files before training, a process
LAYOUTS = {"1 GPU": (1, 1), "8 GPUs": (1, 8), "8 nodes of 8": (8, 8), "32 nodes of 8": (32, 8)}
STEPS = 3


@dataclass(frozen=True)
class Phase:
    """What one image costs in a phase. Attributes: its name; epochs of it in the whole run; operations (two a
    multiply-add), forward and backward; seconds measured here; bytes of gradients that an update sends."""

    name: str
    epochs: int
    operations: int
    seconds: float
    message: int


@dataclass(frozen=True)
class Measured:
    """Attributes: of each phase; images of an update of one process; images a second that one core reads and
    varies, and looks through; bytes of memory that a listed image takes; bytes of a checkpoint, and how many of
    them get on the disk a second; operations of a validation image."""

    phases: tuple[Phase, ...]
    images: int
    read: float
    checked: float
    listed: float
    checkpoint: int
    disk: float
    forward: int


def run(options: Options) -> Figures:
    """Measure, then estimate."""
    recipe = resolve(recipes.load(options.recipe))
    found, device = measure(recipe), select_device()
    speeds: dict[str, float] = {"measured": 0.0} if device.type == "cuda" else SUSTAINED
    rows = [
        {"layout": name, "speed": speed} | estimate(found, nodes, gpus, operations)
        for name, (nodes, gpus) in LAYOUTS.items()
        for speed, operations in speeds.items()
    ]
    tables = [_phases(recipe, found, device.type), _layouts(rows)]
    return Figures(tables, {"recipe": recipe.name, "measured": asdict(found), "layouts": rows})


def measure(recipe: Recipe) -> Measured:
    """The figures of this machine, for a recipe with its sizes resolved."""
    device = select_device(recipe.train.device)
    model = build(recipe.model, CLASSES, source=recipe.data.source, weights="none")
    forward = 2 * multiply_adds(model)
    model.to(device)
    if recipe.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    section = recipe.alternate
    plan: list[tuple[Stage, int]] = [(stages.pretrain_cnn(recipe), recipe.pretrain_cnn.epochs)]
    if recipe.model.scales > 1:
        plan += [
            (stages.pretrain_apn(recipe), recipe.pretrain_apn.epochs),
            (stages.cnn_phase(recipe), section.cnn_epochs_in(section.rounds)),
            (stages.apn_phase(recipe), section.rounds * section.apn_epochs),
            (stages.fusion(recipe), recipe.fusion.epochs),
        ]
    phases = tuple(_phase(model, recipe, stage, epochs, device) for stage, epochs in plan)
    moving = max(phase.message for phase in phases)
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place)
        items = _photographs(folder, recipe.train.batch)
        images = ImageDataset(items, recipe.data, model.source, seed=0, augment=True)
        read = _rate(lambda: _seconds_of_reading(images, recipe.train.batch))
        checked = _rate(lambda: _seconds_of_checking(items))
        listed = _memory_of_listing(recipe.data, folder / "list")
        tensors = {
            **model.state_dict(),
            "moments": torch.zeros(moving // 2),
        }  # AdamW keeps two of each weight
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        began = time.perf_counter()
        store.save_tensors(folder / "checkpoint.safetensors", tensors, {})
        disk = size / (time.perf_counter() - began)
    return Measured(
        phases, recipe.train.batch * recipe.train.accumulate, read, checked, listed, size, disk, forward
    )


def estimate(found: Measured, nodes: int, gpus: int, operations: float) -> dict[str, Any]:
    """Hours of a run on so many nodes with so many GPUs each, and of what they are made.

    Args:
        found: what was measured.
        nodes, gpus: see above.
        operations: that a GPU sustains a second; 0: as fast as this device was.
    """
    count = nodes * gpus
    speed = operations or found.phases[0].operations / found.phases[0].seconds
    wire = NETWORK if nodes > 1 else LINK
    spent = dict.fromkeys(("computing", "reading", "messages", "checkpoints", "validation"), 0.0)
    rates = {}
    for phase in found.phases:
        own = phase.operations / operations if operations else phase.seconds  # of one image
        read = 1 / (CORES * found.read)
        send = 2 * (count - 1) / count * phase.message / wire / found.images
        rates[phase.name] = count / (max(own, read) + send)
        share = phase.epochs * TRAIN / count
        spent["reading" if read > own else "computing"] += share * max(own, read)
        spent["messages"] += share * send
        spent["checkpoints"] += phase.epochs * found.checkpoint / found.disk
        spent["validation"] += phase.epochs * VAL / count * max(found.forward / speed, read)
    spent["first look at the files"] = (TRAIN + VAL) / (count * CHECKERS * found.checked)
    # One process does it, and looks at the files again first.
    spent["evaluation"] = VAL * (
        max(found.forward / speed, 1 / (CORES * found.read)) + 1 / (CHECKERS * found.checked)
    )
    whole, slowest = sum(spent.values()), max(spent, key=lambda name: spent[name])
    rate = rates.get("alternate: CNN phase", next(iter(rates.values())))
    return {
        "images_per_second": rate,
        "storage": rate * BYTES,
        "hours": whole / 3600,
        "parts": {name: seconds / 3600 for name, seconds in spent.items()},
        "bottleneck": slowest,
        "share": spent[slowest] / whole,
    }


def _phase(model: RACNN, recipe: Recipe, stage: Stage, epochs: int, device: torch.device) -> Phase:
    parameters = freeze_all_but(model, stage.moving(model), recipe.train.batchnorm == "frozen")
    generator, count = torch.Generator().manual_seed(0), recipe.train.batch
    index = torch.arange(count)
    batch = {
        "image": torch.randint(
            256, (count, 3, model.source, model.source), dtype=torch.uint8, generator=generator
        ),
        "label": index % CLASSES,
        "key": draws.keys(0, 0, index),
    }
    batch = {name: value.to(device) for name, value in batch.items()}

    def step(learn: bool = True) -> None:
        losses = stage.losses(model, batch)
        while True:
            with torch.autocast(
                device.type, torch.bfloat16, enabled=recipe.train.amp and device.type == "cuda"
            ):
                _, loss = next(losses, ("", None))
            if loss is None:
                return
            if learn:
                loss.backward()

    # torch counts the backward pass of a convolution in groups as if it had none.
    with FlopCounterMode(display=False) as counter:
        step(learn=False)
    operations = counter.get_total_flops() * (3 if stage.part == "cnn" else 1) // count
    step()
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / count)
    model.zero_grad(set_to_none=True)
    message = 4 * sum(parameter.numel() for parameter in parameters)
    return Phase(stage.name, epochs, operations, statistics.median(seconds), message)


def _photographs(folder: Path, batch: int) -> list[Item]:
    """JPEG files of the size of iNaturalist's, in pixels and roughly in bytes."""
    generator, items = np.random.default_rng(0), []
    for number in range(6 * batch):
        pixels = np.zeros((HEIGHT, WIDTH, 3))
        for grain in (4, 16, 64, 375):  # detail of all sizes, as photographs have
            noise = generator.integers(0, 256, (grain, grain * WIDTH // HEIGHT, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        path = folder / f"{number}.jpg"
        Image.fromarray((pixels / 4).astype(np.uint8)).save(path, quality=80)
        items.append(Item(path, 0, None))
    return items


def _seconds_of_reading(images: ImageDataset, batch: int) -> float:
    """Of an image, by one process that reads ahead."""
    stream = iter(batches(images, batch=batch, epoch=0, seed=0, shuffle=True, workers=1))
    next(stream)  # the process starts, and imports
    began, count = time.perf_counter(), 0
    for read in stream:
        count += len(read["label"])
    return (time.perf_counter() - began) / count


def _seconds_of_checking(items: list[Item]) -> float:
    began = time.perf_counter()
    for item in items:
        check(item.path)
    return (time.perf_counter() - began) / len(items)


def _memory_of_listing(data: Data, folder: Path, count: int = 2000) -> float:
    """Bytes an image, at most, while a folder is listed; the names are as long as iNaturalist's."""
    data = data.model_copy(update={"path": str(folder), "limit": 0})
    for species in ("merula", "philomelos"):
        place = folder / "train" / f"04200_Animalia_Chordata_Aves_Passeriformes_Turdidae_Turdus_{species}"
        place.mkdir(parents=True)
        for number in range(count // 2):
            (place / f"{number:08d}-0123-4567-89ab-cdef01234567.jpg").touch()
    tracemalloc.start()
    build_index(data, seed=0, verify=())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / count


def _rate(seconds: Callable[[], float]) -> float:
    return 1 / min(seconds() for _ in range(3))  # what disturbs a measurement only makes it slower


def _phases(recipe: Recipe, found: Measured, device: str) -> Table:
    title = f"Recipe {recipe.name}, {CLASSES:,} classes: what an image costs in each phase"
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in ("phase", "epochs", "G multiply-adds", f"a second, {device}", "MB an update"):
        table.add_column(column, justify="right" if column != "phase" else "left")
    for phase in found.phases:
        table.add_row(
            phase.name,
            str(phase.epochs),
            f"{phase.operations / 2e9:.2f}",
            f"{1 / phase.seconds:.1f}",
            f"{phase.message / 1e6:.1f}",
        )
    table.caption = (
        f"forward and backward; {found.images} images an update. One core reads and varies {found.read:.0f} "
        f"images a second and looks through {found.checked:.0f}. A checkpoint has "
        f"{found.checkpoint / 1e6:.0f} MB, written and synced at {found.disk / 1e6:.0f} MB/s. "
        f"Listing all images takes {TRAIN * found.listed / 1e9:.1f} GB in each process."
    )
    return table


def _layouts(rows: list[dict[str, Any]]) -> Table:
    title = f"iNaturalist-2021, {TRAIN:,} images: the whole run"
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in ("", "a GPU sustains", "images/s", "GB/s of files", "hours", "waits most for", "share"):
        table.add_column(column, justify="left" if column in ("", "waits most for") else "right")
    for row in rows:
        sustained = SUSTAINED.get(row["speed"])
        table.add_row(
            row["layout"],
            f"{sustained / 1e12:.0f} T op/s" if sustained else "as measured",
            f"{row['images_per_second']:,.0f}",
            f"{row['storage'] / 1e9:.2f}",
            f"{row['hours']:.1f}",
            row["bottleneck"],
            f"{row['share']:.0%}",
        )
    table.caption = (
        f"images/s and files: in the CNN phase; {CORES} cores read for a GPU; messages at {LINK / 1e9:.0f} GB/s in a "
        f"node and {NETWORK / 1e9:.0f} GB/s between nodes, after the backward pass; without a baseline; estimated, "
        "not run"
    )
    return table

"""`racnn export`: a trained network as one ONNX file, or as a folder that `racnn_cli.load` reads."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import racnn_cli
from racnn_cli.core import store
from racnn_cli.core.model import RACNN
from racnn_cli.data.images import load_source
from racnn_cli.data.index import build_index
from racnn_cli.errors import RacnnError
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run, write_atomic, write_json, write_text

OPSET = 20  # version of the ONNX operator set
BATCHES = (1, 5)  # sizes that the file is checked with
TOLERANCE = 1e-3  # in probabilities, and in boxes as a share of the source's side
HINT = "another model.backbone, or `racnn export --safetensors --out FOLDER`"
LARGEST = 2**31 - 2**20  # bytes that one protobuf message can hold


class Plain(nn.Module):
    """RACNN with its outputs as a flat tuple, in the order of `outputs`."""

    def __init__(self, model: RACNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, H) to probabilities (B, N), logits S × (B, N), boxes (B, S - 1, 3)."""
        output = self.model(image)
        boxes = (torch.stack(output.boxes, dim=1),) if output.boxes else ()
        return (output.probabilities, *output.logits, *boxes)


def outputs(scales: int) -> list[str]:
    """Names of the ONNX file's outputs."""
    logits = [f"logits_{number}" for number in range(1, scales + 1)]
    return ["probabilities", *logits, *(["boxes"] if scales > 1 else [])]


def export_onnx(run: Run, path: Path | None = None) -> dict[str, Any]:
    """Write the network as ONNX, and check it in ONNX Runtime before the file gets its name.

    Input `image` (B, 3, H, H), float32 in [0, 1], any B. Outputs `probabilities` (B, N), `logits_1` …
    `logits_S` (B, N), and with more than one scale `boxes` (B, S - 1, 3):
    `(tx, ty, tl)` in [0, 1] of the input.
    Metadata: `classes` (JSON list), `source`, `sizes`, `fit`, `racnn`, `recipe_sha256`.

    Args:
        run: a run whose network has weights.
        path: the file; None: model.onnx in the run folder.

    Returns:
        `path`, `bytes`, `opset`, `inputs` and `outputs` (name to shape), `checked_on`, `batches`,
        `max_difference` (output to largest difference from PyTorch), `seconds`.

    Raises:
        RacnnError: no weights; the network cannot be exported; ONNX Runtime disagrees with PyTorch.
    """
    path, start = path or run.onnx, time.perf_counter()
    model, _ = store.load(run.folder)
    weight = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if weight > LARGEST:
        raise RacnnError(
            f"the network's weights take {weight / 2**30:.1f} GiB; one ONNX file holds at most 2",
            HINT,
        )
    recipe = run.recipe()
    names = outputs(len(model.sizes))
    proto = _to_onnx(Plain(model).eval(), model.source, names)
    onnx.helper.set_model_props(
        proto,
        {
            "classes": json.dumps(run.classes(), ensure_ascii=False),
            "source": str(model.source),
            "sizes": json.dumps(model.sizes),
            "fit": recipe.data.fit,
            "racnn": racnn_cli.__version__,
            "recipe_sha256": hashlib.sha256(run.recipe_file.read_bytes()).hexdigest(),
        },
    )
    images, kind = _pictures(recipe, run.classes(), model.source, sum(BATCHES))
    difference: dict[str, float] = {}

    def write(temporary: Path) -> None:
        onnx.save(proto, temporary)
        try:
            onnx.checker.check_model(str(temporary), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as fault:
            raise RacnnError(f"the exported graph is not valid ONNX: {fault}", HINT, failure=True) from fault
        difference.update(compare(model, temporary, images, kind))

    write_atomic(path, write)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "opset": OPSET,
        "inputs": {value.name: _shape(value) for value in proto.graph.input},
        "outputs": {value.name: _shape(value) for value in proto.graph.output},
        "checked_on": kind,
        "batches": list(BATCHES),
        "max_difference": difference,
        "seconds": time.perf_counter() - start,
    }


def describe(report: Mapping[str, Any]) -> str:
    """The report of `export_onnx` in a few lines for a person."""

    def shapes(values: Mapping[str, list[str | int]]) -> str:
        return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in values.items())

    worst = max(report["max_difference"].values())
    sizes = " and ".join(map(str, report["batches"]))
    return (
        f"wrote {report['path']}: {report['bytes'] / 2**20:.1f} MiB, opset {report['opset']}\n"
        f"  in: {shapes(report['inputs'])}\n"
        f"  out: {shapes(report['outputs'])}\n"
        f"  checked in ONNX Runtime on {report['checked_on']}, batches of {sizes}: "
        f"largest difference from PyTorch {worst:.1e}"
    )


def compare(model: RACNN, path: Path, images: Tensor, kind: str) -> dict[str, float]:
    """Largest difference between PyTorch and ONNX Runtime of each output, over both batch sizes.

    Raises:
        RacnnError: the file does not load, probabilities or boxes differ by more than 1e-3, another answer.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as fault:  # its errors have no common base
        raise RacnnError(
            f"ONNX Runtime cannot load the exported graph: {fault}", HINT, failure=True
        ) from fault
    names = outputs(len(model.sizes))
    worst = dict.fromkeys(names, 0.0)
    for share in images.split(BATCHES):
        with torch.inference_mode():
            expected = [value.numpy() for value in Plain(model)(share)]
        found = session.run(names, {"image": share.numpy()})
        for name, one, other in zip(names, expected, found, strict=True):
            gap = float(np.abs(one - other).max()) if one.shape == other.shape else math.inf
            worst[name] = max(worst[name], gap)
            if name in ("probabilities", "boxes") and not gap <= TOLERANCE:
                raise RacnnError(
                    f"ONNX Runtime and PyTorch differ by {gap:.2g} in {name} on {kind}, batch {len(share)}; "
                    f"at most {TOLERANCE:g} is allowed, and no file was written",
                    HINT,
                    failure=True,
                )
        probabilities, answer = expected[0], found[0].argmax(axis=1)
        # Two classes that PyTorch itself cannot tell apart may swap places by rounding; nothing else may.
        lost = probabilities.max(axis=1) - np.take_along_axis(probabilities, answer[:, None], axis=1)[:, 0]
        if (lost > 1e-5).any():
            raise RacnnError(
                f"ONNX Runtime names another class than PyTorch on {kind}, batch {len(share)}; no file left",
                HINT,
                failure=True,
            )
    return worst


def export_safetensors(run: Run, folder: Path) -> Path:
    """Write recipe.toml, classes.json and weights.safetensors to a folder that `racnn_cli.load` reads.

    Raises:
        RacnnError: no weights, or the folder holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RacnnError(
            f"{folder} is there already and not empty; nothing was overwritten", "name a new folder"
        )
    store.load(run.folder)  # a damaged run is not passed on
    target = Run(folder)
    write_atomic(target.weights, lambda temporary: shutil.copyfile(run.weights, temporary))
    write_json(target.classes_file, run.classes())
    write_text(target.recipe_file, run.recipe_file.read_text(encoding="utf-8"))
    return folder


def _to_onnx(model: nn.Module, side: int, names: list[str]) -> onnx.ModelProto:
    """The graph with a batch of any size; the exporter's own chatter is swallowed."""
    # Two images: the exporter takes a dimension of 1 for a constant.
    example = torch.zeros(2, 3, side, side)
    said = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                input_names=["image"],
                output_names=names,
                dynamic_shapes={"image": {0: "batch"}},
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except Exception as fault:
        first = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise RacnnError(
            f"the network cannot be exported to ONNX opset {OPSET}: {first}",
            HINT,
            failure=True,
        ) from fault
    finally:
        logging.disable(before)
    assert program is not None
    return program.model_proto


def _pictures(recipe: Recipe, classes: list[str], side: int, count: int) -> tuple[Tensor, str]:
    """So many images (n, 3, side, side): of the run's validation split if it is still there, else noise."""
    try:
        items = build_index(recipe.data, seed=recipe.seed, classes=classes, verify=()).splits["val"]
        some = [load_source(item.path, recipe.data, side)[0] for item in items[:count]]
    except RacnnError:
        some = []
    if not some:
        noise = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
        return noise, "noise"
    pixels = np.stack([some[number % len(some)] for number in range(count)])  # (n, side, side, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, "validation pictures"


def _shape(value: onnx.ValueInfoProto) -> list[str | int]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]

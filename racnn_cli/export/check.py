"""Check exported ONNX files against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from racnn_cli.core import store
from racnn_cli.data.listing import list_images
from racnn_cli.errors import ExportError
from racnn_cli.export.early_exit import EarlyExitGraph
from racnn_cli.export.graph import ExportedGraph, ExportOptions, recipe_hash
from racnn_cli.export.images import CheckImages
from racnn_cli.export.onnx_network import OnnxMetadata, as_input, open_session, run_session, unusable
from racnn_cli.run import Run

BATCH_SIZES = (1, 2, 7)
LARGER = 1.5  # side of the second image size, relative to the source that the network was trained on
TOLERANCE = 1e-3  # in probabilities, and in boxes as a fraction of the image's side
CROPS_TOLERANCE = 1e-2  # rounding of a box moves the sharp edges in its crop
HINT = "another model.backbone, or `racnn export --format safetensors --out FOLDER`"


def check(run: Run, path: Path | None, folder: Path) -> dict[str, Any]:
    """Compare an ONNX file that was exported earlier with its run, on the images of a folder.

    Args:
        run: that the file was exported from.
        path: the file; None: model.onnx in the run folder.
        folder: of images.

    Returns:
        `path`, and the keys of `compare`.

    Raises:
        ExportError: the file is missing, was exported from another recipe, or disagrees with the run.
    """
    path = path or run.onnx
    session = open_session(path)
    model, _ = store.load(run.folder)
    entries = session.get_modelmeta().custom_metadata_map
    if entries.get("recipe_sha256") != recipe_hash(run):
        raise ExportError(
            f"{path} was not exported from {run.folder}: the recipes differ", "name its own run with --run"
        )
    if not {"layout", "top"} <= entries.keys():
        raise ExportError(
            f"{path} was exported by another version of racnn ({entries.get('racnn', 'unknown')})",
            "export it again, with `racnn export --format onnx`",
        )
    metadata = OnnxMetadata.read(path, session)
    names = {value.name for value in session.get_outputs()}
    options = ExportOptions(
        raw=metadata.layout == "NHWC", top=metadata.top, crops=any(name.startswith("crop_") for name in names)
    )
    graph = ExportedGraph(model, run.recipe().data.fit, options)
    if metadata.threshold is not None:
        graph = EarlyExitGraph(graph, metadata.threshold)
    if missing := sorted(set(graph.output_names) - names):
        raise unusable(path, f"it has no output {', '.join(missing)}")
    images = CheckImages(run, model.source, files=list_images(folder))
    return {"path": str(path)} | compare(graph.eval(), path, images)


def compare(graph: ExportedGraph, path: Path, images: CheckImages) -> dict[str, Any]:
    """Compare the outputs of an ONNX file with PyTorch's, for images of two sizes in batches of 1, 2 and 7.

    Returns:
        `checked_on` (source of the images), `batches` (their sizes), `sides`, `max_difference` (per output; of boxes
        as a fraction of the image's side), `agreement` (number of images with the same class, and of all images).

    Raises:
        ExportError: the file does not load or run, an output differs by more than the tolerance, or the classes differ.
    """
    session = open_session(path)
    sides = [images.side, round(LARGER * images.side)]
    worst = {name: 0.0 for name in graph.output_names if name != "labels"}
    same = count = 0
    for side in sides:
        for squares in np.split(images.squares(sum(BATCH_SIZES), side), np.cumsum(BATCH_SIZES)[:-1]):
            where = f"{images.source} of {side}×{side} px in a batch of {len(squares)}"
            for expected, outputs in _run_both(graph, session, squares, path=path):
                for name in worst:
                    difference = _difference(expected[name], outputs[name]) / (side if name == "boxes" else 1)
                    worst[name] = max(worst[name], difference)
                    tolerance = CROPS_TOLERANCE if name.startswith("crop_") else TOLERANCE
                    if not difference <= tolerance:
                        raise not_exportable(
                            f"ONNX Runtime and PyTorch differ by {difference:.2g} in {name} on {where}; at most "
                            f"{tolerance:g} is allowed"
                        )
                if not _are_labels(outputs["labels"], expected):
                    raise unusable(path, "its labels are not class numbers")
                best = outputs["labels"][:, 0]
                if not _same_classes(best, expected["probabilities"]):
                    raise not_exportable(f"ONNX Runtime and PyTorch name different classes on {where}")
                same += int((best == expected["labels"][:, 0]).sum())
                count += len(squares)
    return {
        "checked_on": images.source,
        "batches": list(BATCH_SIZES),
        "sides": sides,
        "max_difference": worst,
        "agreement": [same, count],
    }


def validate(path: Path) -> None:
    """Run ONNX's own checker, with shape inference.

    Raises:
        ExportError: the graph is not valid.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise not_exportable(f"the exported graph is not valid ONNX: {error}") from error


def not_exportable(message: str) -> ExportError:
    """The error for a network that an exporter cannot handle."""
    return ExportError(message, HINT, failure=True)


def untraceable(action: str, error: Exception) -> ExportError:
    """The error for a network that an exporter raises `error` on; it keeps the first line of it."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return not_exportable(f"the network cannot be {action}: {reason}")


def _run_both(
    graph: ExportedGraph, session: onnxruntime.InferenceSession, squares: np.ndarray, *, path: Path
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Yield the outputs of PyTorch and of the file, by name, for each set of additional inputs."""
    names, image = graph.output_names, torch.from_numpy(as_input(squares, raw=graph.options.raw))
    with torch.inference_mode():
        for extra in graph.extra_inputs(image):
            inputs = {"image": image} | extra
            expected = [value.numpy() for value in graph(**inputs)]
            arrays = {name: value.numpy() for name, value in inputs.items()}
            yield dict(zip(names, expected, strict=True)), run_session(session, names, arrays, path=path)


def _difference(expected: np.ndarray, output: np.ndarray) -> float:
    """The largest difference; infinite if the shapes differ."""
    if expected.shape != output.shape or output.dtype.kind not in "fiu":
        return math.inf
    return float(np.abs(expected - output).max())


def _are_labels(labels: np.ndarray, expected: Mapping[str, np.ndarray]) -> bool:
    classes = expected["probabilities"].shape[1]
    valid = labels.shape == expected["labels"].shape and labels.dtype.kind in "iu"
    return valid and bool(((labels >= 0) & (labels < classes)).all())


def _same_classes(labels: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether the labels (B,) are the best classes; classes that are equal up to rounding count as one."""
    best = probabilities.max(axis=1)
    return bool((best - np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0] <= 1e-5).all())

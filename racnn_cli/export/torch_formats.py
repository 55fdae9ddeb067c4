"""Export a trained network for PyTorch: a `torch.export` program, or a folder that `racnn_cli.load` reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from racnn_cli.core import store
from racnn_cli.errors import ExportError
from racnn_cli.export.check import TOLERANCE, not_exportable, untraceable
from racnn_cli.export.graph import ExportedGraph, ExportOptions
from racnn_cli.export.images import CheckImages
from racnn_cli.export.onnx import require_suffix
from racnn_cli.export.onnx_network import as_input
from racnn_cli.run import Run, write_atomic, write_json, write_text


def export_program(run: Run, path: Path | None = None, *, options: ExportOptions | None = None) -> dict[str, Any]:
    """Write the network as a program that `torch.export.load` reads where racnn is not installed.

    Inputs, outputs and metadata are those of `export_onnx`; the metadata is in the extra file `metadata.json`.

    Args:
        run: a run whose network has weights.
        path: the file; None: model.pt2 in the run folder.
        options: inputs and outputs.

    Returns:
        `path`, `bytes`, `max_difference` (per output, on validation images).

    Raises:
        ExportError: the network cannot be traced, or the program disagrees with it.
        RunError: no weights.
    """
    path = require_suffix(path or run.folder / "model.pt2", ".pt2")
    graph = ExportedGraph.from_run(run, options)
    inputs, axes = graph.example_inputs()
    try:
        program = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=axes)
    except Exception as error:
        raise untraceable("traced by torch.export", error) from error
    squares = CheckImages(run, graph.model.source).squares(3, graph.model.source)
    image = torch.from_numpy(as_input(squares, raw=graph.options.raw))
    differences: dict[str, float] = {}

    def write(temporary: Path) -> None:
        torch.export.save(program, temporary, extra_files={"metadata.json": json.dumps(graph.metadata(run))})
        loaded = torch.export.load(temporary).module()
        with torch.inference_mode():
            for name, expected, output in zip(graph.output_names, graph(image), loaded(image), strict=True):
                differences[name] = float((expected - output).abs().max())
        if differences["probabilities"] > TOLERANCE:
            raise not_exportable(
                f"the program and the network differ by {differences['probabilities']:.2g} in probabilities; no file "
                "was written"
            )

    write_atomic(path, write)
    return {"path": str(path), "bytes": path.stat().st_size, "max_difference": differences}


def export_safetensors(run: Run, folder: Path) -> Path:
    """Write recipe.toml, classes.json and weights.safetensors to a folder that `racnn_cli.load` reads.

    Raises:
        ExportError: the folder exists and is not empty.
        RunError: no weights, or damaged ones.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(
            f"{folder} already exists and is not empty; nothing was overwritten", "--out with a new folder"
        )
    store.load(run.folder)  # refuses a damaged run
    target = Run(folder)
    write_atomic(target.weights, lambda temporary: shutil.copyfile(run.weights, temporary))
    write_json(target.classes_file, run.classes())
    write_text(target.recipe_file, run.recipe_file.read_text(encoding="utf-8"))
    return folder

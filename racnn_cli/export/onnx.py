"""Export a trained network as one ONNX file."""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx.external_data_helper import uses_external_data

from racnn_cli.errors import ExportError
from racnn_cli.export import quantize
from racnn_cli.export.check import compare, untraceable, validate
from racnn_cli.export.early_exit import EarlyExitGraph, cross_fitted_accuracy, join, measure, with_early_exit
from racnn_cli.export.graph import ExportedGraph, ExportOptions
from racnn_cli.export.images import CheckImages, held_out_images, labelled_images
from racnn_cli.export.quantize import Precision
from racnn_cli.run import Run, write_atomic

OPSET = 20
MAX_DROP = 0.5  # points of accuracy
PROTOBUF_LIMIT = 2**31 - 2**20  # bytes that one protobuf message can hold


def export_onnx(
    run: Run,
    path: Path | None = None,
    *,
    options: ExportOptions | None = None,
    opset: int = OPSET,
    precision: Precision = "float32",
    early_exit: bool = False,
    max_drop: float = MAX_DROP,
) -> dict[str, Any]:
    """Write the network as ONNX; the file gets its name only after it agrees with PyTorch.

    `ExportedGraph` documents the inputs and outputs. Weights above protobuf's limit of 2 GiB go into a second file,
    `NAME.HASH.data`. Metadata: `classes` (JSON list), `source` (side that the network was trained on), `sizes`, `fit`,
    `mean`, `std`, `layout` (NCHW or NHWC), `top`, `racnn`, `recipe` (TOML), `recipe_sha256`, `threshold` (early exit).

    Args:
        run: a run whose network has weights.
        path: the file; None: model.onnx in the run folder.
        options: inputs and outputs.
        opset: 18 or 20.
        precision: of the backbones; `half` and `int8` are converted from the checked float32 graph.
        early_exit: run the finer scales only on images that scale 1 is uncertain about.
        max_drop: points of accuracy on the validation split that `precision` or `early_exit` may cost.

    Returns:
        `path`, `bytes`, `opset`, `inputs` and `outputs` (name to shape), `seconds`, and the keys of `compare`.
        With another precision, `compressed`: see `quantize.compress`. With early exit, `early_exit`: see
        `early_exit.measure`.

    Raises:
        ExportError: the network cannot be exported, ONNX Runtime disagrees with PyTorch, the accuracy drops too
            far, or `early_exit` is combined with one scale or another precision.
        DataError: the images that `precision` or `early_exit` need are missing.
        RunError: no weights.
    """
    if early_exit and precision != "float32":
        raise ExportError(f"--early-exit writes float32, not {precision}", "leave out one of the two options")
    path, start = require_suffix(path or run.onnx, ".onnx"), time.perf_counter()
    graph = ExportedGraph.from_run(run, options)
    source = graph.model.source
    if early_exit and len(graph.model.sizes) == 1:
        raise ExportError(
            f"{run.folder} has a single scale, so there are no finer scales to skip", "export without --early-exit"
        )
    validation = test = None
    if early_exit or precision != "float32":
        validation, test = labelled_images(run, "val", source), held_out_images(run, source)
        if early_exit:
            graph = with_early_exit(graph, validation, max_drop)
    program = to_onnx(graph, opset)
    program.metadata_props.update(graph.metadata(run))
    report: dict[str, Any] = {}

    def verify(file: Path) -> None:
        validate(file)
        report.update(compare(graph, file, CheckImages(run, source)))
        if validation is None:
            return
        if isinstance(graph, EarlyExitGraph):
            report["early_exit"] = measure(graph, file, test or validation)
            if test is None:
                report["early_exit"]["after"] = cross_fitted_accuracy(graph, validation, max_drop)
        else:
            report["compressed"] = quantize.compress(
                run, graph, file, precision=precision, images=validation, max_drop=max_drop, test=test
            )

    size = save(program, path, verify)
    return {
        "path": str(path),
        "bytes": size,
        "opset": opset,
        "inputs": _shapes(program.graph.inputs),
        "outputs": _shapes(program.graph.outputs),
        **report,
        "seconds": time.perf_counter() - start,
    }


def require_suffix(path: Path, suffix: str) -> Path:
    """The path, if it has the suffix: a typing error must not overwrite an image or the weights."""
    if path.suffix != suffix:
        raise ExportError(f"--out {path} does not end in {suffix}; nothing was written", f"--out NAME{suffix}")
    return path


def to_onnx(graph: ExportedGraph, opset: int) -> onnx_ir.Model:
    """Trace a graph, with dynamic batch and image sizes; the exporter's own output is suppressed.

    Raises:
        ExportError: the network cannot be exported.
    """
    if isinstance(graph, EarlyExitGraph):
        return join(to_onnx(graph.coarse, opset), to_onnx(graph.fine, opset), graph.threshold)
    (inputs, axes), output = graph.example_inputs(), io.StringIO()
    logging_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=graph.output_names,
                dynamic_shapes=axes,
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        raise untraceable(f"exported to ONNX opset {opset}", error) from error
    finally:
        logging.disable(logging_level)
    assert program is not None
    return program.model


def save(program: onnx_ir.Model, path: Path, verify: Callable[[Path], None]) -> int:
    """Write a graph, and rename it to `path` once `verify` accepts the file.

    External weights get a new file name each time, so that a graph never refers to the weights of another one.

    Returns:
        total size in bytes.

    Raises:
        ExportError: whatever `verify` raises; no file is left behind.
    """
    size = sum(value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value)
    outdated = set(path.parent.glob(f"{glob.escape(path.name)}.*.data"))
    weights = path.with_name(f"{path.name}.{os.urandom(4).hex()}.data") if size > PROTOBUF_LIMIT else None

    def write(temporary: Path) -> None:
        onnx_ir.save(program, temporary, external_data=weights and weights.name)
        verify(temporary)
        graph = onnx.load(temporary, load_external_data=False).graph
        if weights and not any(map(uses_external_data, graph.initializer)):
            weights.unlink()  # `verify` replaced the graph with a compressed one that holds its own weights

    try:
        write_atomic(path, write)
    except BaseException:
        if weights:
            weights.unlink(missing_ok=True)
        raise
    for file in outdated:
        file.unlink(missing_ok=True)
    return path.stat().st_size + (weights.stat().st_size if weights and weights.exists() else 0)


def describe(report: Mapping[str, Any]) -> str:
    """Format the report of `export_onnx` or `check` as a few lines of text."""

    def shapes(values: Mapping[str, list[str | int]]) -> str:
        return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in values.items())

    lines = []
    if "bytes" in report:
        lines.append(f"wrote {report['path']}: {report['bytes'] / 2**20:.1f} MiB, opset {report['opset']}")
        lines += [f"  {key}: {shapes(report[key])}" for key in ("inputs", "outputs")]
    sizes = " and ".join(f"{side}×{side}" for side in report["sides"])
    same, count = report["agreement"]
    differences = ", ".join(f"{name} {value:.1e}" for name, value in report["max_difference"].items())
    lines += [
        f"  ONNX Runtime compared with PyTorch on {report['checked_on']} of {sizes} px, "
        f"batch sizes {', '.join(map(str, report['batches']))}",
        f"  same class on {same} of {count}; largest differences: {differences}",
    ]
    if compressed := report.get("compressed"):
        lines.append(
            f"  {compressed['precision']}: {compressed['bytes_before'] / 2**20:.1f} MiB before; "
            f"{compressed['times_faster']:.2f} × as fast on this machine; accuracy {compressed['before']:.3f} before "
            f"and {compressed['after']:.3f} after on {_describe_images(compressed)}"
        )
    if exits := report.get("early_exit"):
        lines.append(
            f"  early exit: {exits['stopped']} of {_describe_images(exits)} stop after scale 1, with a "
            f"probability of {exits['threshold']:.3f} or more; {exits['times_faster']:.2f} × as fast on this machine, "
            f"one image at a time; accuracy {exits['before']:.3f} with all scales and {exits['after']:.3f} with early "
            f"exit{'' if exits['split'] == 'test' else ', its threshold chosen on the other half of the images'}"
        )
    return "\n".join(lines)


def _describe_images(report: Mapping[str, Any]) -> str:
    """Number and split of the images of a measurement."""
    return f"{report['images']} {report['split']} images{'' if report['split'] == 'test' else ' (used for choosing)'}"


def _shapes(values: Iterable[onnx_ir.Value]) -> dict[str, list[str | int]]:
    return {str(v.name): [axis if isinstance(axis, int) else str(axis) for axis in v.shape or ()] for v in values}

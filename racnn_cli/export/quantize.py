"""Compress an exported graph to half precision or 8-bit integers, and measure what that costs.

Only the backbones are converted. APNs, crops and fusion stay in float32: these formats cannot resolve half a pixel of
a box.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import onnxruntime
from onnx_ir.convenience import replace_all_uses_with
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from racnn_cli.errors import ExportError
from racnn_cli.export.check import validate
from racnn_cli.export.graph import ExportedGraph, ExportOptions
from racnn_cli.export.images import LabelledImages, input_batches, labelled_images
from racnn_cli.export.onnx_network import as_input, open_session
from racnn_cli.run import Run

Precision = Literal["float32", "half", "int8"]
SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's metadata key for the module that a node comes from
KEEP_FLOAT = ("LayerNormalization", "Softmax")  # cheap, and sensitive to 8 bits
TURNS = 15  # timed calls per file
CALIBRATION_IMAGES = 128  # training images that set the ranges of int8


def compress(
    run: Run,
    graph: ExportedGraph,
    file: Path,
    *,
    precision: Precision,
    images: LabelledImages,
    max_drop: float,
    test: LabelledImages | None = None,
) -> dict[str, Any]:
    """Replace a float32 file with a compressed one if the accuracy holds.

    Args:
        run: whose training images calibrate int8.
        graph: what `file` was exported from.
        file: replaced in place.
        precision: `half` or `int8`.
        images: validation images, which decide.
        max_drop: allowed loss of accuracy on these images, in percentage points.
        test: images to report the accuracy on; None: those that decided.

    Returns:
        `precision`, `before` and `after` (accuracy), `images` and their `split`, `bytes_before`, `times_faster`.

    Raises:
        ExportError: the accuracy drops too far, or the compressed graph is not valid.
    """
    compressed = file.with_suffix(".compressed.onnx")
    try:
        if precision == "half":
            to_half(file, compressed)
        else:
            calibration = labelled_images(run, "train", graph.model.source, CALIBRATION_IMAGES)
            to_int8(file, compressed, calibration.squares, options=graph.options)
        validate(compressed)
        before, after = open_session(file), open_session(compressed)
        image = as_input(images.squares[:1], raw=graph.options.raw)
        decided = [accuracy(session, images, graph.options) for session in (before, after)]
        reported = decided if test is None else [accuracy(session, test, graph.options) for session in (before, after)]
        report: dict[str, Any] = {
            "precision": precision,
            "before": reported[0],
            "after": reported[1],
            "images": len((test or images).labels),
            "split": (test or images).split,
            "bytes_before": file.stat().st_size,
            "times_faster": speedup(
                lambda: before.run(None, {"image": image}), lambda: after.run(None, {"image": image})
            ),
        }
        drop = 100 * (decided[0] - decided[1])
        if drop > max_drop + 1e-9:
            raise ExportError(
                f"{precision} costs {drop:.1f} points of accuracy on {len(images.labels)} validation images "
                f"({decided[0]:.3f} to {decided[1]:.3f}); {max_drop:g} are allowed, and no file was written",
                f"--max-drop {math.ceil(10 * drop - 1e-6) / 10:g}, or export in float32",
                failure=True,
            )
        os.replace(compressed, file)
    finally:
        compressed.unlink(missing_ok=True)
    return report


def to_half(source: Path, target: Path) -> None:
    """Write a graph whose backbones compute in float16; inputs and outputs keep their types."""
    proto = onnx.load(source)
    backbone = set(backbone_nodes(proto))
    others = [node.name for node in proto.graph.node if node.name not in backbone]
    proto = convert_float_to_float16(proto, keep_io_types=True, node_block_list=others)
    # The converter leaves stale value types, unsorted nodes, and float16 casts of images that go to float32 nodes.
    del proto.graph.value_info[:]
    model = ir.from_proto(proto)
    for node in model.graph:
        first = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] else None
        if first is None or first.op_type != "Cast" or first.inputs[0] not in model.graph.inputs:
            continue
        if node.attributes.get_int("to") == first.inputs[0].dtype:
            replace_all_uses_with(node.outputs[0], first.inputs[0])
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.TopologicalSortPass()(model)
    ir.save(model, target)


def to_int8(source: Path, target: Path, squares: np.ndarray, *, options: ExportOptions) -> None:
    """Write a graph whose backbones compute in 8-bit integers, with static ranges and per-channel weights.

    Args:
        source: a graph in float32.
        target: the file to write.
        squares: (n, H, H, 3) uint8 to calibrate the ranges of activations on.
        options: of the graph.
    """
    prepared = target.with_suffix(".prepared.onnx")
    try:
        # Optimizing could lose the scopes of nodes, and the exporter has already folded BatchNorm.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True, skip_optimization=True)
        nodes = backbone_nodes(onnx.load(prepared, load_external_data=False), exclude=KEEP_FLOAT)
        if not nodes:
            raise ExportError(f"{source} does not record which of its nodes belong to a backbone", "export it again")
        quantize_static(
            str(prepared),
            str(target),
            _CalibrationReader(squares, options),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
            calibrate_method=CalibrationMethod.MinMax,
        )
    finally:
        prepared.unlink(missing_ok=True)


def backbone_nodes(proto: onnx.ModelProto, exclude: Sequence[str] = ()) -> list[str]:
    """Names of the nodes in the backbones, except those of some operator types."""
    return [
        node.name
        for node in proto.graph.node
        if node.op_type not in exclude
        and any(entry.key == SCOPES and ".backbone" in entry.value for entry in node.metadata_props)
    ]


class _CalibrationReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, squares: np.ndarray, options: ExportOptions) -> None:
        self.inputs = ({"image": batch} for batch in input_batches(squares, options))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)


def accuracy(session: onnxruntime.InferenceSession, images: LabelledImages, options: ExportOptions) -> float:
    """Fraction of the images whose class the file names."""
    labels = [session.run(["labels"], {"image": batch})[0][:, 0] for batch in input_batches(images.squares, options)]
    return float((np.concatenate(labels) == images.labels).mean())


def speedup(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """How many times faster the second call is: the median ratio over alternating calls."""
    ratios = [_seconds(slow) / _seconds(fast) for _ in range(TURNS + 1)]
    return statistics.median(ratios[1:])  # the first turn warms up


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

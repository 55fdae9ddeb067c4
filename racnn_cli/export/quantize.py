"""An exported graph made smaller and faster: half precision, or 8-bit integers. What it costs is measured first.

Only the backbones are touched: the APNs, the crops and the fusion of the scales stay in float, because half a
pixel of a box is more than these formats can tell apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import onnxruntime
from onnx_ir.convenience import replace_all_uses_with
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from racnn_cli.errors import RacnnError
from racnn_cli.export.graph import Form
from racnn_cli.export.onnx_network import as_input

Precision = Literal["float32", "half", "int8"]
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes the module that a node comes from
FLOAT = ("LayerNormalization", "Softmax")  # little work, and much to lose in 8 bits
TURNS = 15  # of each file, in the measurement of speed
CALIBRATION = 128  # training images that the ranges of int8 are taken from
BATCH = 8


def to_half(source: Path, target: Path) -> None:
    """Write a graph whose backbones compute in float16; inputs and outputs stay as they are."""
    proto = onnx.load(source)
    backbone = set(backbone_nodes(proto))
    others = [node.name for node in proto.graph.node if node.name not in backbone]
    proto = convert_float_to_float16(proto, keep_io_types=True, node_block_list=others)
    # The converter leaves wrong types of values behind, nodes out of order, and a detour of the images through
    # float16 on their way to float nodes.
    del proto.graph.value_info[:]
    halved = ir.from_proto(proto)
    for node in halved.graph:
        first = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] else None
        if first is None or first.op_type != "Cast" or first.inputs[0] not in halved.graph.inputs:
            continue
        if node.attributes.get_int("to") == first.inputs[0].dtype:
            replace_all_uses_with(node.outputs[0], first.inputs[0])
    ir.passes.common.RemoveUnusedNodesPass()(halved)
    ir.passes.common.TopologicalSortPass()(halved)
    ir.save(halved, target)


def to_int8(source: Path, target: Path, images: np.ndarray, form: Form) -> None:
    """Write a graph whose backbones compute in 8-bit integers: static ranges, a scale for each output channel.

    Args:
        source: a graph in float32.
        target: where to.
        images: (n, H, H, 3) uint8 that the ranges of the activations are taken from.
        form: of the graph.
    """
    prepared = target.with_suffix(".prepared.onnx")
    try:
        # Not optimized here: that may lose which node is whose, and the exporter has folded BatchNorm already.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True, skip_optimization=True)
        nodes = backbone_nodes(onnx.load(prepared, load_external_data=False), but=FLOAT)
        if not nodes:
            raise RacnnError(
                f"{source} does not say which of its nodes are the backbone's", "export it again"
            )
        quantize_static(
            str(prepared),
            str(target),
            _Reader(images, form),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
            calibrate_method=CalibrationMethod.MinMax,
        )
    finally:
        prepared.unlink(missing_ok=True)


def backbone_nodes(proto: onnx.ModelProto, but: Sequence[str] = ()) -> list[str]:
    """Names of the nodes that the scales' backbones consist of, without some kinds of operators."""
    found = []
    for node in proto.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "")
        if ".backbone" in scopes and node.op_type not in but:
            found.append(node.name)
    return found


class _Reader(CalibrationDataReader):
    def __init__(self, images: np.ndarray, form: Form) -> None:
        self.batches = batches(images, form)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.batches, None)
        return None if image is None else {"image": image}


def batches(squares: np.ndarray, form: Form) -> Iterator[np.ndarray]:
    """Square images (n, H, H, 3) uint8 as the graph takes them, a few at a time."""
    for start in range(0, len(squares), BATCH):
        yield as_input(squares[start : start + BATCH], raw=form.raw)


def accuracy(
    session: onnxruntime.InferenceSession, squares: np.ndarray, labels: np.ndarray, form: Form
) -> float:
    """Share of the square images (n, H, H, 3) uint8 whose class, of `labels` (n,), the file names."""
    answers = [session.run(["labels"], {"image": image})[0][:, 0] for image in batches(squares, form)]
    return float((np.concatenate(answers) == labels).mean())


def times_faster(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """How many times faster the second one answers: the median of ratios of calls that follow one another."""
    ratios = []
    for turn in range(TURNS + 1):
        seconds = []
        for answer in (slow, fast):
            start = time.perf_counter()
            answer()
            seconds.append(time.perf_counter() - start)
        if turn:  # the first one warms up
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)

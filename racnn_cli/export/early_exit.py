"""Early exit: images that scale 1 classifies with confidence skip the finer scales.

The result is one ONNX file: the graph of scale 1, and inside an `If` that of the finer scales. The inner graph runs
only on the uncertain images of a batch, or not at all if there are none. The graph's input `threshold` is the
probability from which scale 1 counts as confident; its default is chosen on validation images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.tape import Tape
from torch import Tensor

from racnn_cli.core.model import CoarseOutput
from racnn_cli.errors import ExportError
from racnn_cli.export.graph import ExportedGraph
from racnn_cli.export.images import LabelledImages, input_batches
from racnn_cli.export.onnx_network import as_input, open_session
from racnn_cli.run import Run

NO_EXIT = 2.0  # a threshold that no probability reaches: every image goes through all scales
COARSE_OUTPUTS = ("logits", "descriptor", "proposal")  # inputs of the fine graph


class CoarseGraph(ExportedGraph):
    """Scale 1 alone: the outputs for images that stop here, and the inputs of the fine graph."""

    extra_outputs = ("ran", *COARSE_OUTPUTS)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images to the outputs of `EarlyExitGraph` for images that stop here, and `COARSE_OUTPUTS`."""
        model = self.model
        _, square, _ = self._prepare(image)
        _, logits, descriptor, proposal = model.coarse(model.normalise(square))
        assert proposal is not None
        probabilities = model.scale_probabilities([logits])[:, 0]
        batch, finer = logits.shape[0], model.sizes[1:]
        zeros = partial(probabilities.new_zeros, batch)
        scales = torch.cat([probabilities[:, None], zeros(len(finer), model.classes)], dim=1)
        boxes = zeros(len(finer), 4)
        crops = [zeros(3, size, size) for size in finer if self.options.crops]
        ran = torch.ones(batch, dtype=torch.int64, device=logits.device)
        labels = self._top_labels(probabilities)
        return probabilities, labels, scales, boxes, *crops, ran, logits, descriptor, proposal


class FineGraph(ExportedGraph):
    """The finer scales, from the outputs of scale 1."""

    extra_outputs = ("ran",)

    def example_inputs(self) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
        inputs, axes = super().example_inputs()
        widths = (self.model.classes, self.model.scale(0).classifier.in_features, 3)
        for name, width in zip(COARSE_OUTPUTS, widths, strict=True):
            inputs[name], axes[name] = torch.zeros(len(inputs["image"]), width), {0: axes["image"][0]}
        return inputs, axes

    def forward(  # type: ignore[override]
        self, image: Tensor, logits: Tensor, descriptor: Tensor, proposal: Tensor
    ) -> tuple[Tensor, ...]:
        """Images and their `COARSE_OUTPUTS` to the outputs of `EarlyExitGraph`."""
        model = self.model
        image, square, offset = self._prepare(image)
        source = model.normalise(square)
        coarse = CoarseOutput(model.first_view(source), logits, descriptor=descriptor, proposal=proposal)
        output = model.refine(source, coarse)
        ran = torch.full((logits.shape[0],), len(model.sizes), dtype=torch.int64, device=logits.device)
        return *self._outputs(output, image, square, offset=offset), ran


class EarlyExitGraph(ExportedGraph):
    """`ExportedGraph` whose finer scales run only on uncertain images: the PyTorch reference of the file.

    Args:
        graph: all scales, at least two.
        threshold: an image stops after scale 1 if its highest probability there is at least this.
    """

    extra_outputs = ("ran",)

    def __init__(self, graph: ExportedGraph, threshold: float) -> None:
        super().__init__(graph.model, graph.fit, graph.options)
        self.threshold = threshold
        self.coarse, self.fine = (kind(graph.model, graph.fit, graph.options) for kind in (CoarseGraph, FineGraph))

    def forward(self, image: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, ...]:
        """Classify images; where an image stops early, the values of the finer scales are 0.

        Args:
            image: as in `ExportedGraph.forward`.
            threshold: scalar, instead of the one that was chosen.

        Returns:
            as `ExportedGraph.forward`, and ran (B,) int64: the number of scales that ran, 1 or S.
        """
        limit = self.threshold if threshold is None else threshold
        *outputs, logits, descriptor, proposal = self.coarse(image)
        rows = (outputs[0].amax(dim=1) < limit).nonzero()[:, 0]
        if len(rows):
            refined = self.fine(image[rows], logits[rows], descriptor[rows], proposal[rows])
            outputs = [coarse.index_copy(0, rows, fine) for coarse, fine in zip(outputs, refined, strict=True)]
        return tuple(outputs)

    def extra_inputs(self, image: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield thresholds with which none, all, and about half of the images go through the finer scales."""
        confidence = self.coarse(image)[0].amax(dim=1).sort().values.double()
        half = len(confidence) // 2
        # Midway between two images, so that rounding does not decide.
        middle = (confidence[half - 1] + confidence[half]) / 2 if half else confidence[0] + 0.01
        for threshold in (0.0, NO_EXIT, float(middle)):
            yield {"threshold": torch.tensor(threshold)}

    def metadata(self, run: Run) -> dict[str, str]:
        """As `ExportedGraph.metadata`, and `threshold`."""
        return super().metadata(run) | {"threshold": str(self.threshold)}


def with_early_exit(graph: ExportedGraph, images: LabelledImages, max_drop: float) -> EarlyExitGraph:
    """Add early exit to a graph, with the threshold that stops the most images.

    Args:
        graph: all scales.
        images: validation images.
        max_drop: allowed loss of accuracy on these images, in percentage points.

    Raises:
        ExportError: no threshold keeps the accuracy.
    """
    confidence, coarse_correct, full_correct = _answers(graph, images)
    threshold = choose_threshold(
        confidence, coarse_correct=coarse_correct, full_correct=full_correct, max_drop=max_drop
    )
    return EarlyExitGraph(graph, threshold).eval()


def _answers(graph: ExportedGraph, images: LabelledImages) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The confidence (n,) of scale 1, and whether scale 1 and all scales are right, (n,) bool each."""
    with torch.inference_mode():
        outputs = [graph(torch.from_numpy(batch))[:3] for batch in input_batches(images.squares, graph.options)]
    probabilities, _, scales = (torch.cat(values).numpy() for values in zip(*outputs, strict=True))
    coarse = scales[:, 0]
    return (coarse.max(axis=1), coarse.argmax(axis=1) == images.labels, probabilities.argmax(axis=1) == images.labels)


def cross_fitted_accuracy(graph: EarlyExitGraph, images: LabelledImages, max_drop: float) -> float:
    """The accuracy with early exit, where the threshold of each half of the images is chosen on the other half.

    Args:
        graph: with any threshold.
        images: the only held-out images there are.
        max_drop: as in `with_early_exit`.
    """
    full = ExportedGraph(graph.model, graph.fit, graph.options).eval()
    confidence, coarse_correct, full_correct = _answers(full, images)
    halves = [np.arange(len(confidence)) % 2 == number for number in range(2)]
    correct = np.zeros(len(confidence), bool)
    for chosen, reported in (halves, halves[::-1]):
        try:
            threshold = choose_threshold(
                confidence[chosen],
                coarse_correct=coarse_correct[chosen],
                full_correct=full_correct[chosen],
                max_drop=max_drop,
            )
        except ExportError:  # with no threshold, every image goes through all scales
            threshold = NO_EXIT
        stops = confidence[reported] >= threshold
        correct[reported] = np.where(stops, coarse_correct[reported], full_correct[reported])
    return float(correct.mean())


def choose_threshold(
    confidence: np.ndarray, *, coarse_correct: np.ndarray, full_correct: np.ndarray, max_drop: float
) -> float:
    """The threshold that stops the most images while the accuracy drops by at most `max_drop`.

    Images stop in order of confidence, as long as the accuracy over all images stays within the limit.

    Args:
        confidence: (n,) highest probability at scale 1, of n labelled images.
        coarse_correct: (n,) bool, whether scale 1 is right.
        full_correct: (n,) bool, whether all scales together are right.
        max_drop: in percentage points.

    Raises:
        ExportError: not even the most confident image may stop.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    following = np.pad(ranked[1:], (0, 1))
    # Correct answers lost if the first 1, 2, ..., n images stop.
    lost = np.cumsum(full_correct[order].astype(int) - coarse_correct[order].astype(int))
    allowed = np.logical_and.accumulate(100 * lost / len(confidence) <= max_drop + 1e-9)
    stops = np.flatnonzero(allowed & (ranked > following))  # images of equal confidence stop together or not at all
    if not len(stops):
        raise ExportError(
            f"--early-exit would cost more than {max_drop:g} points of accuracy on {len(confidence)} validation "
            "images: scale 1 is wrong even where it is most confident; no file was written",
            "a larger --max-drop, or export without --early-exit",
            failure=True,
        )
    return float((ranked[stops[-1]] + following[stops[-1]]) / 2)


def measure(graph: EarlyExitGraph, file: Path, images: LabelledImages) -> dict[str, Any]:
    """Measure speed and accuracy of a file with and without early exit, one image at a time.

    Returns:
        `threshold`, `images` and their `split`, `stopped` (images that stop after scale 1), `before` and `after`
        (accuracy without and with early exit), `times_faster`.
    """
    session, count = open_session(file), len(images.labels)
    modes: list[dict[str, np.ndarray]] = [{}, {"threshold": np.array(NO_EXIT, np.float32)}]  # with early exit, without
    labels, ran, seconds = np.zeros((2, count), int), np.zeros((2, count), int), np.zeros((2, count))
    for number in (0, *range(count)):  # the first image also warms up
        image = as_input(images.squares[number, None], raw=graph.options.raw)
        for mode, extra in enumerate(modes):
            start = time.perf_counter()
            (answer,), (ran[mode, number],) = session.run(["labels", "ran"], {"image": image, **extra})
            seconds[mode, number] = time.perf_counter() - start
            labels[mode, number] = answer[0]
    after, before = (labels == images.labels).mean(axis=1).tolist()
    after_seconds, before_seconds = seconds.sum(axis=1).tolist()
    return {
        "threshold": graph.threshold,
        "images": count,
        "split": images.split,
        "stopped": int((ran[0] == 1).sum()),
        "before": before,
        "after": after,
        "times_faster": before_seconds / after_seconds,
    }


def join(coarse: ir.Model, fine: ir.Model, threshold: float) -> ir.Model:
    """Merge the ONNX graphs of `CoarseGraph` and `FineGraph` into one; this consumes both."""
    graph, inner = coarse.graph, fine.graph
    for value in [*inner.initializers.values()]:
        del inner.initializers[str(value.name)]
        value.name = f"fine/{value.name}"
        graph.register_initializer(value)
    nodes = [*inner]
    for node in nodes:
        node.name = f"fine/{node.name}"
        for value in node.outputs:
            value.name = f"fine/{value.name}"
    fine_outputs = [*inner.outputs]
    inner.outputs.clear()
    inner.remove(nodes)

    by_name = {str(value.name): value for value in graph.outputs}
    (image,) = graph.inputs
    names = [name for name in by_name if name not in COARSE_OUTPUTS]
    coarse_outputs = [by_name[name] for name in names]
    for name, value in by_name.items():
        value.name = f"coarse/{name}"

    def constant(name: str, value: np.ndarray) -> ir.Value:
        initializer = ir.val(name, const_value=ir.tensor(value, name=name))
        graph.register_initializer(initializer)
        return initializer

    limit = constant("threshold", np.array(threshold, np.float32))
    graph.inputs.append(limit)  # with an initializer, which makes the input optional
    first = constant("early_exit/first", np.array([0], np.int64))
    second = constant("early_exit/second", np.array([1], np.int64))
    zero = constant("early_exit/zero", np.array(0, np.int64))
    outer = Tape()
    confidence = outer.op("ReduceMax", [by_name["probabilities"], second], {"keepdims": 0})
    uncertain = outer.op("NonZero", [outer.op("Less", [confidence, limit])])  # (1, K)
    rows = outer.op("Squeeze", [uncertain, first])  # (K,)
    any_uncertain = outer.op("Greater", [outer.op("Size", [rows]), zero])

    before = Tape()
    inputs = [image, *(by_name[name] for name in COARSE_OUTPUTS)]
    for inner_input, value in zip(inner.inputs, inputs, strict=True):
        replace_all_uses_with(inner_input, before.op("Gather", [value, rows], {"axis": 0}))
    after = Tape()
    index = after.op("Unsqueeze", [rows, second])  # (K, 1)
    merged = [
        after.op("ScatterND", [value, index, update])
        for value, update in zip(coarse_outputs, fine_outputs, strict=True)
    ]
    otherwise = Tape()
    unchanged = [otherwise.op("Identity", [value]) for value in coarse_outputs]
    refine = ir.Graph([], merged, nodes=[*before.nodes, *nodes, *after.nodes], name="refine")
    keep = ir.Graph([], unchanged, nodes=[*otherwise.nodes], name="keep")
    branches = {"then_branch": ir.AttrGraph("then_branch", refine), "else_branch": ir.AttrGraph("else_branch", keep)}
    outputs = [ir.Value(name=name, type=by_name[name].type, shape=by_name[name].shape) for name in names]
    branch = ir.Node("", "If", [any_uncertain], attributes=branches, outputs=outputs)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    graph.extend([*outer.nodes, branch])
    for number, node in enumerate([*outer.nodes, *before.nodes, *after.nodes, *otherwise.nodes]):
        node.outputs[0].name = f"early_exit/{number}"
    return coarse

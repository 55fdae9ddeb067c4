"""One graph that looks closer only where it must: images that scale 1 is sure of skip the finer scales.

The package is one ONNX file: the coarse graph, and inside an `If` the fine one, which runs on the unsure images of
a batch alone, and not at all where there are none. How sure is sure, a probability, is the graph's input
`threshold`, whose default was chosen on validation images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.tape import Tape
from torch import Tensor

from racnn_cli.core.model import RACNN, CoarseOutput
from racnn_cli.errors import RacnnError
from racnn_cli.export.graph import Deployed, Form, Inputs

NEVER = 2.0  # a threshold that no probability reaches: every image goes through all scales
NEEDED = ("logits", "descriptor", "proposal")  # what the fine graph takes from the coarse one


class Coarse(Deployed):
    """Scale 1 alone: an answer for every image, and what the fine graph needs of it."""

    @property
    def names(self) -> list[str]:
        """Of the outputs, in the order of `forward`."""
        return [*super().names, "ran", *NEEDED]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images to what `EarlyExit` gives for one that stops here, and to `NEEDED`."""
        model = self.model
        square, _, _ = self._square(self._float(image))
        _, logits, descriptor, proposal = model.coarse(model.normalise(square))
        assert proposal is not None
        probabilities = logits.softmax(dim=1)
        batch, finer = logits.shape[0], len(model.sizes) - 1
        nothing = probabilities.new_zeros(batch, finer, model.classes)
        answers = [
            probabilities,
            self._labels(probabilities),
            torch.cat([probabilities[:, None], nothing], dim=1),
            probabilities.new_zeros(batch, finer, 4),
        ]
        if self.form.crops:
            answers += [probabilities.new_zeros(batch, 3, size, size) for size in model.sizes[1:]]
        ran = torch.ones(batch, dtype=torch.int64, device=logits.device)
        return *answers, ran, logits, descriptor, proposal


class Fine(Deployed):
    """The other scales, from what scale 1 found."""

    @property
    def names(self) -> list[str]:
        """Of the outputs, in the order of `forward`."""
        return [*super().names, "ran"]

    def inputs(self) -> Inputs:
        """As `Deployed.inputs`."""
        inputs = super().inputs()
        image, axes = inputs["image"]
        model = self.model
        widths = (model.classes, model.scale(0).classifier.in_features, 3)
        for name, width in zip(NEEDED, widths, strict=True):
            inputs[name] = torch.zeros(len(image), width), {0: axes[0]}
        return inputs

    def forward(  # type: ignore[override]
        self, image: Tensor, logits: Tensor, descriptor: Tensor, proposal: Tensor
    ) -> tuple[Tensor, ...]:
        """Images and what `Coarse` found, to what `EarlyExit` gives for those that go on."""
        model = self.model
        image = self._float(image)
        square, left, top = self._square(image)
        source = model.normalise(square)
        coarse = CoarseOutput(model.first_view(source), logits, descriptor, proposal)
        output = model.refine(source, coarse)
        ran = torch.full((logits.shape[0],), len(model.sizes), dtype=torch.int64, device=logits.device)
        return *self._answer(output, image, square, left, top), ran


class EarlyExit(Deployed):
    """`Deployed` whose finer scales see only the images that scale 1 is not sure of; the reference of the graph.

    Args:
        model, fit, form: as in `Deployed`; the model has two scales or more.
        threshold: an image stops after scale 1 if the probability of its best class there is not below.
    """

    def __init__(self, model: RACNN, fit: str, form: Form, threshold: float) -> None:
        super().__init__(model, fit, form)
        self.threshold = threshold
        self.coarse, self.fine = Coarse(model, fit, form), Fine(model, fit, form)

    @property
    def names(self) -> list[str]:
        """Of the outputs, in the order of `forward`."""
        return self.fine.names

    def forward(self, image: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, ...]:
        """As `Deployed.forward`; of an image that stops early, the finer scales' rows, boxes and crops are 0.

        Args:
            image: as there.
            threshold: () instead of the one that was chosen.

        Returns:
            what it does there, and ran (B,) int64: how many scales each image went through, 1 or S.
        """
        limit = self.threshold if threshold is None else threshold
        *answers, logits, descriptor, proposal = self.coarse(image)
        unsure = (answers[0].amax(dim=1) < limit).nonzero()[:, 0]
        if len(unsure):
            closer = self.fine(image[unsure], logits[unsure], descriptor[unsure], proposal[unsure])
            pairs = zip(answers, closer, strict=True)
            answers = [one.index_copy(0, unsure, other) for one, other in pairs]
        return tuple(answers)

    def extra(self, image: Tensor) -> Iterator[dict[str, Tensor]]:
        """Thresholds that send none, all, and about half of the images to the finer scales."""
        sure = self.coarse(image)[0].amax(dim=1).sort().values.double()
        half = len(sure) // 2
        # Between two images, not at one: rounding must not decide.
        middle = (sure[half - 1] + sure[half]) / 2 if half else sure[0] + 0.01
        for value in (0.0, NEVER, float(middle)):
            yield {"threshold": torch.tensor(value)}


def choose(sure: np.ndarray, coarse: np.ndarray, fine: np.ndarray, max_drop: float) -> float:
    """The threshold that lets the most images stop early at no more than `max_drop`.

    From the surest image down, so long as the accuracy of all of them together stays within `max_drop`.

    Args:
        sure: (n,) the probability of scale 1's best class, of n labelled images.
        coarse, fine: (n,) bool, whether scale 1 and all scales are right.
        max_drop: points of accuracy.

    Raises:
        RacnnError: not even the surest image may stop.
    """
    order = np.argsort(-sure, kind="stable")
    lost = np.cumsum(fine[order].astype(int) - coarse[order].astype(int))  # if the first 1, 2, ... n stop
    kept = np.flatnonzero(100 * lost / len(sure) > max_drop + 1e-9)
    stop = int(kept[0]) if len(kept) else len(sure)
    # ImageDataset that are equally sure stop together or not at all.
    while 0 < stop < len(sure) and sure[order[stop - 1]] == sure[order[stop]]:
        stop -= 1
    if not stop:
        raise RacnnError(
            f"scale 1 is wrong where it is surest: with --early-exit the accuracy would drop by more than {max_drop:g} "
            f"points on {len(sure)} validation images; no file was written",
            "a larger --max-drop, or export without --early-exit",
            failure=True,
        )
    last = sure[order[stop - 1]]
    return float((last + (sure[order[stop]] if stop < len(sure) else 0.0)) / 2)


def join(coarse: ir.Model, fine: ir.Model, threshold: float) -> ir.Model:
    """The graphs of `Coarse` and `Fine` as the one of `EarlyExit`; both are used up."""
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
    closer = [*inner.outputs]
    inner.outputs.clear()
    inner.remove(nodes)

    found = {str(value.name): value for value in graph.outputs}
    (image,) = graph.inputs
    answers = [value for name, value in found.items() if name not in NEEDED]
    names = [str(value.name) for value in answers]
    for value in found.values():
        value.name = f"coarse/{value.name}"

    limit = ir.Value(
        name="threshold",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([]),
        const_value=ir.tensor(np.float32(threshold), name="threshold"),
    )
    graph.inputs.append(limit)  # an input with a value of its own: it may be left out
    graph.register_initializer(limit)

    constants = {
        name: ir.val(f"early_exit/{name}", const_value=ir.tensor(value, name=f"early_exit/{name}"))
        for name, value in (
            ("first", np.array([0], np.int64)),
            ("second", np.array([1], np.int64)),
            ("zero", np.array(0, np.int64)),
        )
    }
    for value in constants.values():
        graph.register_initializer(value)
    outer = Tape()
    sure = outer.op("ReduceMax", [found["probabilities"], constants["second"]], {"keepdims": 0})
    where = outer.op("NonZero", [outer.op("Less", [sure, limit])])  # (1, K)
    rows = outer.op("Squeeze", [where, constants["first"]])  # (K,)
    any_unsure = outer.op("Greater", [outer.op("Size", [rows]), constants["zero"]])

    before = Tape()
    for value, given in zip(inner.inputs, [image, *(found[name] for name in NEEDED)], strict=True):
        replace_all_uses_with(value, before.op("Gather", [given, rows], {"axis": 0}))
    after = Tape()
    index = after.op("Unsqueeze", [rows, constants["second"]])  # (K, 1)
    merged = [after.op("ScatterND", [one, index, other]) for one, other in zip(answers, closer, strict=True)]
    kept = Tape()
    same = [kept.op("Identity", [value]) for value in answers]
    choice = ir.Node(
        "",
        "If",
        [any_unsure],
        {
            "then_branch": ir.AttrGraph(
                "then_branch",
                ir.Graph([], merged, nodes=[*before.nodes, *nodes, *after.nodes], name="closer"),
            ),
            "else_branch": ir.AttrGraph(
                "else_branch", ir.Graph([], same, nodes=[*kept.nodes], name="as_it_is")
            ),
        },
        outputs=[
            ir.Value(name=name, type=value.type, shape=value.shape)
            for name, value in zip(names, answers, strict=True)
        ],
    )
    graph.outputs.clear()
    graph.outputs.extend(choice.outputs)
    graph.extend([*outer.nodes, choice])
    for number, node in enumerate([*outer.nodes, *before.nodes, *after.nodes, *kept.nodes]):
        node.outputs[0].name = f"early_exit/{number}"
    return coarse

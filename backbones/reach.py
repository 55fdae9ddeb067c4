"""Find the weights that a result depends on by walking the autograd graph; nothing is computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Operations on each token separately: a token that is cut off after them has no effect before them either.
TOKENWISE = {
    "AddBackward0",
    "AliasBackward0",
    "CatBackward0",
    "CloneBackward0",
    "MulBackward0",
    "NativeLayerNormBackward0",
    "SliceBackward0",
    "ToCopyBackward0",
}


def reached_weights(result: Tensor) -> set[Tensor]:
    """Return the leaf tensors that `result` depends on.

    A class token that is prepended and cut off again is in the graph, but its gradient is zero. The walk therefore
    tracks how many leading tokens are cut off later.
    """
    weights: set[Tensor] = set()
    visited: set[tuple[Any, int]] = set()
    stack: list[tuple[Any, int]] = [(result.grad_fn, 0)]
    while stack:
        node, cut = stack.pop()
        if node is None or (node, cut) in visited:
            continue
        visited.add((node, cut))
        if hasattr(node, "variable"):
            weights.add(node.variable)
        else:
            stack += _inputs(node, cut)
    return weights


def _inputs(node: Any, cut: int) -> list[tuple[Any, int]]:
    """The nodes that feed `node`, each with the number of its leading tokens that are cut off later."""
    kind = type(node).__name__
    inputs = [source for source, _ in node.next_functions]
    if kind not in TOKENWISE:
        return [(source, 0) for source in inputs]
    if kind == "SliceBackward0" and node._saved_dim == 1:
        return [(source, cut + node._saved_start) for source in inputs]
    if kind != "CatBackward0":
        return [(source, cut) for source in inputs]
    if not cut or node._saved_dim not in (1, -2 % 2**64):
        return [(source, 0) for source in inputs]
    needed = []
    for source in inputs:
        length = source._input_metadata[0].shape[1] if source is not None else cut
        if cut < length:
            needed.append((source, cut))
        cut = max(cut - length, 0)
    return needed

"""Which weights a result depends on, read from the graph that autograd keeps; nothing is computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Operations that treat every token by itself: what is not looked at behind them is not looked at before them.
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
    """The leaf tensors that `result` depends on.

    Autograd itself counts a class token as reached when it is only put in front of the other tokens and cut
    off again: its gradient is there, and all zeros. So the walk remembers how many leading tokens go later.
    """
    found: set[Tensor] = set()
    seen: set[tuple[Any, int]] = set()
    waiting: list[tuple[Any, int]] = [(result.grad_fn, 0)]
    while waiting:
        node, cut = waiting.pop()
        if node is None or (node, cut) in seen:
            continue
        seen.add((node, cut))
        if hasattr(node, "variable"):
            found.add(node.variable)
            continue
        waiting += _before(node, cut)
    return found


def _before(node: Any, cut: int) -> list[tuple[Any, int]]:
    """The nodes whose results go into `node`, and how many of their leading tokens are cut off later."""
    kind = type(node).__name__
    inputs = [other for other, _ in node.next_functions]
    if kind not in TOKENWISE:
        return [(other, 0) for other in inputs]
    if kind == "SliceBackward0" and node._saved_dim == 1:
        return [(other, cut + node._saved_start) for other in inputs]
    if kind != "CatBackward0" or not cut or node._saved_dim not in (1, -2 % 2**64):
        return [(other, cut if kind != "CatBackward0" else 0) for other in inputs]
    kept = []
    for other in inputs:
        length = other._input_metadata[0].shape[1] if other is not None else cut
        if cut < length:
            kept.append((other, cut))
        cut = max(cut - length, 0)
    return kept

"""Copy weights into a backbone: every tensor must match, and position tables are resampled."""

from __future__ import annotations

import math
import sys

import torch
from timm.layers import (
    resample_abs_pos_embed,
    resample_abs_pos_embed_nhwc,
    resize_rel_pos_bias_table,
    resize_rel_pos_bias_table_simple,
)
from torch import Tensor, nn

from racnn_cli.backbones.contract import Backbone
from racnn_cli.errors import BackboneError, SizeRefused

State = dict[str, Tensor]


def load(net: nn.Module, state: State, dropped: tuple[str, ...], where: str) -> None:
    """Fill every tensor of `net` from `state`.

    Args:
        net: the model.
        state: tensors by name.
        dropped: name prefixes of tensors in `state` that the model may lack.
        where: the origin of the weights, for messages.

    Raises:
        BackboneError: a tensor is missing, unknown or has another shape; the message lists them.
    """
    state, mismatches = _match(net, state, dropped)
    if mismatches:
        # timm can rename the tensors of older checkpoints and of other projects.
        state, remaining = _match(net, _rename(net, state), dropped)
        mismatches = min(remaining, mismatches, key=len)
    if mismatches:
        listed = mismatches[:12] + ([f"… and {len(mismatches) - 12} more"] if len(mismatches) > 12 else [])
        raise BackboneError(
            f"weights {where!r} do not fit the backbone, {len(mismatches)} tensor(s) differ:\n  " + "\n  ".join(listed),
            "use weights of exactly this model.backbone; only its classifier may be missing or different",
        )
    net.load_state_dict(state)


def _match(net: nn.Module, state: State, dropped: tuple[str, ...] = ()) -> tuple[State, list[str]]:
    """The state with the names and shapes of the model, and the mismatches."""
    target = net.state_dict()
    matched: State = {}
    mismatches = []
    for name, tensor in target.items():
        # Only BatchNorm without momentum uses this count, and old files lack it.
        source = state.get(name, tensor if name.endswith("num_batches_tracked") else None)
        if source is None:
            mismatches.append(f"{name}: missing")
        elif source.shape == tensor.shape:
            matched[name] = source
        elif (resampled := _resample(net, name, source, tensor)) is not None:
            matched[name] = resampled
        else:
            mismatches.append(f"{name}: shape {tuple(source.shape)}, needed {tuple(tensor.shape)}")
    mismatches += [f"{name}: unknown" for name in state if name not in target and not name.startswith(dropped)]
    return (state if mismatches else matched), mismatches


def _rename(net: nn.Module, state: State) -> State:
    """The state renamed by timm's function for this family of models; unchanged without one, or if it fails."""
    family = sys.modules[type(net).__module__]
    rename = getattr(family, "checkpoint_filter_fn", None) or getattr(family, "_filter_fn", None)
    try:
        return dict(rename(dict(state), net)) if rename else state
    except Exception:  # it expects names that the file does not have
        return state


def _resample(net: nn.Module, name: str, tensor: Tensor, target: Tensor) -> Tensor | None:
    """A table of positions resampled to another input size by timm; None if the tensor is not such a table."""
    leaf = name.rpartition(".")[2]
    resampled: Tensor | None = None
    if tensor.ndim != target.ndim:
        return None
    if leaf == "relative_position_bias_table":
        return _resample_relative(tensor, target)
    if leaf == "pos_embed" and tensor.ndim == 3 and tensor.shape[2] == target.shape[2]:
        prefix_tokens = int(getattr(getattr(net, "net", net), "num_prefix_tokens", 1))
        for prefix in (0, prefix_tokens):  # the model's own number takes precedence
            old, new = (math.isqrt(max(t.shape[1] - prefix, 0)) for t in (tensor, target))
            if old * old + prefix == tensor.shape[1] and new * new + prefix == target.shape[1]:
                resampled = resample_abs_pos_embed(tensor, [new, new], num_prefix_tokens=prefix)
    elif leaf == "pos_embed" and tensor.ndim == 4 and tensor.shape[3] == target.shape[3]:
        resampled = resample_abs_pos_embed_nhwc(tensor, list(target.shape[1:3]))
    elif leaf == "pos_embed" and tensor.ndim == 4 and tensor.shape[1] == target.shape[1]:
        channels_last = resample_abs_pos_embed_nhwc(tensor.permute(0, 2, 3, 1), list(target.shape[2:4]))
        resampled = channels_last.permute(0, 3, 1, 2)  # (1, h, w, C) -> (1, C, h, w)
    return resampled


def _resample_relative(tensor: Tensor, target: Tensor) -> Tensor | None:
    """Biases of a window: ((2w - 1)², heads), BEiT's with three more rows, or (heads, 2w - 1, 2w - 1)."""
    resampled: Tensor | None = None
    if tensor.ndim == 3 and tensor.shape[0] == target.shape[0]:
        window = ((target.shape[1] + 1) // 2, (target.shape[2] + 1) // 2)
        resampled = resize_rel_pos_bias_table_simple(tensor, window, tuple(target.shape))
    elif tensor.ndim == 2 and tensor.shape[1] == target.shape[1]:
        for extra in (0, 3):
            side = math.isqrt(max(target.shape[0] - extra, 0))
            if side * side + extra == target.shape[0]:  # true for one of the two at most
                window = ((side + 1) // 2, (side + 1) // 2)
                resampled = resize_rel_pos_bias_table(tensor, window, tuple(target.shape))
    return resampled


@torch.no_grad()
def copy_weights(source: Backbone, target: Backbone) -> None:
    """Copy weights and buffers from one scale's backbone to another's.

    The copy is exact where the shapes agree. Tables of positions are resampled where the input sizes differ.

    Raises:
        BackboneError: two different models.
        SizeRefused: a tensor depends on the input size and cannot be resampled.
    """
    if source.name != target.name:
        raise BackboneError(
            f"the weights of {source.name} do not fit {target.name}", "one model.backbone for all scales"
        )
    state, mismatches = _match(target, source.state_dict())
    if mismatches:
        raise SizeRefused(
            f"{source.name}: weights for {source.input_size} px do not fit {target.input_size} px: "
            + "; ".join(mismatches[:12]),
            "the same size for every scale in model.sizes",
        )
    target.load_state_dict(state)

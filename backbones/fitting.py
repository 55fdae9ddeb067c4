"""Weights into a backbone: every tensor is accounted for, and tables of positions are resampled."""

from __future__ import annotations

import math
import sys

import torch
from racnn_cli.backbones.contract import Backbone
from timm.layers import (
    resample_abs_pos_embed,
    resample_abs_pos_embed_nhwc,
    resize_rel_pos_bias_table,
    resize_rel_pos_bias_table_simple,
)
from torch import Tensor, nn

from racnn_cli.errors import RacnnError

State = dict[str, Tensor]


def load(net: nn.Module, state: State, dropped: tuple[str, ...], where: str) -> None:
    """Fill `net` with `state`, every tensor of it.

    Raises:
        RacnnError: a tensor of the model is missing, has another shape, or the file has one that the model
            does not have and that is not in `dropped`; they are listed.
    """
    state, errors = _match(net, state, dropped)
    if errors:
        # An older or another project's naming of the same model: timm knows how to rename most of them.
        translated = _translate(net, state)
        if translated is not None:
            state, errors_then = _match(net, translated, dropped)
            errors = errors_then if len(errors_then) < len(errors) else errors
    if errors:
        shown = errors[:12] + ([f"… and {len(errors) - 12} more"] if len(errors) > 12 else [])
        raise RacnnError(
            f"weights {where!r} do not fit the backbone, {len(errors)} tensor(s) differ:\n  "
            + "\n  ".join(shown),
            "weights of this very model.backbone; only its classifier may be missing or different",
        )
    net.load_state_dict(state)


def _match(net: nn.Module, state: State, dropped: tuple[str, ...]) -> tuple[State, list[str]]:
    """The state as the model names and shapes it, and what does not fit."""
    wanted = net.state_dict()
    fitted: State = {}
    errors = []
    for name, tensor in wanted.items():
        if name not in state:
            # Counts of batches only matter to BatchNorm without momentum, and old files lack them.
            if name.endswith("num_batches_tracked"):
                fitted[name] = tensor
            else:
                errors.append(f"{name}: missing")
            continue
        found = state[name] if state[name].shape == tensor.shape else resample(net, name, state[name], tensor)
        if found is None:
            errors.append(f"{name}: shape {tuple(state[name].shape)}, needed {tuple(tensor.shape)}")
        else:
            fitted[name] = found
    errors += [f"{name}: unknown" for name in state if name not in wanted and not name.startswith(dropped)]
    return (fitted if not errors else state), errors


def _translate(net: nn.Module, state: State) -> State | None:
    """timm's own renaming for this family of models, where there is one and it understands the file."""
    family = sys.modules[type(net).__module__]
    rename = getattr(family, "checkpoint_filter_fn", None) or getattr(family, "_filter_fn", None)
    if rename is None:
        return None
    try:
        return dict(rename(dict(state), net))
    except Exception:  # it looked for names that the file does not have
        return None


def resample(net: nn.Module, name: str, tensor: Tensor, wanted: Tensor) -> Tensor | None:
    """A table of positions resampled for another input size by timm's functions; None: not such a table."""
    leaf = name.rpartition(".")[2]
    if tensor.ndim != wanted.ndim:
        return None
    if leaf == "pos_embed" and tensor.ndim == 3 and tensor.shape[2] == wanted.shape[2]:
        for prefix in dict.fromkeys((int(getattr(net, "num_prefix_tokens", 1)), 0)):
            old, new = (math.isqrt(max(t.shape[1] - prefix, 0)) for t in (tensor, wanted))
            if old * old + prefix == tensor.shape[1] and new * new + prefix == wanted.shape[1]:
                return resample_abs_pos_embed(tensor, [new, new], num_prefix_tokens=prefix)
    elif leaf == "pos_embed" and tensor.ndim == 4 and tensor.shape[3] == wanted.shape[3]:
        return resample_abs_pos_embed_nhwc(tensor, list(wanted.shape[1:3]))
    elif leaf == "pos_embed" and tensor.ndim == 4 and tensor.shape[1] == wanted.shape[1]:
        moved = resample_abs_pos_embed_nhwc(tensor.permute(0, 2, 3, 1), list(wanted.shape[2:4]))
        return moved.permute(0, 3, 1, 2)  # (1, h, w, C) -> (1, C, h, w)
    elif leaf == "relative_position_bias_table":
        return _resample_relative(tensor, wanted)
    return None


def _resample_relative(tensor: Tensor, wanted: Tensor) -> Tensor | None:
    """Biases of one window: ((2w - 1)², heads), BEiT's with three rows more, or (heads, 2w - 1, 2w - 1)."""
    if tensor.ndim == 3 and tensor.shape[0] == wanted.shape[0]:
        window = ((wanted.shape[1] + 1) // 2, (wanted.shape[2] + 1) // 2)
        return resize_rel_pos_bias_table_simple(tensor, window, tuple(wanted.shape))
    if tensor.ndim == 2 and tensor.shape[1] == wanted.shape[1]:
        for extra in (0, 3):
            side = math.isqrt(max(wanted.shape[0] - extra, 0))
            if side * side + extra == wanted.shape[0]:
                window = ((side + 1) // 2, (side + 1) // 2)
                return resize_rel_pos_bias_table(tensor, window, tuple(wanted.shape))
    return None


@torch.no_grad()
def copy_weights(source: Backbone, target: Backbone) -> None:
    """Give one scale's weights and buffers to another scale.

    Bit for bit where the shapes agree; position embeddings are resampled where the input sizes differ.

    Raises:
        RacnnError: two different models, or a tensor that depends on the input size and cannot be resampled.
    """
    if source.name != target.name:
        raise RacnnError(
            f"the weights of {source.name} do not fit {target.name}", "one model.backbone for all scales"
        )
    inner = getattr(target, "net", target)
    given = source.state_dict()
    wanted = target.state_dict()
    moved: State = {}
    errors = []
    for name, tensor in wanted.items():
        found = given.get(name)
        if found is not None and found.shape != tensor.shape:
            found = resample(inner, name, found, tensor)
        if found is None:
            errors.append(name)
        else:
            moved[name] = found
    if errors or set(given) - set(wanted):
        raise RacnnError(
            f"{source.name}: weights for {source.input_size} px do not fit {target.input_size} px: "
            + ", ".join(errors[:6] + sorted(set(given) - set(wanted))[:6]),
            "the same size for every scale in model.sizes",
        )
    target.load_state_dict(moved)

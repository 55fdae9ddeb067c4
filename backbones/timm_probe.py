"""How a timm model becomes a backbone, found by running it on the meta device.

Shapes and the paths of gradients are real there and nothing is computed: the layout, the size of the map,
whether the model has trained layers behind its map, and which of its weights no descriptor would ever reach.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import timm
import torch
from racnn_cli.backbones.reach import reached_weights
from racnn_cli.backbones.timm_model import Plan, TimmBackbone, create
from timm.layers import PatchEmbed
from torch import Tensor, nn

from racnn_cli.errors import RacnnError

GUESSES = 8  # sizes that are tried when a model refuses one


@functools.lru_cache(maxsize=64)
def plan(name: str, size: int) -> Plan:
    """Find out how the model becomes a backbone for images of side `size`; nothing is computed.

    Raises:
        RacnnError: the model refuses the size (sizes near it that it takes are named), its features are no
            square map, or it has weights that no descriptor of one map reaches.
    """
    error = _try(name, size)
    if isinstance(error, Plan):
        return error
    taken = [] if isinstance(error, RacnnError) else _sizes_near(name, size)
    if taken:
        nearest = min(taken, key=lambda other: abs(other - size))
        raise RacnnError(
            f"{name} does not take images of {size} px; near it, it takes {_join(taken)} px",
            f"{nearest} instead of {size} in model.sizes, or no model.sizes for the model's own size",
        )
    raise RacnnError(f"{name} cannot be a backbone: {_reason(error)}", "another model.backbone")


def _try(name: str, size: int) -> Plan | Exception:
    """The plan, or why there is none; models that want to be told their size are told."""
    told: list[tuple[tuple[str, Any], ...]] = [()]
    config = timm.get_pretrained_cfg(name)
    if config and tuple(config.input_size) != (3, size, size):
        told = [(("img_size", size),), ()]
    error: Exception = RacnnError("")
    for options in told:
        try:
            return _probe(Plan(name, size, options))
        except RacnnError as refusal:  # not a matter of size
            return refusal
        except TypeError as unknown:
            if "unexpected keyword" not in str(unknown):
                error = unknown
        except Exception as refusal:  # timm's models refuse with whatever their first failing line raises
            error = refusal
    return error


def _probe(draft: Plan) -> Plan:
    with torch.device("meta"):
        net = create(draft.name, draft.options).eval()
        images = torch.zeros(2, 3, draft.size, draft.size)
    stem = next((module for module in net.modules() if isinstance(module, PatchEmbed)), None)
    if stem and draft.size % stem.patch_size[0]:
        # timm would leave the last rows and columns out in silence, and a box would no longer mean its place.
        raise ValueError(f"not a multiple of its patches of {stem.patch_size[0]} px")
    raw = net.forward_features(images)
    if not isinstance(raw, Tensor) or raw.ndim not in (3, 4):
        raise RacnnError("its features are not one map")
    channels = int(net.num_features)
    if raw.ndim == 3:
        prefix, side = _token_map(net, raw)
        draft = replace(draft, layout="NLC", prefix=prefix, channels=raw.shape[2], map_size=(side, side))
    elif getattr(net, "output_fmt", "NCHW") == "NHWC" or (
        raw.shape[1] != channels and raw.shape[3] == channels
    ):
        draft = replace(draft, layout="NHWC", channels=raw.shape[3], map_size=(raw.shape[1], raw.shape[2]))
    else:
        draft = replace(draft, channels=raw.shape[1], map_size=(raw.shape[2], raw.shape[3]))
    found = [_measure(draft, own_head) for own_head in (False, True)]
    # The plain pool, unless the model's own head reaches weights that the pool does not.
    return _prune(min((pair for pair in found if pair), key=lambda pair: len(pair[1])))


def _token_map(net: nn.Module, tokens: Tensor) -> tuple[int, int]:
    """How many tokens stand in front of the map's, and the map's side."""
    length = tokens.shape[1]
    known = getattr(net, "num_prefix_tokens", None)
    for prefix in (0, 1) if known is None else (int(known),):  # older models have one class token or none
        side = math.isqrt(length - prefix)
        if side > 1 and side * side == length - prefix:
            return prefix, side
    raise RacnnError(f"its features are {length} token(s), which are no square map")


def _measure(draft: Plan, own_head: bool) -> tuple[Plan, tuple[str, ...]] | None:
    """The plan with this head, and the parameters that it does not reach."""
    with torch.device("meta"):
        net = create(draft.name, draft.options).eval()
        images = torch.zeros(2, 3, draft.size, draft.size)
    draft = replace(draft, own_head=own_head)
    model = TimmBackbone(net, draft)
    try:
        descriptor = model.descriptor(model(images))
    except Exception:
        if own_head:
            return None  # timm models without a head of the usual form
        raise
    if descriptor.ndim != 2:
        return None
    reached = reached_weights(descriptor)
    unused = tuple(
        name for name, weight in net.named_parameters() if weight.requires_grad and weight not in reached
    )
    return replace(draft, width=descriptor.shape[1]), unused


def _prune(found: tuple[Plan, tuple[str, ...]]) -> Plan:
    """The plan with the unreached weights taken out, in modules as large as possible."""
    draft, unused = found
    if not unused:
        return draft
    with torch.device("meta"):
        net = create(draft.name, draft.options)
    draft = replace(draft, unused=tuple(_largest(net, frozenset(unused))))
    try:
        again = _measure(draft, draft.own_head)
    except Exception:
        again = None
    if again is None or again[1]:
        raise RacnnError(
            f"its {_join(unused[:3])}{' …' if len(unused) > 3 else ''} cannot be reached from its map"
        )
    return draft


def _largest(module: nn.Module, unused: frozenset[str], path: str = "") -> list[str]:
    """Names of the largest modules, or else single parameters, that hold nothing but unused weights."""
    found = [path + name for name, _ in module.named_parameters(recurse=False) if path + name in unused]
    for name, child in module.named_children():
        inside = [f"{path}{name}.{inner}" for inner, _ in child.named_parameters()]
        if inside and unused.issuperset(inside):
            found.append(path + name)
        else:
            found += _largest(child, unused, f"{path}{name}.")
    return found


def _sizes_near(name: str, size: int) -> list[int]:
    """Sizes that the model takes: its own and the nearest ones, at most four."""
    config = timm.get_pretrained_cfg(name)
    own = config.input_size[-1] if config else 224
    steps = (own, own // 7, own // 8, 64, 32, 14)
    near = {step * (size // step + more) for step in steps if step >= 8 for more in (0, 1)} - {0, size}
    tried = [own, *sorted(near - {own}, key=lambda other: abs(other - size))[:GUESSES]]
    return sorted([side for side in dict.fromkeys(tried) if isinstance(_try(name, side), Plan)][:4])


def _reason(error: Exception) -> str:
    if isinstance(error, RacnnError):
        return error.message
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _join(parts: Iterable[object]) -> str:
    texts = [str(part) for part in parts]
    return ", ".join(texts[:-1]) + " or " + texts[-1] if len(texts) > 1 else texts[0]

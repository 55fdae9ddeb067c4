"""Find out how to turn a timm model into a backbone, by running it on the meta device.

Shapes and the autograd graph are real there, and nothing is computed. They give the layout, the size of the map,
whether the model has trained layers after its map, and which of its weights never affect the descriptor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from racnn_cli.backbones.reach import reached_weights
from racnn_cli.backbones.timm_model import Plan, TimmBackbone, create
from racnn_cli.errors import BackboneError, SizeRefused

GUESSES = 8  # sizes to try when a model refuses one
FILLS = {"uniform_", "normal_", "erfinv_", "clamp_", "mul_", "add_", "fill_", "zero_"}  # what initializers call


class _WithoutValues(TorchFunctionMode):
    """Skip what initializers do to weights on the meta device: no value changes, but it takes half of a probe."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and getattr(func, "__name__", "") in FILLS and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=64)
def plan(name: str, size: int) -> Plan:
    """Find out how to turn the model into a backbone for images of side `size`.

    Raises:
        SizeRefused: the model does not take this size; the message names sizes that it takes.
        BackboneError: its features are not one square map, or it has weights that no descriptor of one map reaches.
    """
    result = _try(name, size)
    if isinstance(result, Plan):
        return result
    accepted = [] if isinstance(result, BackboneError) else _sizes_near(name, size)
    if accepted:
        nearest = min(accepted, key=lambda side: abs(side - size))
        raise SizeRefused(
            f"{name} does not take images of {size} px; sizes near it that it takes: {_join(accepted)} px",
            f"{nearest} instead of {size} in model.sizes, or no model.sizes for the model's native size",
        )
    reason = result.message if isinstance(result, BackboneError) else str(result).strip()
    reason = (reason or type(result).__name__).splitlines()[0]
    raise BackboneError(f"{name} cannot be a backbone: {reason}", "another model.backbone")


def _try(name: str, size: int) -> Plan | Exception:
    """The plan, or why there is none."""
    attempts: list[tuple[tuple[str, Any], ...]] = [()]
    config = timm.get_pretrained_cfg(name)
    if config and tuple(config.input_size) != (3, size, size):
        attempts = [(("img_size", size),), ()]  # not every model has this option
    failure: Exception = BackboneError("")
    for options in attempts:
        try:
            return _probe(Plan(name, size, options))
        except BackboneError as error:  # independent of the size
            return error
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                failure = error
        except Exception as error:  # a size that does not fit can raise anything
            failure = error
    return failure


def _meta(draft: Plan) -> tuple[Any, Tensor]:
    """The model and a batch of images on the meta device."""
    with torch.device("meta"), _WithoutValues():
        return create(draft.name, draft.options).eval(), torch.zeros(2, 3, draft.size, draft.size)


def _probe(draft: Plan) -> Plan:
    net, images = _meta(draft)
    stem = next((module for module in net.modules() if isinstance(module, PatchEmbed)), None)
    if stem and draft.size % stem.patch_size[0]:
        # timm would silently drop the last rows and columns, and boxes would no longer match the image.
        raise ValueError(f"not a multiple of its patch size of {stem.patch_size[0]} px")
    features = net.forward_features(images)
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise BackboneError("its features are not one map")
    shape = features.shape
    channels = int(net.num_features)
    if len(shape) == 3:
        prefix, side = _token_map(net, shape[1])
        draft = replace(draft, layout="NLC", prefix=prefix, channels=shape[2], map_size=(side, side))
    elif getattr(net, "output_fmt", "NCHW") == "NHWC" or (shape[1] != channels and shape[3] == channels):
        draft = replace(draft, layout="NHWC", channels=shape[3], map_size=(shape[1], shape[2]))
    else:
        draft = replace(draft, channels=shape[1], map_size=(shape[2], shape[3]))
    results = [_measure(draft, own_head) for own_head in (False, True)]
    # The plain pool, unless the model's own head reaches weights that the pool does not.
    return _prune(*min((result for result in results if result), key=lambda result: len(result[1])))


def _token_map(net: nn.Module, length: int) -> tuple[int, int]:
    """The number of prefix tokens among `length` tokens, and the side of the map."""
    known = getattr(net, "num_prefix_tokens", None)
    for prefix in (0, 1) if known is None else (int(known),):  # older models have one class token or none
        side = math.isqrt(length - prefix)
        if side > 1 and side * side == length - prefix:
            return prefix, side
    raise BackboneError(f"its features are {length} token(s), which do not form a square map")


def _measure(draft: Plan, own_head: bool) -> tuple[Plan, tuple[str, ...]] | None:
    """The plan with this head, and the parameters that it does not reach; None if the head does not work."""
    net, images = _meta(draft)
    draft = replace(draft, own_head=own_head)
    model = TimmBackbone(net, draft)
    try:
        descriptor = model.descriptor(model(images))
    except Exception:
        if own_head:
            return None
        raise
    if descriptor.ndim != 2:
        return None
    reached = reached_weights(descriptor)
    unused = tuple(name for name, weight in net.named_parameters() if weight.requires_grad and weight not in reached)
    return replace(draft, width=descriptor.shape[1]), unused


def _prune(draft: Plan, unused: tuple[str, ...]) -> Plan:
    """The plan that removes the unreached weights, in modules as large as possible."""
    if not unused:
        return draft
    draft = replace(draft, unused=tuple(_largest(_meta(draft)[0], frozenset(unused))))
    try:
        pruned = _measure(draft, draft.own_head)
    except Exception:
        pruned = None
    if pruned is None or pruned[1]:
        raise BackboneError(f"its {_join(unused[:3])}{' …' if len(unused) > 3 else ''} cannot be reached from its map")
    return draft


def _largest(module: nn.Module, unused: frozenset[str], path: str = "") -> list[str]:
    """Names of the largest modules, or else single parameters, that hold only unused weights."""
    names = [path + name for name, _ in module.named_parameters(recurse=False) if path + name in unused]
    for name, child in module.named_children():
        inside = [f"{path}{name}.{inner}" for inner, _ in child.named_parameters()]
        if inside and unused.issuperset(inside):
            names.append(path + name)
        else:
            names += _largest(child, unused, f"{path}{name}.")
    return names


def _sizes_near(name: str, size: int) -> list[int]:
    """Sizes that the model takes: its native size and the nearest others, at most four."""
    config = timm.get_pretrained_cfg(name)
    native = config.input_size[-1] if config else 224
    steps = (native, native // 7, native // 8, 64, 32, 14)
    near = {step * (size // step + more) for step in steps if step >= 8 for more in (0, 1)} - {0, size}
    candidates = [native, *sorted(near - {native}, key=lambda side: abs(side - size))[:GUESSES]]
    return sorted([side for side in candidates if isinstance(_try(name, side), Plan)][:4])


def _join(parts: Iterable[object]) -> str:
    texts = [str(part) for part in parts]
    return ", ".join(texts[:-1]) + " or " + texts[-1] if len(texts) > 1 else texts[0]

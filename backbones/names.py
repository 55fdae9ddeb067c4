"""Names of backbones: VGG and timm's models, with their native input sizes."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass

import timm

from racnn_cli.backbones import small as _small  # noqa: F401  (registers itself with timm)
from racnn_cli.backbones import vgg
from racnn_cli.errors import BackboneError

# Two feature maps of different sizes instead of one.
_UNUSABLE = ("crossvit_",)


@dataclass(frozen=True)
class ModelInfo:
    """A backbone, as far as it is known without building it.

    Attributes:
        name: the name that `build` takes.
        size: native input side in pixels.
        fixed: whether timm's configuration calls that size fixed, None if it has none. Many such models can still be
            built for another size; `build` finds out.
    """

    name: str
    size: int
    fixed: bool | None


def list_models(pattern: str = "") -> list[ModelInfo]:
    """List the usable backbones without building any: VGG, then timm's models by name.

    Args:
        pattern: a glob such as `resnet*`, or a part of the name; case does not matter; empty: all models.
    """
    pattern = pattern.lower()
    if not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    models = [ModelInfo(name, vgg.SIZE, False) for name in vgg.NAMES]
    for name in timm.list_models():
        height, width, fixed = _timm_size(name)
        if name not in vgg.NAMES and height == width and not name.startswith(_UNUSABLE):
            models.append(ModelInfo(name, width, fixed))
    return [model for model in models if fnmatch.fnmatchcase(model.name.lower(), pattern)]


def native_sizes(name: str, scales: int) -> tuple[int, ...]:
    """Return the default input side of each scale: the paper's for VGG, otherwise the model's own.

    Raises:
        BackboneError: no such model, or its images are not square.
    """
    check(name)
    if vgg.is_vgg(name):
        return (vgg.SIZE, *[vgg.SIZE // 2] * (scales - 1))
    height, width, _ = _timm_size(name)
    if height != width:
        raise BackboneError(
            f"{name} is made for images of {height}×{width} px; every scale is a square",
            "explicit sizes in model.sizes, or another model.backbone",
        )
    return (width,) * scales


def _timm_size(name: str) -> tuple[int, int, bool | None]:
    """Native height and width, and whether they are fixed."""
    config = timm.get_pretrained_cfg(name)
    return (*config.input_size[1:], config.fixed_input_size) if config else (224, 224, None)


def suggestions(name: str) -> list[str]:
    """Return at most five existing names close to a misspelled one, best first."""
    base, dot, _ = name.partition(".")
    if dot and timm.is_model(base):  # the model exists, the tag of its weights does not
        return difflib.get_close_matches(name, timm.list_pretrained(f"{base}.*"), n=5, cutoff=0.0)
    known = [*vgg.NAMES, *(model for model in timm.list_models() if model not in vgg.NAMES)]
    return difflib.get_close_matches(base.lower(), known, n=5, cutoff=0.6)


def check(name: str) -> None:
    """Raise a BackboneError unless a backbone has this name."""
    base, dot, _ = name.partition(".")
    if timm.is_model(base) and ":" not in name and (not dot or name in timm.list_pretrained(f"{base}.*")):
        return
    plain = name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")
    if plain != name and timm.is_model(plain.partition(".")[0]):
        raise BackboneError(
            f"there is no backbone {name!r}: timm's models on the hub have a shorter name here",
            f"--backbone {plain} --pretrained",
        )
    near = suggestions(name)
    raise BackboneError(
        f"there is no backbone {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
        "model.backbone is vgg11, vgg13, vgg16 or vgg19 (with or without _bn), or the name of a timm model",
    )

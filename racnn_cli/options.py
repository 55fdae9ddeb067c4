"""Options that several commands share, each declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Argument, Option

from racnn_cli import recipe as recipes
from racnn_cli.errors import RecipeError


def complete_recipe(incomplete: str) -> list[str]:
    return [name for name in recipes.names() if name.startswith(incomplete)]


def _complete_key(incomplete: str) -> list[str]:
    return [f"{key}=" for key in recipes.key_names() if key.startswith(incomplete)]


RecipeName = Annotated[
    str | None, Argument(help="recipe or TOML file; default: VGG-19, 448/224/224 px", autocompletion=complete_recipe)
]
RunFolder = Annotated[Path | None, Option("--run", help="run folder; default: the newest run")]
Sets = Annotated[
    list[str] | None,
    Option("--set", help="override a recipe value: key=value; repeatable", autocompletion=_complete_key),
]
Quick = Annotated[bool, Option("--quick", help="try every stage with few images and few epochs")]
SkipBad = Annotated[bool, Option("--skip-bad", help="skip unreadable files and count them")]


@dataclass(frozen=True)
class RunOptions:
    """Options of every training command."""

    data: Annotated[str | None, Option(help="folder with one folder per class, CSV file, or built-in data set")] = None
    out: Annotated[Path | None, Option(help="folder of a new run; default: runs/NAME")] = None
    sets: Sets = None
    scales: Annotated[int | None, Option(min=1, max=5, help="number of scales; 1: plain backbone")] = None
    seed: Annotated[int | None, Option(min=0, help="random seed of split, weights and training")] = None
    skip_bad: SkipBad = False
    run: RunFolder = None

    def changes(self) -> dict[str, Any]:
        """The recipe values that the options set; --set has the lowest precedence."""
        values = {
            "data.path": self.data,
            "model.scales": self.scales,
            "seed": self.seed,
            "data.skip_bad": self.skip_bad or None,
        }
        return recipes.parse_sets(self.sets or ()) | _without_none(values)


@dataclass(frozen=True)
class NewRunOptions(RunOptions):
    """Options of the commands that can start a run."""

    backbone: Annotated[str | None, Option(help="VGG or timm model; see `racnn backbones`")] = None
    weights: Annotated[str | None, Option(help="none, pretrained, .safetensors or .pth file, or package:NAME")] = None
    pretrained: Annotated[bool, Option("--pretrained", help="download ImageNet weights from timm's hub")] = False
    quick: Quick = False

    def changes(self) -> dict[str, Any]:
        weights = select("--weights", self.weights, {"pretrained": self.pretrained})
        values = {"model.backbone": self.backbone, "model.weights": weights, "quick": self.quick or None}
        return super().changes() | _without_none(values)

    def starts_run(self) -> bool:
        """Whether the options start a new run without RECIPE."""
        return self.run is None and any((self.data, self.backbone, self.weights, self.pretrained))


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def select(option: str, value: str | None, short_forms: dict[str, bool]) -> Any:
    """The value of an option that also has short forms, such as `--format onnx` and `--onnx`."""
    flags = {name: f"--{name}" for name, used in short_forms.items() if used}
    if value is not None:
        flags[value] = f"{option} {value}"
    if len(flags) > 1:
        raise RecipeError(f"{' and '.join(flags.values())} contradict each other", "give one of them")
    return next(iter(flags), None)


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the argument `options`, a dataclass, by one command-line option per field."""
    hints = get_type_hints(command, include_extras=True)
    group = hints.pop("options")
    hints |= get_type_hints(group, include_extras=True)
    own, grouped = inspect.signature(command).parameters, inspect.signature(group).parameters
    parameters = [
        parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
        for name, parameter in {**own, **grouped}.items()
        if name != "options"
    ]

    @wraps(command)
    def expanded(**values: Any) -> None:
        options = group(**{name: values.pop(name) for name in grouped})
        command(**values, options=options)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded

"""The recipe: all settings of a training run, as one validated, frozen value.

A recipe is a TOML file. `load` reads one, a file or a built-in one, and applies overrides such as `--set key=value`.
`dump` writes it back with every value, so that a run can be repeated from that file alone.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

import racnn_cli
from racnn_cli.errors import RecipeError, describe_missing, did_you_mean

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

RECIPES = next(
    folder for root in racnn_cli.__path__ if (folder := Path(root) / "recipes").is_dir() and any(folder.glob("*.toml"))
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Sizes = Annotated[
    tuple[Annotated[int, Field(ge=16, le=4096)], ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
Range = Annotated[tuple[float, ...], BeforeValidator(lambda v: tuple(map(float, v)) if isinstance(v, list) else v)]


class Section(BaseModel):
    """Strict (no silent conversion), frozen (immutable) and closed (unknown keys are errors)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=True)


class Augment(Section):
    """Random augmentation of training images; validation and test images are never augmented."""

    scale: float = Field(0.6, gt=0.0, le=1.0, description="smallest share of the image's area that a random crop keeps")
    flip: Literal["none", "horizontal", "both"] = Field("horizontal", description="random mirroring")
    rotate: float = Field(10.0, ge=0.0, le=180.0, description="largest rotation in degrees")
    color: Share = Field(0.2, description="strength of brightness, contrast and color changes")
    erase: Share = Field(0.0, description="share of the images in which a random rectangle is replaced by noise")


class Sample(Section):
    """Size of the drawn data sets `fieldguide` and `clutter`."""

    images: int = Field(480, ge=24, le=100_000, description="number of images in all splits together")
    size: int = Field(256, ge=64, le=4096, description="side of an image in pixels")
    distance: int = Field(
        1, ge=1, le=16, description="clutter: objects are n times smaller, among n² times as many fragments"
    )


class Data(Section):
    """Where the images come from and how each becomes a square source image."""

    path: str = Field("", description="folder with one folder per class, CSV file, or name of a built-in data set")
    source: int = Field(
        0,
        ge=0,
        le=8192,
        description="side in pixels of the square source of all crops; 0: chosen from the files and the views",
    )
    fit: Literal["crop", "pad", "squash"] = Field(
        "crop", description="how an image becomes square: center crop, gray borders, or stretched"
    )
    range: Range = Field(
        (),
        description="values of images with more than 8 bits that become black and white, such as [0, 4095]; empty: "
        "the smallest common range that holds the values of all images",
    )
    val: float = Field(
        0.15, gt=0.0, lt=0.9, description="share of the images for validation, if the data have no val split"
    )
    test: float = Field(
        0.2, ge=0.0, lt=0.9, description="share of the images for testing, if the data have no test split"
    )
    limit: int = Field(0, ge=0, description="largest number of images per class and split; 0: no limit")
    images: int = Field(
        0, ge=0, description="largest number of images per split, with at least one of each class; 0: no limit"
    )
    workers: int = Field(0, ge=0, le=256, description="processes that load images; 0: load in the training process")
    skip_bad: bool = Field(False, description="skip unreadable files instead of stopping")
    allow_duplicates: bool = Field(False, description="train although more than 1 % of the test images are in train")
    augment: Augment = Augment()
    sample: Sample = Sample()

    @model_validator(mode="after")
    def _range_rises(self) -> Data:
        if self.range and (len(self.range) != 2 or not self.range[0] < self.range[1]):
            raise ValueError(f"data.range = {list(self.range)} must be two numbers that rise, or empty")
        return self


class Model(Section):
    """The network: one backbone per scale and an attention proposal network (APN) between two scales."""

    backbone: str = Field("vgg19", description="vgg11/13/16/19 with or without _bn, or any timm model")
    weights: str = Field(
        description="none (random), pretrained (timm's hub), a .safetensors or .pth file, or package:NAME"
    )
    scales: int = Field(3, ge=1, le=5, description="number of scales; 1: the plain backbone")
    sizes: Sizes = Field((), description="input side of each scale in pixels; empty: the backbone's native size")
    zoom: Literal["source", "nested"] = Field(
        "source", description="cut each crop from the source image, or from the previous crop (the paper)"
    )
    floor: Fraction = Field(1 / 3, description="smallest side of a box, as a share of the previous scale's side")
    ceiling: Fraction = Field(0.95, description="largest side of a box, as a share of the previous scale's side")
    side: Fraction = Field(
        0.5, description="side of the box that an untrained APN proposes and that pretrain-apn targets"
    )
    apn_hidden: int = Field(16, ge=1, le=65536, description="output channels of the APN's first layer")
    k: Positive = Field(0.5, description="steepness of the boxcar mask per pixel of the cropped image; inf: hard edge")
    gradient: Literal["exact", "boxcar", "bilinear", "none"] = Field(
        "exact",
        description="gradient of the crop with respect to the box: "
        "mask and sampling positions, mask only, positions only, or none",
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout before each classifier")
    drop_path: float = Field(
        0.0, ge=0.0, lt=1.0, description="largest probability of skipping a residual branch (stochastic depth)"
    )
    fuse: Literal["head", "weights", "both"] = Field(
        "head",
        description="how the scales' answers are fused: a layer over their descriptors (the paper), a weighted mean of "
        "their probabilities, or both",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.sizes and len(self.sizes) != self.scales:
            raise ValueError(
                f"model.sizes has {len(self.sizes)} entries for model.scales = {self.scales}; give one size per scale"
            )
        if not self.floor <= self.side <= self.ceiling or self.floor == self.ceiling:
            raise ValueError(
                f"model.floor = {self.floor:.3g}, model.side = {self.side:.3g} and model.ceiling = {self.ceiling:.3g} "
                "must rise in this order"
            )
        return self


class Train(Section):
    """Settings shared by all stages."""

    batch: int = Field(16, ge=1, le=65536, description="images per step and process")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are added up for one update")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="optimizer of all stages")
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="momentum, sgd only")
    weight_decay: float = Field(0.01, ge=0.0, description="weight decay")
    schedule: Literal["cosine", "step", "constant"] = Field(
        "cosine", description="learning rate schedule within each stage or phase"
    )
    span: Literal["phase", "stage"] = Field(
        "phase", description="what the schedule covers in alternate: each phase, or the phases of all rounds together"
    )
    layer_decay: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="factor of the learning rate from one layer of a backbone to the one below it; 1: the same rate",
    )
    step_epochs: int = Field(
        30, ge=1, description="schedule step only: epochs between two divisions of the learning rate by 10"
    )
    warmup: Share = Field(0.1, description="share of a stage's or phase's updates during which the learning rate rises")
    clip: float = Field(1.0, ge=0.0, description="largest gradient norm; 0: no clipping")
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="label smoothing of every classification loss")
    ema: float = Field(0.0, ge=0.0, lt=1.0, description="decay of the moving average of the weights; 0: no average")
    batchnorm: Literal["train", "frozen", "synced"] = Field(
        "train",
        description="frozen: keep the statistics of the initial weights; "
        "synced: statistics over the images of all processes",
    )
    save_steps: int = Field(0, ge=0, description="updates between two checkpoints within an epoch; 0: none")
    save_minutes: float = Field(10.0, ge=0.0, description="minutes between two checkpoints within an epoch; 0: none")
    keep: int = Field(1, ge=1, description="older checkpoints to keep in case the newest is damaged")
    amp: bool = Field(True, description="bfloat16 autocast on CUDA")
    channels_last: bool = Field(True, description="channels-last memory format")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="auto: CUDA if there is a GPU, else MPS, else the CPU"
    )


class PretrainCnn(Section):
    """Stage 1: fine-tune scale 1."""

    epochs: int = Field(10, ge=1, le=100_000, description="epochs of pretrain-cnn")
    lr: Positive = Field(3e-4, description="learning rate of the backbone")
    head_lr: Positive = Field(10.0, description="learning rate of the classifier, as a multiple of lr")
    patience: int = Field(
        0, ge=0, description="stop after n epochs that are not better on the validation split; 0: never"
    )


class PretrainApn(Section):
    """Stage 2: train the APNs to propose the square around the strongest response."""

    epochs: int = Field(
        5, ge=0, le=100_000, description="epochs of pretrain-apn; 0: the boxes start at the image's center"
    )
    lr: Positive = Field(3e-3, description="learning rate of the APNs")


class Alternate(Section):
    """Stage 3: rounds of an APN phase (not in the first round) and a CNN phase."""

    rounds: int = Field(
        5,
        ge=1,
        le=10_000,
        description="largest number of rounds, each an APN phase (not in the first round) and a CNN phase",
    )
    cnn_epochs: int = Field(2, ge=1, description="epochs of a CNN phase")
    first_epochs: int = Field(
        0, ge=0, description="epochs of the first CNN phase; 0: cnn_epochs, or what ramp makes of it"
    )
    ramp: bool | Literal["auto"] = Field(
        "auto",
        description="start with short rounds so that the boxes move early: CNN phase r has at most r epochs; "
        "auto: with random weights only, because pretrained finer CNNs need a long first phase",
    )
    apn_epochs: int = Field(1, ge=0, description="epochs of an APN phase; 0: keep the boxes of pretrain-apn")
    cnn_lr: Positive = Field(1e-4, description="learning rate of the CNN phases")
    apn_lr: Positive = Field(5e-3, description="learning rate of the APN phases")
    margin: Share = Field(0.05, description="margin of the pairwise rank loss")
    apn_gradient: Literal["perturb", "backprop"] = Field(
        "perturb",
        description="gradient of the rank loss in a box: from perturbed boxes, or through the crop (the paper)",
    )
    boxes: int = Field(4, ge=2, le=1024, multiple_of=2, description="perturb only: perturbed boxes per proposal")
    spread: float = Field(
        0.2,
        gt=0.0,
        le=1.0,
        description="perturb only: size of a perturbation of center and side, as a share of the side",
    )
    jitter: Share = Field(0.2, description="CNN phase: random shift and log-scale of the boxes, as a share of the box")
    tighten: float = Field(
        0.2, ge=0.0, le=2.0, description="CNN phase: boxes are randomly shrunk by a factor down to exp(-tighten)"
    )
    settle: bool = Field(True, description="reduce jitter and tighten each round, to 0 in the last round of several")
    patience: int = Field(2, ge=1, description="stop after n rounds without change")
    tolerance: float = Field(
        0.01, ge=0.0, description="smallest relative change of a validation loss that counts as change"
    )

    def cnn_epochs_of(self, round_: int) -> int:
        """CNN epochs of a round, counted from 0."""
        if round_ == 0 and self.first_epochs:
            return self.first_epochs
        return min(round_ + 1, self.cnn_epochs) if self.ramp is True else self.cnn_epochs

    def cnn_epochs_in(self, rounds: int) -> int:
        """CNN epochs of the first n rounds together."""
        return sum(map(self.cnn_epochs_of, range(rounds)))


class Fusion(Section):
    """The last stage: train the fusion head on the descriptors of all scales."""

    epochs: int = Field(5, ge=1, le=100_000, description="epochs of the fusion head")
    lr: Positive = Field(1e-3, description="learning rate of the fusion head")


class Recipe(Section):
    """All settings of a training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        "run", description="name of the recipe, and of the run's folder in runs/"
    )
    about: str = Field("", description="purpose of the recipe in one sentence")
    seed: int = Field(0, ge=0, lt=2**31, description="random seed of the split, the initial weights and the training")
    quick: bool = Field(False, description="try every stage with few images and few epochs")
    baseline: bool = Field(False, description="also train the plain backbone with the same budget")
    onnx: bool = Field(False, description="export the trained network at the end of `racnn train`")
    data: Data = Data()
    model: Model
    train: Train = Train()
    pretrain_cnn: PretrainCnn = PretrainCnn()
    pretrain_apn: PretrainApn = PretrainApn()
    alternate: Alternate = Alternate()
    fusion: Fusion = Fusion()

    @model_validator(mode="after")
    def _trainable(self) -> Recipe:
        if self.model.scales > 1 and self.alternate.apn_epochs and self.alternate.apn_gradient == "backprop":
            if self.model.gradient == "none":
                raise ValueError(
                    "model.gradient = none gives the APNs no gradient to learn from; set alternate.apn_epochs = 0 or "
                    "alternate.apn_gradient = perturb"
                )
            if self.model.gradient == "boxcar" and self.model.k == float("inf"):
                raise ValueError(
                    "model.gradient = boxcar needs a finite model.k: the APNs learn through the mask's edge"
                )
        return self

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced, validated as a whole.

        Raises:
            RecipeError: an unknown key or an invalid value.
        """
        tree = _to_tree(self)
        for key, value in changes.items():
            _assign(tree, key, value)
        return _validate(tree, "the recipe")

    def as_used(self) -> Recipe:
        """The recipe with the values that `quick` stands for."""
        if not self.quick:
            return self
        return self.override(
            {
                "data.images": min(self.data.images or 48, 48),
                "pretrain_cnn.epochs": min(self.pretrain_cnn.epochs, 2),
                "pretrain_apn.epochs": min(self.pretrain_apn.epochs, 1),
                "alternate.rounds": min(self.alternate.rounds, 2),
                "alternate.cnn_epochs": 1,
                "alternate.first_epochs": 0,
                "alternate.apn_epochs": min(self.alternate.apn_epochs, 1),
                "fusion.epochs": min(self.fusion.epochs, 1),
            }
        )


class KeyInfo(NamedTuple):
    """A recipe key: its dotted name, default as TOML (empty if required), allowed values, and description."""

    key: str
    default: str
    allowed: str
    description: str


def names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def find(name: str) -> Path:
    """The file of a recipe: a path to a TOML file, or the name of a built-in recipe.

    Raises:
        RecipeError: no such recipe.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if path.is_file():
            return path
        raise RecipeError(
            f"recipe not found: {describe_missing(path)}", "`racnn recipes ls` lists the built-in recipes"
        )
    built_in = RECIPES / f"{name}.toml"
    if "/" not in name and "\\" not in name and built_in.is_file():
        return built_in
    raise RecipeError(
        f"unknown recipe {name!r}{did_you_mean(name, names())}",
        f"one of {', '.join(names())}, or the path of a .toml file",
    )


def load(name: str | None = None, sets: Iterable[str] = (), changes: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe and override some of its values.

    Args:
        name: a built-in recipe, or the path of a TOML file; None: the defaults of the schema, named after the data.
        sets: overrides as `key=value`.
        changes: overrides as dotted keys to values; they take precedence over `sets`.

    Raises:
        RecipeError: no such recipe, invalid TOML, unknown keys or invalid values; the message lists all of them.
    """
    changes = {**parse_sets(sets), **(changes or {})}
    tree: dict[str, Any] = {"name": _name_after(str(changes.get("data.path", ""))), "model": {}}
    where = "the default recipe"
    if name is not None:
        path = find(name)
        tree, where = _read(path), str(path)
        tree.setdefault("name", path.stem)
    for key, value in changes.items():
        _assign(tree, key, value)
    sizes = tree["model"].get("sizes") if isinstance(tree.get("model"), dict) else None
    scales = changes.get("model.scales")
    if isinstance(scales, int) and "model.sizes" not in changes and isinstance(sizes, list) and sizes:
        # Fewer scales drop the finest sizes; more scales repeat the finest one.
        scales = max(scales, 1)
        tree["model"]["sizes"] = [*sizes, *[sizes[-1]] * scales][:scales]
    return _validate(tree, where)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}", "fix that line") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from None


def _name_after(data: str) -> str:
    """A run name made from the last part of a data path."""
    stem = os.path.splitext(os.path.basename(os.path.abspath(data)))[0] if data else ""
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-")[:64] or "run"


def parse_sets(sets: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` strings, such as `train.lr=1e-3`. A value that is not TOML is a plain string.

    Raises:
        RecipeError: no key or no equals sign.
    """
    changes: dict[str, Any] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {text}: expected key=value", "--set train.batch=8")
        try:
            changes[key.strip()] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = value
    return changes


def _to_tree(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump()
    tree["model"]["sizes"] = list(tree["model"]["sizes"])
    tree["data"]["range"] = list(tree["data"]["range"])
    return tree


def dump(recipe: Recipe) -> str:
    """The recipe as TOML with every value."""
    return tomli_w.dumps(_to_tree(recipe))


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def key_names() -> list[str]:
    """Every dotted key of the schema, in order."""
    return [key for key, _ in _fields(Recipe)]


def describe_keys(pattern: str = "") -> list[KeyInfo]:
    """Default, allowed values and description of recipe keys.

    Args:
        pattern: part of a key, such as `lr`, or a shell pattern, such as `model.*`; empty: all keys.
    """
    pattern = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    return [
        KeyInfo(key, default=_default(field), allowed=_allowed(field), description=field.description or "")
        for key, field in _fields(Recipe)
        if fnmatchcase(key, pattern)
    ]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()


def _allowed(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(get_args(field.annotation))
    if field.annotation is bool:
        return "true, false"
    kinds: dict[object, str] = {int: "integer", float: "number", str: "text"}
    items = "numbers" if get_args(field.annotation)[:1] == (float,) else "integers"
    kind = kinds.get(field.annotation, f"list of {items}")
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
    bounds = [
        f"{sign} {getattr(constraint, name):.12g}"
        for constraint in field.metadata
        for name, sign in signs.items()
        if getattr(constraint, name, None) is not None
    ]
    return ", ".join([kind, *bounds])


def _suggest(key: str) -> str:
    known = key_names()
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"; did you mean {' or '.join(same_leaf[:4])}?" if same_leaf else did_you_mean(key, known, cutoff=0.7)


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    if key not in key_names():
        raise RecipeError(f"unknown recipe key {key!r}{_suggest(key)}", "`racnn recipes keys` lists all keys")
    *path, leaf = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise RecipeError(
                f"{part!r} in the recipe must be a table, found {tree!r}", f"write [{part}] in the recipe"
            )
    tree[leaf] = value


def _validate(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False)]
        hint = "fix the recipe, or override the value with --set KEY=VALUE"
        if any(line.startswith("model.weights: missing") for line in lines):
            hint = (
                "--pretrained for ImageNet weights from timm's hub, --weights FILE or package:NAME, or --weights none "
                "for random weights. The recipe `own` is a small network with weights that also trains on a CPU"
            )
        raise RecipeError(f"{where} has {len(lines)} error(s):\n  " + "\n  ".join(lines), hint) from None


def _explain(detail: ErrorDetails) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggest(key)}"
    if detail["type"] == "missing":
        description = dict(_fields(Recipe))[key].description if key in key_names() else "a required table"
        return f"{key}: missing; {description}"
    value = "" if isinstance(detail["input"], dict) else f" (found {detail['input']!r})"
    return f"{key or 'recipe'}: {detail['msg'].removeprefix('Value error, ')}{value}"

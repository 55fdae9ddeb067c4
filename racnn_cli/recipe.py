"""The recipe: everything that a training run is made of, as one validated, frozen value.

A recipe is a TOML file. `load` reads one (a file, or the name of one in `recipes/`), applies
`--set key=value` and returns a `Recipe`; `dump` writes it back with every value as used, so that a run can
be repeated from that file alone. Every key is described here, beside its default.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

import racnn_cli
from racnn_cli.errors import RacnnError, describe_missing, did_you_mean

RECIPES = next(
    folder
    for root in racnn_cli.__path__
    if (folder := Path(root) / "recipes").is_dir() and any(folder.glob("*.toml"))
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Sizes = Annotated[
    tuple[Annotated[int, Field(ge=16, le=4096)], ...],
    BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v),
]


class Section(BaseModel):
    """Strict (no silent conversion), frozen (a recipe never changes), closed (an unknown key is an error)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=True)


class Augment(Section):
    """How a training image is varied; a validation or test image never is."""

    scale: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.6, description="smallest share of the image's area that a random crop keeps"
    )
    flip: Literal["none", "horizontal", "both"] = Field("horizontal", description="mirror images allowed")
    rotate: Annotated[float, Field(ge=0.0, le=180.0)] = Field(
        10.0, description="largest rotation, in degrees"
    )
    color: Share = Field(0.2, description="strength of brightness, contrast and colour changes")


class Sample(Section):
    """Only for the drawn data sets, `fieldguide` and `clutter`."""

    images: Annotated[int, Field(ge=24, le=100_000)] = Field(
        480, description="number of images, all splits together"
    )
    size: Annotated[int, Field(ge=64, le=4096)] = Field(256, description="side of an image in pixels")
    distance: Annotated[int, Field(ge=1, le=16)] = Field(
        1, description="clutter: so many times smaller on the canvas, among its square times the fragments"
    )


class Data(Section):
    """Where the images come from and how a file becomes a square source image."""

    path: str = Field(
        "", description="a folder with one folder a class, a CSV file, or plankton or fieldguide"
    )
    source: Annotated[int, Field(ge=0, le=8192)] = Field(
        0,
        description="side in pixels of the square source that all scales are cut from; 0: the first scale's size",
    )
    fit: Literal["crop", "pad", "squash"] = Field(
        "crop",
        description="how an image becomes square: centre crop, grey borders, or stretched",
    )
    val: Annotated[float, Field(gt=0.0, lt=0.9)] = Field(
        0.15, description="share held out for choosing, where the data names no val split"
    )
    test: Annotated[float, Field(ge=0.0, lt=0.9)] = Field(
        0.2, description="share held out for the final figures, where the data names no test split"
    )
    limit: Annotated[int, Field(ge=0)] = Field(
        0, description="at most so many images a class and split; 0: all"
    )
    workers: Annotated[int, Field(ge=0, le=256)] = Field(0, description="processes that read images; 0: none")
    skip_bad: bool = Field(False, description="go on without unreadable files instead of stopping")
    augment: Augment = Augment()
    sample: Sample = Sample()


class Model(Section):
    """The network: one backbone a scale, an attention proposal network (APN) between two scales."""

    backbone: str = Field("vgg19", description="vgg11/13/16/19 with or without _bn, or any timm model")
    weights: str = Field(
        description="none, pretrained (timm's hub), a .safetensors or .pth file, or package:NAME"
    )
    scales: Annotated[int, Field(ge=1, le=5)] = Field(3, description="1 is the plain backbone")
    sizes: Sizes = Field((), description="input side of each scale in pixels; empty: the backbone's own")
    zoom: Literal["source", "nested"] = Field(
        "source",
        description="cut a finer crop from the source image, or from the crop before it (the paper)",
    )
    floor: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        1 / 3, description="smallest side of a box, as a share of the previous scale's side"
    )
    ceiling: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.95, description="largest side of a box, as a share of the previous scale's side"
    )
    side: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="side of the square that an untrained APN proposes and that pretrain-apn aims at"
    )
    apn_hidden: Annotated[int, Field(ge=1, le=65536)] = Field(
        16, description="number of maps that the APN's first layer makes"
    )
    k: Annotated[float, Field(gt=0.0)] = Field(
        0.5, description="steepness of the boxcar mask per pixel of the cropped image; inf: no soft edge"
    )
    gradient: Literal["exact", "boxcar", "bilinear", "none"] = Field(
        "exact",
        description="what of the crop a box learns through: mask and positions, mask, positions, nothing",
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="dropout before each classifier"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.sizes and len(self.sizes) != self.scales:
            raise ValueError(
                f"model.sizes has {len(self.sizes)} entries for model.scales = {self.scales}; give one size a scale"
            )
        if not self.floor <= self.side <= self.ceiling or self.floor == self.ceiling:
            raise ValueError(
                f"model.floor = {self.floor:.3g}, model.side = {self.side:.3g} and model.ceiling = {self.ceiling:.3g} "
                "must rise in this order"
            )
        return self


class Train(Section):
    """What all stages share."""

    batch: Annotated[int, Field(ge=1, le=65536)] = Field(16, description="images a step on each process")
    accumulate: Annotated[int, Field(ge=1)] = Field(1, description="batches whose gradients make one update")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="only for sgd")
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    schedule: Literal["cosine", "step", "constant"] = Field(
        "cosine", description="within each stage or phase"
    )
    step_epochs: Annotated[int, Field(ge=1)] = Field(
        30, description="only for step: ×0.1 after so many epochs"
    )
    warmup: Share = Field(0.1, description="share of a phase's updates during which the learning rate rises")
    clip: Annotated[float, Field(ge=0.0)] = Field(1.0, description="largest gradient norm; 0: not clipped")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="of every classification loss"
    )
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="decay of averaged weights; 0: none"
    )
    batchnorm: Literal["train", "frozen", "synced"] = Field(
        "train",
        description="frozen: keep the statistics of the weights that training started from; "
        "synced: normalise over the images of all processes, not over each one's own",
    )
    save_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="write a checkpoint after so many updates, besides the end of each epoch; 0: do not"
    )
    save_minutes: Annotated[float, Field(ge=0.0)] = Field(
        10.0, description="and whenever so many minutes have passed since the last one; 0: do not"
    )
    keep: Annotated[int, Field(ge=1)] = Field(
        1, description="checkpoints that are kept besides the newest, in case that it is damaged"
    )
    amp: bool = Field(True, description="bfloat16 autocast on CUDA")
    channels_last: bool = True
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


class Phase(Section):
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 1
    lr: Positive = 1e-3


class PretrainCnn(Phase):
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    lr: Positive = 3e-4
    head_lr: Positive = Field(10.0, description="learning rate of the classifier, as a multiple of lr")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="stop after so many epochs without a better validation loss; 0: never"
    )


class PretrainApn(Phase):
    epochs: Annotated[int, Field(ge=0, le=100_000)] = Field(
        5, description="0: the boxes start in the image's centre"
    )
    lr: Positive = 3e-3


class Alternate(Section):
    rounds: Annotated[int, Field(ge=1, le=10_000)] = Field(
        5, description="at most so many rounds of CNN and APN phase"
    )
    cnn_epochs: Annotated[int, Field(ge=1)] = 2
    ramp: bool = Field(
        True,
        description="short rounds first, so that the boxes move early: CNN phase r has at most r epochs",
    )
    apn_epochs: Annotated[int, Field(ge=0)] = Field(
        1, description="0: the boxes stay as pretrain-apn left them"
    )
    cnn_lr: Positive = 1e-4
    apn_lr: Positive = 5e-3
    margin: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.05, description="of the pairwise rank loss")
    apn_gradient: Literal["perturb", "backprop"] = Field(
        "perturb",
        description="slope of the rank loss in a box: from boxes tried around it, or through the crop (the paper)",
    )
    boxes: Annotated[int, Field(ge=2, le=1024, multiple_of=2)] = Field(
        4, description="only for perturb: boxes that are tried around each proposal"
    )
    spread: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.2, description="only for perturb: how far off they are, as a share of the side and of its logarithm"
    )
    jitter: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.2, description="random shift and log-scale of the boxes in the CNN phase, as a share of the box"
    )
    tighten: Annotated[float, Field(ge=0.0, le=2.0)] = Field(
        0.2, description="how much smaller still boxes are drawn there, up to a factor of exp(-tighten)"
    )
    settle: bool = Field(
        True,
        description="let jitter and tighten fall, round by round, to nothing in the last of several `rounds`",
    )
    patience: Annotated[int, Field(ge=1)] = Field(2, description="rounds without change before the end")
    tolerance: Annotated[float, Field(ge=0.0)] = Field(
        0.01, description="relative change that counts as change"
    )

    def cnn_epochs_of(self, round_: int) -> int:
        """CNN epochs of a round, counted from 0."""
        return min(round_ + 1, self.cnn_epochs) if self.ramp else self.cnn_epochs

    def cnn_epochs_in(self, rounds: int) -> int:
        """CNN epochs of the first so many rounds together."""
        return sum(map(self.cnn_epochs_of, range(rounds)))


class Fusion(Phase):
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 5
    lr: Positive = 1e-3


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "run"
    about: str = Field("", description="what the recipe is for, in one sentence")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    quick: bool = Field(False, description="the whole way on a small share of the data with few epochs")
    baseline: bool = Field(False, description="train the plain backbone too, under the same budget")
    onnx: bool = Field(False, description="export the trained network at the end of `racnn train`")
    data: Data = Data()
    model: Model
    train: Train = Train()
    pretrain_cnn: PretrainCnn = PretrainCnn()
    pretrain_apn: PretrainApn = PretrainApn()
    alternate: Alternate = Alternate()
    fusion: Fusion = Fusion()

    @model_validator(mode="after")
    def _learnable(self) -> Recipe:
        if self.model.scales > 1 and self.alternate.apn_epochs and self.alternate.apn_gradient == "backprop":
            if self.model.gradient == "none":
                raise ValueError(
                    "model.gradient = none leaves the APNs nothing to learn from; alternate.apn_epochs = 0, or "
                    "alternate.apn_gradient = perturb"
                )
            if self.model.gradient == "boxcar" and self.model.k == float("inf"):
                raise ValueError(
                    "model.gradient = boxcar needs a finite model.k: the mask is all that it learns from"
                )
        return self

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced, validated as a whole."""
        tree = to_tree(self)
        for key, value in changes.items():
            _assign(tree, key, value)
        return _validate(tree, "the recipe")

    def as_used(self) -> Recipe:
        """The recipe as it will run: `quick` is spelt out in the values that it stands for."""
        if not self.quick:
            return self
        return self.override(
            {
                "data.limit": min(self.data.limit or 12, 12),
                "pretrain_cnn.epochs": min(self.pretrain_cnn.epochs, 2),
                "pretrain_apn.epochs": min(self.pretrain_apn.epochs, 2),
                "alternate.rounds": 1,
                "alternate.cnn_epochs": 1,
                "alternate.apn_epochs": min(self.alternate.apn_epochs, 1),
                "fusion.epochs": min(self.fusion.epochs, 2),
            }
        )


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def find(name: str) -> Path:
    """The file of a recipe: a path to a TOML file, or the name of one in `recipes/`.

    Raises:
        RacnnError: there is no such recipe.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if path.is_file():
            return path
        raise RacnnError(
            f"there is no recipe file: {describe_missing(path)}",
            "`racnn recipes ls` lists the recipes that come along",
        )
    shipped = RECIPES / f"{name}.toml"
    if "/" not in name and "\\" not in name and shipped.is_file():
        return shipped
    raise RacnnError(
        f"there is no recipe {name!r}{did_you_mean(name, names())}",
        f"one of {', '.join(names())}, or the path of a file that ends in .toml",
    )


def load(name: str, sets: Iterable[str] = (), changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by name or path, then apply `key=value` texts and already typed changes.

    Raises:
        RacnnError: no such recipe, not TOML, an unknown key or a value out of its range; all errors at once.
    """
    path = find(name)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RacnnError(f"{path}: not a TOML file: {error}", "fix the line that is named") from None
    except OSError as error:
        raise RacnnError(
            f"{path} cannot be read: {error.strerror}", "check the path and its rights"
        ) from None
    tree.setdefault("name", path.stem)
    changes = {**parse_sets(sets), **(changes or {})}
    for key, value in changes.items():
        _assign(tree, key, value)
    sizes = tree["model"].get("sizes") if isinstance(tree.get("model"), dict) else None
    if (
        "model.scales" in changes
        and "model.sizes" not in changes
        and isinstance(sizes, list)
        and sizes
        and isinstance(changes["model.scales"], int)
    ):
        # Fewer scales drop the finest ones; more see what the finest one sees.
        wanted = max(changes["model.scales"], 1)
        tree["model"]["sizes"] = [*sizes, *[sizes[-1]] * wanted][:wanted]
    return _validate(tree, str(path))


def parse_sets(sets: Iterable[str]) -> dict[str, Any]:
    """`["train.lr=1e-3", "data.path=birds"]` to typed values: TOML where it parses, else a plain string."""
    changes: dict[str, Any] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RacnnError(f"--set {text}: not of the form key=value", "--set train.batch=8")
        try:
            changes[key.strip()] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = value
    return changes


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts of TOML values."""
    tree = recipe.model_dump()
    tree["model"]["sizes"] = list(tree["model"]["sizes"])
    return tree


def dump(recipe: Recipe) -> str:
    """The recipe as TOML text with every value as used."""
    return tomli_w.dumps(to_tree(recipe))


def key_names(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, in its order."""
    found: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += key_names(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def suggest(key: str) -> str:
    """`did you mean …?` for a key that does not exist; empty when nothing is near."""
    known = key_names()
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = same_leaf or difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(near[:4])}?" if near else ""


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    if key not in key_names():
        raise RacnnError(
            f"there is no recipe key {key!r}{suggest(key)}", "`racnn recipes show NAME` prints all keys"
        )
    *path, leaf = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise RacnnError(
                f"the recipe's {part!r} must be a table, found {tree!r}", f"write [{part}] in the recipe"
            )
    tree[leaf] = value


def _validate(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(error) for error in error.errors(include_url=False)]
        hint = "fix the recipe, or give the value with --set KEY=VALUE"
        if any("model.weights" in line for line in lines):
            hint = (
                "--weights none to start from random weights, --pretrained for timm's hub, or --weights FILE"
            )
        raise RacnnError(f"{where} has {len(lines)} error(s):\n  " + "\n  ".join(lines), hint) from None


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key{suggest(key)}"
    if error["type"] == "missing":
        return f"{key}: missing; {_describe(key)}"
    found = "" if isinstance(error["input"], dict) else f" (found {error['input']!r})"
    return f"{key or 'recipe'}: {error['msg'].removeprefix('Value error, ')}{found}"


def _describe(key: str) -> str:
    section: type[BaseModel] = Recipe
    *path, leaf = key.split(".")
    for part in path:
        kind = section.model_fields[part].annotation
        assert isinstance(kind, type)
        section = kind
    return section.model_fields[leaf].description or "this table is needed"

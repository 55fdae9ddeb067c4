"""`racnn export`: a trained network as one ONNX file, or as a folder that `racnn_cli.load` reads."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from torch import Tensor

import racnn_cli
from racnn_cli.core import store
from racnn_cli.data.index import Item, build_index
from racnn_cli.data.listing import pictures_in
from racnn_cli.data.square import load_source
from racnn_cli.errors import RacnnError
from racnn_cli.recipe import Recipe
from racnn_cli.results import compress
from racnn_cli.results.compress import Precision
from racnn_cli.results.deployed import Deployed, Form
from racnn_cli.results.onnx_network import as_input, open_session
from racnn_cli.run import Run, write_atomic, write_json, write_text

OPSET = 20  # version of the ONNX operator set, unless another is asked for
BATCHES = (1, 2, 7)  # sizes that a file is checked with
MAX_DROP = 0.5  # points of accuracy that a smaller file may cost
LARGER = 1.5  # and the second size of the pictures, in sides of the source that the network was trained on
TOLERANCE = 1e-3  # in probabilities, and in boxes as a share of the picture's side
CROPS_TOLERANCE = 1e-2  # a sharp edge in a crop moves with the box's rounding
HINT = "another model.backbone, or `racnn export --safetensors --out FOLDER`"
LARGEST = 2**31 - 2**20  # bytes that one protobuf message can hold


def export_onnx(
    run: Run,
    path: Path | None = None,
    *,
    form: Form | None = None,
    opset: int = OPSET,
    precision: Precision = "float32",
    max_drop: float = MAX_DROP,
) -> dict[str, Any]:
    """Write the network as ONNX, and check it against PyTorch before the file gets its name.

    The graph takes pictures of any size, any number at a time, and makes them square itself; what goes in and
    comes out is told by `Deployed`. Weights above protobuf's 2 GiB lie beside it, in `NAME.HASH.data`.
    Metadata: `classes` (JSON list), `source` (side that the network was trained on), `sizes`, `fit`, `mean`,
    `std`, `layout` (NCHW or NHWC), `racnn`, `recipe` (TOML), `recipe_sha256`.

    Args:
        run: a run whose network has weights.
        path: the file; None: model.onnx in the run folder.
        form: of input and outputs.
        opset: 18 or 20.
        precision: `half` and `int8` make the backbones smaller once the graph in float32 has passed.
        max_drop: how many points of accuracy on the validation split that may cost.

    Returns:
        `path`, `bytes`, `opset`, `inputs` and `outputs` (name to shape), `seconds`, what `compare` gives, and
        with another precision `compressed`: `precision`, `before` and `after` (accuracy), `images`,
        `bytes_before`, `times_faster`.

    Raises:
        RacnnError: no weights; the network cannot be exported; ONNX Runtime disagrees with PyTorch; the run's
            pictures are gone, or the accuracy drops too far.
    """
    path, start = path or run.onnx, time.perf_counter()
    network, _ = store.load(run.folder)
    recipe = run.recipe()
    deployed = Deployed(network, recipe.data.fit, form or Form()).eval()
    program = to_onnx(deployed, opset)
    program.metadata_props.update(metadata(run, deployed))
    pictures = Pictures(recipe, run.classes(), network.source)
    checked: dict[str, Any] = {}

    def verify(file: Path) -> None:
        validate(file)
        checked.update(compare(deployed, file, pictures))
        if precision != "float32":
            checked["compressed"] = _compress(run, deployed, file, precision, max_drop)

    size = save(program, path, verify)
    return {
        "path": str(path),
        "bytes": size,
        "opset": opset,
        "inputs": {str(value.name): _shape(value) for value in program.graph.inputs},
        "outputs": {str(value.name): _shape(value) for value in program.graph.outputs},
        **checked,
        "seconds": time.perf_counter() - start,
    }


def _compress(
    run: Run, deployed: Deployed, file: Path, precision: Precision, max_drop: float
) -> dict[str, Any]:
    """Put a smaller graph in the place of one in float32 that has passed, if it is good enough."""
    recipe, side = run.recipe(), deployed.model.source
    index = build_index(recipe.data, seed=recipe.seed, classes=run.classes(), verify=())

    def squares(items: Sequence[Item]) -> np.ndarray:
        return np.stack([load_source(item.path, recipe.data.fit, side)[0] for item in items])

    held_out = index.splits["val"]
    judged, labels = squares(held_out), np.array([item.label for item in held_out])
    smaller = file.with_suffix(".smaller.onnx")
    try:
        if precision == "half":
            compress.to_half(file, smaller)
        else:
            train = index.splits["train"]
            some = train[:: math.ceil(len(train) / compress.CALIBRATION)]
            compress.to_int8(file, smaller, squares(some), deployed.form)
        before, after = open_session(file), open_session(smaller)
        image = next(compress.batches(judged[:4], deployed.form))
        found: dict[str, Any] = {
            "precision": precision,
            "before": compress.accuracy(before, judged, labels, deployed.form),
            "after": compress.accuracy(after, judged, labels, deployed.form),
            "images": len(held_out),
            "bytes_before": file.stat().st_size,
            "times_faster": compress.times_faster(before, after, image),
        }
        drop = 100 * (found["before"] - found["after"])
        if drop > max_drop + 1e-9:
            raise RacnnError(
                f"{precision} costs {drop:.1f} points of accuracy on {len(held_out)} validation pictures "
                f"({found['before']:.3f} to {found['after']:.3f}); {max_drop:g} are allowed, and no file was written",
                f"--max-drop {math.ceil(10 * drop - 1e-6) / 10:g}, or export without --{precision}",
                failure=True,
            )
        os.replace(smaller, file)
    finally:
        smaller.unlink(missing_ok=True)
    return found


def check(run: Run, path: Path | None, folder: Path) -> dict[str, Any]:
    """Hold a file that was exported before against its run, on the pictures of a folder.

    Returns:
        `path` and what `compare` gives.

    Raises:
        RacnnError: the file is missing, was made from another recipe, or answers otherwise.
    """
    path = path or run.onnx
    session = open_session(path)
    network, _ = store.load(run.folder)
    recipe = run.recipe()
    told = session.get_modelmeta().custom_metadata_map
    if told.get("recipe_sha256") != _fingerprint(run):
        raise RacnnError(
            f"{path} was not exported from {run.folder}: its recipe is another one",
            "name its own run with --run",
        )
    if not {"layout", "top"} <= told.keys():
        raise RacnnError(
            f"{path} was exported by another version of racnn ({told.get('racnn', 'unknown')})",
            "export it again, with `racnn export --onnx`",
        )
    names = {value.name for value in session.get_outputs()}
    form = Form(told["layout"] == "NHWC", int(told["top"]), any(name.startswith("crop_") for name in names))
    deployed = Deployed(network, recipe.data.fit, form).eval()
    pictures = Pictures(recipe, run.classes(), network.source, pictures_in(folder))
    return {"path": str(path)} | compare(deployed, path, pictures)


def describe(report: Mapping[str, Any]) -> str:
    """What `export_onnx` or `check` did, in a few lines for a person."""

    def shapes(values: Mapping[str, list[str | int]]) -> str:
        return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in values.items())

    lines = []
    if "bytes" in report:
        lines += [
            f"wrote {report['path']}: {report['bytes'] / 2**20:.1f} MiB, opset {report['opset']}",
            f"  in: {shapes(report['inputs'])}",
            f"  out: {shapes(report['outputs'])}",
        ]
    sizes = " and ".join(f"{side}×{side}" for side in report["sides"])
    same, count = report["agreement"]
    worst = ", ".join(f"{name} {gap:.1e}" for name, gap in report["max_difference"].items())
    lines += [
        f"  checked in ONNX Runtime against PyTorch on {report['checked_on']} of {sizes} px, "
        f"{', '.join(map(str, report['batches']))} at a time",
        f"  same class on {same} of {count}; largest differences: {worst}",
    ]
    if smaller := report.get("compressed"):
        lines += [
            f"  {smaller['precision']}: {smaller['bytes_before'] / 2**20:.1f} MiB before, "
            f"{smaller['times_faster']:.2f} × as fast on this machine, accuracy {smaller['before']:.3f} before and "
            f"{smaller['after']:.3f} after on {smaller['images']} validation pictures"
        ]
    return "\n".join(lines)


class Pictures:
    """What an exported file is tried with.

    Args:
        recipe, classes: of the run.
        side: of the source that the network was trained on.
        files: pictures to use; None: the run's validation split, or noise where that is gone.
    """

    def __init__(
        self, recipe: Recipe, classes: list[str], side: int, files: list[Path] | None = None
    ) -> None:
        self.data, self.side = recipe.data, side
        self.kind, self.files = "pictures of the folder", files or []
        if files is None:
            self.kind = "validation pictures"
            with contextlib.suppress(RacnnError):
                index = build_index(recipe.data, seed=recipe.seed, classes=classes, verify=())
                self.files = [item.path for item in index.splits["val"]]
        if not self.files:
            self.kind = "noise"

    def squares(self, count: int, side: int) -> np.ndarray:
        """So many of them, (count, side, side, 3) uint8; a short list starts again."""
        if not self.files:
            return np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        some = [load_source(file, self.data.fit, side)[0] for file in self.files[:count]]
        return np.stack([some[number % len(some)] for number in range(count)])


def compare(deployed: Deployed, path: Path, pictures: Pictures) -> dict[str, Any]:
    """A file's answers against PyTorch's, on pictures of two sizes, 1, 2 and 7 at a time.

    Returns:
        `checked_on`, `batches`, `sides`, `max_difference` (output to largest difference; boxes as a share of
        the side), `agreement` (pictures with the same class, and all).

    Raises:
        RacnnError: the file does not load, an output differs by more than 1e-3, another class is named.
    """
    session = open_session(path)
    side = pictures.side
    sides = (side, round(LARGER * side))
    worst = {name: 0.0 for name in deployed.names if name != "labels"}
    same = count = 0
    for side in sides:
        for share in np.split(pictures.squares(sum(BATCHES), side), np.cumsum(BATCHES)[:-1]):
            image = as_input(share, raw=deployed.form.raw)
            where = f"{pictures.kind} of {side}×{side} px, {len(share)} at a time"
            with torch.inference_mode():
                expected = dict(
                    zip(deployed.names, [t.numpy() for t in deployed(torch.from_numpy(image))], strict=True)
                )
            outputs = session.run(deployed.names, {"image": image})
            found = dict(zip(deployed.names, outputs, strict=True))
            for name in worst:
                one, other = expected[name], found[name]
                gap = float(np.abs(one - other).max()) if one.shape == other.shape else math.inf
                gap /= side if name == "boxes" else 1
                worst[name] = max(worst[name], gap)
                allowed = CROPS_TOLERANCE if name.startswith("crop_") else TOLERANCE
                if not gap <= allowed:
                    raise RacnnError(
                        f"ONNX Runtime and PyTorch differ by {gap:.2g} in {name} on {where}; at most "
                        f"{allowed:g} is allowed",
                        HINT,
                        failure=True,
                    )
            probabilities, answer = expected["probabilities"], found["labels"][:, 0]
            best = probabilities.max(axis=1)
            # Two classes that PyTorch itself cannot tell apart may swap places by rounding; nothing else may.
            lost = best - np.take_along_axis(probabilities, answer[:, None], axis=1)[:, 0]
            if (lost > 1e-5).any():
                raise RacnnError(
                    f"ONNX Runtime names another class than PyTorch on {where}", HINT, failure=True
                )
            same += int((answer == expected["labels"][:, 0]).sum())
            count += len(share)
    return {
        "checked_on": pictures.kind,
        "batches": list(BATCHES),
        "sides": list(sides),
        "max_difference": worst,
        "agreement": [same, count],
    }


def validate(path: Path) -> None:
    """ONNX's own checker, with shape inference.

    Raises:
        RacnnError: it finds a fault.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as fault:
        raise RacnnError(f"the exported graph is not valid ONNX: {fault}", HINT, failure=True) from fault


def metadata(run: Run, deployed: Deployed) -> dict[str, str]:
    """What a file says about itself."""
    network, form = deployed.model, deployed.form
    return {
        "classes": json.dumps(run.classes(), ensure_ascii=False),
        "source": str(network.source),
        "sizes": json.dumps(network.sizes),
        "fit": deployed.fit,
        "mean": json.dumps(network.mean.flatten().tolist()),
        "std": json.dumps(network.std.flatten().tolist()),
        "layout": "NHWC" if form.raw else "NCHW",
        "top": str(form.top),
        "racnn": racnn_cli.__version__,
        "recipe": run.recipe_file.read_text(encoding="utf-8"),
        "recipe_sha256": _fingerprint(run),
    }


def _fingerprint(run: Run) -> str:
    return hashlib.sha256(run.recipe_file.read_bytes()).hexdigest()


def save(program: onnx_ir.Model, path: Path, verify: Callable[[Path], None]) -> int:
    """Write a graph, and give it its name once `verify` has passed the file.

    Weights that one file cannot hold go into a file beside it whose name is in the graph, and is new each time:
    a graph never lies beside the weights of another one.

    Returns:
        bytes of both.

    Raises:
        RacnnError: what `verify` raises, or the folder cannot be written; nothing is left then.
    """
    weights = sum(
        value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value
    )
    old = set(path.parent.glob(f"{glob.escape(path.name)}.*.data"))
    beside = path.with_name(f"{path.name}.{os.urandom(4).hex()}.data") if weights > LARGEST else None
    done = False

    def write(temporary: Path) -> None:
        onnx_ir.save(program, temporary, external_data=beside and beside.name)
        verify(temporary)

    try:
        write_atomic(path, write)
        done = True
    finally:
        if beside is not None and not done:
            beside.unlink(missing_ok=True)
    for file in old:  # the weights of the graph that was replaced
        file.unlink(missing_ok=True)
    return path.stat().st_size + (beside.stat().st_size if beside else 0)


def export_program(run: Run, path: Path | None = None, *, form: Form | None = None) -> dict[str, Any]:
    """Write the network as a program of `torch.export`, which loads with `torch.export.load` where racnn is not.

    What goes in and comes out is that of `export_onnx`; classes and the rest of its metadata are in the extra
    file `metadata.json`.

    Args:
        run, form: as in `export_onnx`.
        path: the file; None: model.pt2 in the run folder.

    Returns:
        `path`, `bytes`, `max_difference` (output to largest difference on validation pictures).

    Raises:
        RacnnError: no weights; the network cannot be traced; the program answers otherwise.
    """
    path = path or run.folder / "model.pt2"
    network, _ = store.load(run.folder)
    recipe = run.recipe()
    deployed = Deployed(network, recipe.data.fit, form or Form()).eval()
    example, axes = _any_size(deployed)
    try:
        program = torch.export.export(deployed, (example,), dynamic_shapes={"image": axes})
    except Exception as fault:
        raise RacnnError(
            f"the network cannot be traced by torch.export: {_first_line(fault)}", HINT, failure=True
        ) from fault
    pictures = Pictures(recipe, run.classes(), network.source)
    worst: dict[str, float] = {}

    def write(temporary: Path) -> None:
        extra = {"metadata.json": json.dumps(metadata(run, deployed))}
        torch.export.save(program, temporary, extra_files=extra)
        loaded = torch.export.load(temporary).module()
        image = torch.from_numpy(as_input(pictures.squares(3, network.source), raw=deployed.form.raw))
        with torch.inference_mode():
            pairs = zip(deployed.names, deployed(image), loaded(image), strict=True)
            worst.update({name: float((one - other).abs().max()) for name, one, other in pairs})
        if worst["probabilities"] > TOLERANCE:
            raise RacnnError(
                f"the program and the network differ by {worst['probabilities']:.2g} in probabilities; no file was "
                "written",
                HINT,
                failure=True,
            )

    write_atomic(path, write)
    return {"path": str(path), "bytes": path.stat().st_size, "max_difference": worst}


def export_safetensors(run: Run, folder: Path) -> Path:
    """Write recipe.toml, classes.json and weights.safetensors to a folder that `racnn_cli.load` reads.

    Raises:
        RacnnError: no weights, or the folder holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RacnnError(
            f"{folder} is there already and not empty; nothing was overwritten", "name a new folder"
        )
    store.load(run.folder)  # a damaged run is not passed on
    target = Run(folder)
    write_atomic(target.weights, lambda temporary: shutil.copyfile(run.weights, temporary))
    write_json(target.classes_file, run.classes())
    write_text(target.recipe_file, run.recipe_file.read_text(encoding="utf-8"))
    return folder


def to_onnx(deployed: Deployed, opset: int) -> onnx_ir.Model:
    """The graph with a batch and pictures of any size; the exporter's own chatter is swallowed.

    Raises:
        RacnnError: the network cannot be exported.
    """
    example, axes = _any_size(deployed)
    said = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                deployed,
                (example,),
                dynamo=True,
                input_names=["image"],
                output_names=deployed.names,
                dynamic_shapes={"image": axes},
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as fault:
        raise RacnnError(
            f"the network cannot be exported to ONNX opset {opset}: {_first_line(fault)}", HINT, failure=True
        ) from fault
    finally:
        logging.disable(before)
    assert program is not None
    return program.model


def _any_size(deployed: Deployed) -> tuple[Tensor, dict[int, Any]]:
    """Pictures to trace the network with, and which of their dimensions may be any."""
    # No two dimensions alike, none the network's own or 1: the exporter would take them for one or for constants.
    side = deployed.model.source
    example = torch.zeros(2, 3, side + 10, side + 22)
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    if deployed.form.raw:
        return example.permute(0, 2, 3, 1).to(torch.uint8).contiguous(), {0: batch, 1: height, 2: width}
    return example, {0: batch, 2: height, 3: width}


def _first_line(fault: Exception) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]


def _shape(value: onnx_ir.Value) -> list[str | int]:
    return [axis if isinstance(axis, int) else str(axis) for axis in value.shape or ()]

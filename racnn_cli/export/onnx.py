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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from pydantic import Field
from torch import Tensor

import racnn_cli
from racnn_cli.core import store
from racnn_cli.data.index import build_index
from racnn_cli.data.listing import list_images
from racnn_cli.data.square import load_source
from racnn_cli.errors import RacnnError
from racnn_cli.export import early_exit, quantize
from racnn_cli.export.early_exit import EarlyExit
from racnn_cli.export.graph import Deployed, Form
from racnn_cli.export.onnx_network import OnnxMetadata, as_input, foreign, open_session
from racnn_cli.export.quantize import Precision
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run, write_atomic, write_json, write_text

OPSET = 20  # version of the ONNX operator set, unless another is asked for
BATCHES = (1, 2, 7)  # sizes that a file is checked with
MAX_DROP = 0.5  # points of accuracy that a smaller file may cost
LARGER = 1.5  # and the second size of the images, in sides of the source that the network was trained on
TOLERANCE = 1e-3  # in probabilities, and in boxes as a share of the image's side
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
    exits: bool = False,
    max_drop: float = MAX_DROP,
) -> dict[str, Any]:
    """Write the network as ONNX, and check it against PyTorch before the file gets its name.

    The graph takes images of any size, any number at a time, and makes them square itself; what goes in and
    comes out is told by `Deployed`. Weights above protobuf's 2 GiB lie beside it, in `NAME.HASH.data`.
    Metadata: `classes` (JSON list), `source` (side that the network was trained on), `sizes`, `fit`, `mean`,
    `std`, `layout` (NCHW or NHWC), `racnn`, `recipe` (TOML), `recipe_sha256`.

    Args:
        run: a run whose network has weights.
        path: the file; None: model.onnx in the run folder.
        form: of input and outputs.
        opset: 18 or 20.
        precision: `half` and `int8` make the backbones smaller once the graph in float32 has passed.
        exits: run the finer scales only for images that scale 1 is not sure of; see `early_exit`.
        max_drop: how many points of accuracy on the validation split `precision` or `exits` may cost.

    Returns:
        `path`, `bytes`, `opset`, `inputs` and `outputs` (name to shape), `seconds`, what `compare` gives, and
        with another precision `compressed`: `precision`, `before` and `after` (accuracy), `images`,
        `bytes_before`, `times_faster`; with `exits` `early_exit`: `threshold`, `stopped` (of `images`), and
        again `before`, `after` and `times_faster`.

    Raises:
        RacnnError: no weights; the network cannot be exported; ONNX Runtime disagrees with PyTorch; the run's
            images are gone, or the accuracy drops too far; `exits` with one scale or another precision.
    """
    if exits and precision != "float32":
        raise RacnnError(f"--early-exit writes float32, not {precision}", "leave one of the two away")
    path, start = _ends_in(path or run.onnx, ".onnx"), time.perf_counter()
    network, _ = store.load(run.folder)
    recipe = run.recipe()
    deployed = Deployed(network, recipe.data.fit, form or Form()).eval()
    if exits and len(network.sizes) == 1:
        raise RacnnError(
            f"{run.folder} has one scale: there is none to leave out", "export without --early-exit"
        )
    judged = _labelled_images(run, "val", network.source) if exits or precision != "float32" else None
    if exits:
        assert judged is not None
        deployed = with_exit(deployed, judged, max_drop)
    program = to_onnx(deployed, opset)
    program.metadata_props.update(metadata(run, deployed))
    images = CheckImages(recipe, run.classes(), network.source)
    checked: dict[str, Any] = {}

    def verify(file: Path) -> None:
        validate(file)
        checked.update(compare(deployed, file, images))
        if isinstance(deployed, EarlyExit):
            assert judged is not None
            checked["early_exit"] = _measure_exit(deployed, file, judged)
        elif judged is not None:
            checked["compressed"] = _compress(run, deployed, file, precision, judged, max_drop)

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


Labelled = tuple[np.ndarray, np.ndarray]
"""Square images (n, H, H, 3) uint8 and their classes (n,)."""


def _labelled_images(run: Run, split: str, side: int, at_most: int | None = None) -> Labelled:
    """The images of a split, or so many of them, spread over all."""
    recipe = run.recipe()
    items = build_index(recipe.data, seed=recipe.seed, classes=run.classes(), verify=()).splits[split]
    some = items[:: math.ceil(len(items) / (at_most or len(items)))]
    squares = [load_source(item.path, recipe.data.fit, side)[0] for item in some]
    return np.stack(squares), np.array([item.label for item in some])


def with_exit(deployed: Deployed, judged: Labelled, max_drop: float) -> EarlyExit:
    """The network with the threshold that lets the most of the judged images stop at scale 1."""
    squares, labels = judged
    sure, coarse, fine = [], [], []
    with torch.inference_mode():
        for image in quantize.batches(squares, deployed.form):
            probabilities, _, scales = deployed(torch.from_numpy(image))[:3]
            best = scales[:, 0].max(dim=1)
            sure.append(best.values.numpy())
            coarse.append(best.indices.numpy())
            fine.append(probabilities.argmax(dim=1).numpy())
    by_coarse, by_all = (np.concatenate(answers) == labels for answers in (coarse, fine))
    threshold = early_exit.choose(np.concatenate(sure), by_coarse, by_all, max_drop)
    return EarlyExit(deployed.model, deployed.fit, deployed.form, threshold).eval()


def _measure_exit(deployed: EarlyExit, file: Path, judged: Labelled) -> dict[str, Any]:
    """What the threshold does on the images it was chosen on, one at a time."""
    session, (squares, labels) = open_session(file), judged
    never = {"threshold": np.array(early_exit.NEVER, np.float32)}
    found: dict[bool, list[int]] = {True: [], False: []}
    seconds, stopped = {True: 0.0, False: 0.0}, 0
    for turn, square in enumerate([squares[0], *squares]):  # the first one warms up
        image = as_input(square[None], raw=deployed.form.raw)
        for exits in (True, False):
            start = time.perf_counter()
            answer, ran = session.run(["labels", "ran"], {"image": image, **({} if exits else never)})
            if turn:
                seconds[exits] += time.perf_counter() - start
                found[exits].append(int(answer[0, 0]))
                stopped += exits and int(ran[0]) == 1
    before, after = (float((np.array(found[exits]) == labels).mean()) for exits in (False, True))
    return {
        "threshold": deployed.threshold,
        "images": len(labels),
        "stopped": stopped,
        "before": before,
        "after": after,
        "times_faster": seconds[False] / seconds[True],
    }


def _compress(
    run: Run, deployed: Deployed, file: Path, precision: Precision, held_out: Labelled, max_drop: float
) -> dict[str, Any]:
    """Put a smaller graph instead of one in float32 that has passed, if it is good enough."""
    judged, labels = held_out
    smaller = file.with_suffix(".smaller.onnx")
    try:
        if precision == "half":
            quantize.to_half(file, smaller)
        else:
            some, _ = _labelled_images(run, "train", deployed.model.source, quantize.CALIBRATION)
            quantize.to_int8(file, smaller, some, deployed.form)
        validate(smaller)
        before, after = open_session(file), open_session(smaller)
        image = as_input(judged[:1], raw=deployed.form.raw)
        found: dict[str, Any] = {
            "precision": precision,
            "before": quantize.accuracy(before, judged, labels, deployed.form),
            "after": quantize.accuracy(after, judged, labels, deployed.form),
            "images": len(labels),
            "bytes_before": file.stat().st_size,
            "times_faster": quantize.times_faster(
                lambda: before.run(None, {"image": image}), lambda: after.run(None, {"image": image})
            ),
        }
        drop = 100 * (found["before"] - found["after"])
        if drop > max_drop + 1e-9:
            raise RacnnError(
                f"{precision} costs {drop:.1f} points of accuracy on {len(labels)} validation images "
                f"({found['before']:.3f} to {found['after']:.3f}); {max_drop:g} are allowed, and no file was written",
                f"--max-drop {math.ceil(10 * drop - 1e-6) / 10:g}, or export without --{precision}",
                failure=True,
            )
        os.replace(smaller, file)
    finally:
        smaller.unlink(missing_ok=True)
    return found


def check(run: Run, path: Path | None, folder: Path) -> dict[str, Any]:
    """Hold a file that was exported before against its run, on the images of a folder.

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
    names, own = {value.name for value in session.get_outputs()}, Exported.read(path, session)
    form = Form(own.layout == "NHWC", own.top, any(name.startswith("crop_") for name in names))
    deployed = Deployed(network, recipe.data.fit, form)
    if own.threshold is not None:
        deployed = EarlyExit(network, recipe.data.fit, form, own.threshold)
    if missing := sorted(set(deployed.names) - names):
        raise foreign(path, f"it has no output {', '.join(missing)}")
    images = CheckImages(recipe, run.classes(), network.source, list_images(folder))
    return {"path": str(path)} | compare(deployed.eval(), path, images)


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
            f"{smaller['after']:.3f} after on {smaller['images']} validation images"
        ]
    if exits := report.get("early_exit"):
        lines += [
            f"  early exit: {exits['stopped']} of {exits['images']} validation images stop after scale 1, "
            f"sure to {exits['threshold']:.3f} or more; one at a time {exits['times_faster']:.2f} × as fast on this "
            f"machine, accuracy {exits['before']:.3f} with all scales for all and {exits['after']:.3f} so"
        ]
    return "\n".join(lines)


class Exported(OnnxMetadata):
    """What `check` needs to know besides."""

    top: Annotated[int, Field(ge=1)]
    threshold: float | None = None


def _ends_in(path: Path, suffix: str) -> Path:
    """A file's name, if it is one for what is written there: a slip must not replace an image or the weights."""
    if path.suffix != suffix:
        raise RacnnError(f"--out {path} does not end in {suffix}; nothing was written", f"--out NAME{suffix}")
    return path


class CheckImages:
    """What an exported file is tried with.

    Args:
        recipe, classes: of the run.
        side: of the source that the network was trained on.
        files: images to use; None: the run's validation split, or noise where that is gone.
    """

    def __init__(
        self, recipe: Recipe, classes: list[str], side: int, files: list[Path] | None = None
    ) -> None:
        self.data, self.side = recipe.data, side
        self.kind, self.files = "images of the folder", files or []
        if files is None:
            self.kind = "validation images"
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


def compare(deployed: Deployed, path: Path, images: CheckImages) -> dict[str, Any]:
    """A file's answers against PyTorch's, on images of two sizes, 1, 2 and 7 at a time.

    Returns:
        `checked_on`, `batches`, `sides`, `max_difference` (output to largest difference; boxes as a share of
        the side), `agreement` (images with the same class, and all).

    Raises:
        RacnnError: the file does not load, an output differs by more than 1e-3, another class is named.
    """
    session = open_session(path)
    side = images.side
    sides = (side, round(LARGER * side))
    worst = {name: 0.0 for name in deployed.names if name != "labels"}
    same = count = 0
    for side in sides:
        for share in np.split(images.squares(sum(BATCHES), side), np.cumsum(BATCHES)[:-1]):
            image = as_input(share, raw=deployed.form.raw)
            where = f"{images.kind} of {side}×{side} px, {len(share)} at a time"
            for expected, found in _both(deployed, session, image, path):
                for name in worst:
                    one, other = expected[name], found[name]
                    alike = one.shape == other.shape and other.dtype.kind in "fiu"
                    gap = float(np.abs(one - other).max()) if alike else math.inf
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
                if not _are_labels(found["labels"], expected):
                    raise foreign(path, "its labels are no numbers of classes")
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
        "checked_on": images.kind,
        "batches": list(BATCHES),
        "sides": list(sides),
        "max_difference": worst,
        "agreement": [same, count],
    }


def _both(
    deployed: Deployed, session: onnxruntime.InferenceSession, image: np.ndarray, path: Path
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """The outputs by name of PyTorch and of the file, once for each set of inputs that is to be tried."""
    with torch.inference_mode():
        for extra in deployed.extra(torch.from_numpy(image)):
            expected = [value.numpy() for value in deployed(torch.from_numpy(image), **extra)]
            given = {name: value.numpy() for name, value in extra.items()}
            try:
                found = [
                    np.asarray(value) for value in session.run(deployed.names, {"image": image, **given})
                ]
            except Exception as error:  # its errors have no common base
                raise foreign(path, f"it does not run: {error}") from None
            yield (
                dict(zip(deployed.names, expected, strict=True)),
                dict(zip(deployed.names, found, strict=True)),
            )


def _are_labels(labels: np.ndarray, expected: Mapping[str, np.ndarray]) -> bool:
    count = expected["probabilities"].shape[1]
    alike = labels.shape == expected["labels"].shape and labels.dtype.kind in "iu"
    return alike and bool(((labels >= 0) & (labels < count)).all())


def validate(path: Path) -> None:
    """ONNX's own checker, with shape inference.

    Raises:
        RacnnError: it finds a error.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RacnnError(f"the exported graph is not valid ONNX: {error}", HINT, failure=True) from error


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
        **({"threshold": str(deployed.threshold)} if isinstance(deployed, EarlyExit) else {}),
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
        if beside is not None and not _refers_to(temporary, beside.name):
            beside.unlink()  # what `verify` put in its place holds its own weights

    try:
        write_atomic(path, write)
        done = True
    finally:
        if beside is not None and not done:
            beside.unlink(missing_ok=True)
    for file in old:  # the weights of the graph that was replaced
        file.unlink(missing_ok=True)
    return path.stat().st_size + (beside.stat().st_size if beside and beside.exists() else 0)


def _refers_to(path: Path, name: str) -> bool:
    """Whether a graph keeps weights in a file of that name."""
    proto = onnx.load(path, load_external_data=False)
    return any(
        entry.key == "location" and entry.value == name
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
    )


def export_program(run: Run, path: Path | None = None, *, form: Form | None = None) -> dict[str, Any]:
    """Write the network as a program of `torch.export`, which loads with `torch.export.load` where racnn is not.

    What goes in and comes out is that of `export_onnx`; classes and the rest of its metadata are in the extra
    file `metadata.json`.

    Args:
        run, form: as in `export_onnx`.
        path: the file; None: model.pt2 in the run folder.

    Returns:
        `path`, `bytes`, `max_difference` (output to largest difference on validation images).

    Raises:
        RacnnError: no weights; the network cannot be traced; the program answers otherwise.
    """
    path = _ends_in(path or run.folder / "model.pt2", ".pt2")
    network, _ = store.load(run.folder)
    recipe = run.recipe()
    deployed = Deployed(network, recipe.data.fit, form or Form()).eval()
    examples, axes = _traced(deployed)
    try:
        program = torch.export.export(deployed, examples, dynamic_shapes=axes)
    except Exception as error:
        raise RacnnError(
            f"the network cannot be traced by torch.export: {_first_line(error)}", HINT, failure=True
        ) from error
    images = CheckImages(recipe, run.classes(), network.source)
    worst: dict[str, float] = {}

    def write(temporary: Path) -> None:
        extra = {"metadata.json": json.dumps(metadata(run, deployed))}
        torch.export.save(program, temporary, extra_files=extra)
        loaded = torch.export.load(temporary).module()
        image = torch.from_numpy(as_input(images.squares(3, network.source), raw=deployed.form.raw))
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
    """The graph with a batch and images of any size; the exporter's own chatter is swallowed.

    Raises:
        RacnnError: the network cannot be exported.
    """
    if isinstance(deployed, EarlyExit):
        coarse, fine = to_onnx(deployed.coarse, opset), to_onnx(deployed.fine, opset)
        return early_exit.join(coarse, fine, deployed.threshold)
    examples, axes = _traced(deployed)
    said = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                deployed,
                examples,
                dynamo=True,
                input_names=list(axes),
                output_names=deployed.names,
                dynamic_shapes=axes,
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        raise RacnnError(
            f"the network cannot be exported to ONNX opset {opset}: {_first_line(error)}", HINT, failure=True
        ) from error
    finally:
        logging.disable(before)
    assert program is not None
    return program.model


def _traced(deployed: Deployed) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Examples of the inputs, and by name which of their dimensions may be any."""
    inputs = deployed.inputs()
    return tuple(example for example, _ in inputs.values()), {
        name: axes for name, (_, axes) in inputs.items()
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _shape(value: onnx_ir.Value) -> list[str | int]:
    return [axis if isinstance(axis, int) else str(axis) for axis in value.shape or ()]

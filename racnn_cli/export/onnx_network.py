"""An exported ONNX file in ONNX Runtime; torch is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import onnxruntime
from pydantic import BaseModel, Field, FiniteFloat, Json, ValidationError

from racnn_cli.data.color import as_range
from racnn_cli.data.square import Fit
from racnn_cli.errors import ExportError, describe_missing
from racnn_cli.export.prediction import NetworkOutput
from racnn_cli.run import ClassNames

REQUIRED_OUTPUTS = ("probabilities", "scales")


class OnnxMetadata(BaseModel):
    """The metadata of an exported file; validated, since files come from anywhere."""

    classes: Json[ClassNames]
    source: Annotated[int, Field(ge=16, le=8192)]
    sizes: Json[Annotated[list[int], Field(min_length=1)]]
    fit: Fit
    range: Json[Annotated[list[FiniteFloat], Field(max_length=2)]] = []
    layout: Literal["NCHW", "NHWC"]
    top: Annotated[int, Field(ge=1)] = 5
    threshold: float | None = None

    @classmethod
    def read(cls, path: Path, session: onnxruntime.InferenceSession) -> Self:
        """Read the metadata of a file.

        Raises:
            ExportError: an entry is missing or invalid.
        """
        try:
            return cls.model_validate(session.get_modelmeta().custom_metadata_map)
        except ValidationError as error:
            keys = ", ".join(sorted({str(detail["loc"][0]) for detail in error.errors()}))
            raise unusable(path, f"missing or invalid metadata: {keys}") from None


class OnnxNetwork:
    """A `Network` that runs an ONNX file.

    Args:
        path: of the file.

    Raises:
        ExportError: the file is missing, is not an ONNX file, or was not exported by racnn.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.session = path, open_session(path)
        names = [value.name for value in self.session.get_outputs()]
        metadata = OnnxMetadata.read(path, self.session)
        if missing := [name for name in REQUIRED_OUTPUTS if name not in names]:
            raise unusable(path, f"it has no output {', '.join(missing)}")
        self.classes, self.fit, self.source = metadata.classes, metadata.fit, metadata.source
        self.value_range = as_range(metadata.range)
        self.scales, self.raw = len(metadata.sizes), metadata.layout == "NHWC"
        self.output_names = [*REQUIRED_OUTPUTS, *(name for name in ("boxes", "ran") if name in names)]

    def predict(self, squares: np.ndarray) -> NetworkOutput:
        """As `Network.predict`; raises `ExportError` if the graph does not run or its outputs are not valid."""
        count, classes = len(squares), len(self.classes)
        inputs = {"image": as_input(squares, raw=self.raw)}
        outputs = run_session(self.session, self.output_names, inputs, path=self.path)
        outputs.setdefault("boxes", np.zeros((count, 0, 4), np.float32))
        outputs.setdefault("ran", np.full(count, self.scales))
        shapes = {
            "probabilities": (count, classes),
            "scales": (count, self.scales, classes),
            "boxes": (count, self.scales - 1, 4),
            "ran": (count,),
        }
        for name, shape in shapes.items():
            if outputs[name].shape != shape or outputs[name].dtype.kind not in "fi":
                raise unusable(
                    self.path, f"its {name} have shape {outputs[name].shape} instead of {shape}, or are not numbers"
                )
        boxes, ran = outputs["boxes"], outputs["ran"]
        if not np.isfinite(boxes).all() or ((ran < 1) | (ran > self.scales)).any():
            raise unusable(self.path, "its boxes or numbers of scales are out of range")
        return NetworkOutput(**outputs | {"boxes": boxes / squares.shape[1]})


def unusable(path: Path, reason: str) -> ExportError:
    """The error for a file that was not exported by racnn."""
    return ExportError(
        f"{path} is not a network that racnn can use: {reason}", "use a file that `racnn export --format onnx` wrote"
    )


def as_input(squares: np.ndarray, *, raw: bool) -> np.ndarray:
    """Images (B, H, W, 3) uint8 as a graph takes them: unchanged if `raw`, else (B, 3, H, W) float32 in [0, 1]."""
    if raw:
        return squares
    return np.ascontiguousarray(squares.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime, on the CPU.

    Raises:
        ExportError: the file is missing or does not load.
    """
    if not path.is_file():
        raise ExportError(describe_missing(path), "`racnn export --format onnx` writes model.onnx into the run folder")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise ExportError(
            f"ONNX Runtime cannot load {path}: {error}",
            "export it again, with `racnn export --format onnx`",
            failure=True,
        ) from error


def run_session(
    session: onnxruntime.InferenceSession, names: list[str], inputs: dict[str, np.ndarray], *, path: Path
) -> dict[str, np.ndarray]:
    """Run a file and return its outputs by name.

    Raises:
        ExportError: the graph does not run.
    """
    try:
        return dict(zip(names, map(np.asarray, session.run(names, inputs)), strict=True))
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise unusable(path, f"it does not run: {error}") from None

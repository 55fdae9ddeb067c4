"""A file that `racnn export --onnx` wrote, in ONNX Runtime; torch is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import onnxruntime
from pydantic import BaseModel, Field, Json, ValidationError

from racnn_cli.data.square import Fit
from racnn_cli.errors import RacnnError, describe_missing
from racnn_cli.export.prediction import Answers
from racnn_cli.run import ClassNames

OUTPUTS = ("probabilities", "scales")


class OnnxMetadata(BaseModel):
    """What the metadata of a file say about it; they may come from anybody."""

    classes: Json[ClassNames]
    source: Annotated[int, Field(ge=16, le=8192)]
    sizes: Json[Annotated[list[int], Field(min_length=1)]]
    fit: Fit
    layout: Literal["NCHW", "NHWC"]

    @classmethod
    def read(cls, path: Path, session: onnxruntime.InferenceSession) -> Self:
        """Of a file.

        Raises:
            RacnnError: something is missing, or is no such thing.
        """
        try:
            return cls.model_validate(session.get_modelmeta().custom_metadata_map)
        except ValidationError as error:
            wrong = ", ".join(sorted({str(error["loc"][0]) for error in error.errors()}))
            raise foreign(path, f"of its metadata, {wrong} cannot be used") from None


class OnnxNetwork:
    """See `prediction.Network`.

    Args:
        path: of the file.

    Raises:
        RacnnError: it is missing, no ONNX file, or not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self.session = open_session(path)
        names = [value.name for value in self.session.get_outputs()]
        told = OnnxMetadata.read(path, self.session)
        if missing := [name for name in OUTPUTS if name not in names]:
            raise foreign(path, f"it has no output {', '.join(missing)}")
        self.path, self.classes, self.fit = path, told.classes, told.fit
        self.source, self.scales, self.raw = told.source, len(told.sizes), told.layout == "NHWC"
        self.outputs = [*OUTPUTS, *(name for name in ("boxes", "ran") if name in names)]

    def answer(self, squares: np.ndarray) -> Answers:
        """See `prediction.Network`.

        Raises:
            RacnnError: the graph is not one that `racnn export` makes: it does not run, or answers in other shapes.
        """
        count, classes = len(squares), len(self.classes)
        try:
            values = self.session.run(self.outputs, {"image": as_input(squares, raw=self.raw)})
        except Exception as error:  # its errors have no common base
            raise foreign(self.path, f"it does not run: {error}") from None
        found = dict(zip(self.outputs, map(np.asarray, values), strict=True))
        found.setdefault("boxes", np.zeros((count, 0, 4), np.float32))
        found.setdefault("ran", np.full(count, self.scales))
        wanted = {
            "probabilities": (count, classes),
            "scales": (count, self.scales, classes),
            "boxes": (count, self.scales - 1, 4),
            "ran": (count,),
        }
        for name, shape in wanted.items():
            if found[name].shape != shape or found[name].dtype.kind not in "fi":
                raise foreign(self.path, f"its {name} have the shape {found[name].shape}, {shape} is needed")
        if not np.isfinite(found["boxes"]).all() or ((found["ran"] < 1) | (found["ran"] > self.scales)).any():
            raise foreign(self.path, "its boxes or numbers of scales are impossible")
        boxes = found["boxes"] / squares.shape[1]
        return Answers(found["probabilities"], found["scales"], boxes, found["ran"])


def foreign(path: Path, why: str) -> RacnnError:
    """The error for a file that is none of ours."""
    return RacnnError(
        f"{path} is not a network that racnn can use: {why}", "a file that `racnn export --onnx` wrote"
    )


def as_input(squares: np.ndarray, *, raw: bool) -> np.ndarray:
    """Images (B, H, W, 3) uint8 as a graph takes them: as they are (`raw`), or (B, 3, H, W) float32 in [0, 1]."""
    if raw:
        return squares
    return np.ascontiguousarray(squares.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A file in ONNX Runtime, on the CPU.

    Raises:
        RacnnError: it is missing or does not load.
    """
    if not path.is_file():
        raise RacnnError(
            describe_missing(path), "`racnn export --onnx` writes model.onnx into the run folder"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base
        raise RacnnError(
            f"ONNX Runtime cannot load {path}: {error}",
            "export it again, with `racnn export --onnx`",
            failure=True,
        ) from error

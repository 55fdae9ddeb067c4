"""A file that `racnn export --onnx` wrote, in ONNX Runtime; torch is not needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime

from racnn_cli.errors import RacnnError
from racnn_cli.results.prediction import Answers

NEEDED = ("classes", "source", "sizes", "fit", "layout")
OUTPUTS = ("probabilities", "scales")


class OnnxNetwork:
    """See `prediction.Network`.

    Args:
        path: of the file.

    Raises:
        RacnnError: it is missing, no ONNX file, or not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self.session = open_session(path)
        told = self.session.get_modelmeta().custom_metadata_map
        names = [value.name for value in self.session.get_outputs()]
        if not {*NEEDED} <= told.keys() or not {*OUTPUTS} <= {*names}:
            raise RacnnError(
                f"{path} does not say what racnn needs to know of a network",
                "a file that `racnn export --onnx` wrote",
            )
        self.classes, self.fit = json.loads(told["classes"]), told["fit"]
        self.source, self.scales = int(told["source"]), len(json.loads(told["sizes"]))
        self.raw = told["layout"] == "NHWC"
        self.outputs = [*OUTPUTS, *(name for name in ("boxes", "ran") if name in names)]

    def answer(self, squares: np.ndarray) -> Answers:
        """See `prediction.Network`."""
        values = self.session.run(self.outputs, {"image": as_input(squares, raw=self.raw)})
        found = dict(zip(self.outputs, values, strict=True))
        boxes = found.get("boxes", np.zeros((len(squares), 0, 4), np.float32)) / squares.shape[1]
        ran = found.get("ran", np.full(len(squares), self.scales))
        return Answers(found["probabilities"], found["scales"], boxes, ran)


def as_input(squares: np.ndarray, *, raw: bool) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 as a graph takes them: as they are (`raw`), or (B, 3, H, W) float32 in [0, 1]."""
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
            f"{path} does not exist", "`racnn export --onnx` writes model.onnx into the run folder"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as fault:  # its errors have no common base
        raise RacnnError(
            f"ONNX Runtime cannot load {path}: {fault}",
            "export it again, with `racnn export --onnx`",
            failure=True,
        ) from fault

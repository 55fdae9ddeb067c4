"""A run that was never trained, its data and its ONNX file, shared by the tests of exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from untrained import SIDE, make_run, write_data

from racnn_cli.data.square import load_source
from racnn_cli.export.onnx import export_onnx
from racnn_cli.run import Run


@pytest.fixture(scope="package")
def data(tmp_path_factory) -> Path:
    """The CSV file of a labelled data set."""
    return write_data(tmp_path_factory.mktemp("export") / "data")


@pytest.fixture(scope="package")
def run(data: Path) -> Run:
    return make_run(data.parent.parent / "three", data, scales=3)


@pytest.fixture(scope="package")
def exported(run: Run) -> dict:
    """The report of model.onnx in the run folder."""
    return export_onnx(run)


@pytest.fixture(scope="package")
def validation_image(data: Path) -> np.ndarray:
    """All validation images in name order, as an exported graph takes them: (24, 3, H, H) float32."""
    files = sorted(data.parent.glob("val-*.png"))
    squares = np.stack([load_source(file, "crop", SIDE)[0] for file in files])
    return np.ascontiguousarray(squares.transpose(0, 3, 1, 2), np.float32) / np.float32(255)

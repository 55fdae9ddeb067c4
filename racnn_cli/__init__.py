"""racnn: fine-grained image recognition from image labels alone.

The Python API, loaded when it is first used, so that `racnn --help` need not wait for torch:

    import racnn_cli
    model = racnn_cli.load("runs/latest")
    for prediction in model.predict(["bird.jpg"]):
        print(prediction.label, prediction.probability, prediction.boxes)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from racnn_cli.api import predict, train
    from racnn_cli.core.model import RACNN
    from racnn_cli.errors import RacnnError
    from racnn_cli.results.prediction import Model, Prediction, load

__all__ = ["RACNN", "Model", "Prediction", "RacnnError", "load", "predict", "train"]

_HOMES = {
    "RACNN": "racnn_cli.core.model",
    "Model": "racnn_cli.results.prediction",
    "Prediction": "racnn_cli.results.prediction",
    "RacnnError": "racnn_cli.errors",
    "load": "racnn_cli.results.prediction",
    "predict": "racnn_cli.api",
    "train": "racnn_cli.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

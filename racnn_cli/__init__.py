"""racnn: fine-grained image recognition from image labels alone.

The Python API:

    import racnn_cli
    model = racnn_cli.load("runs/latest")
    for prediction in model.predict(["bird.jpg"]):
        print(prediction.label, prediction.probability, prediction.boxes)

Each name is imported on first use, so that `racnn --help` does not wait for torch.
"""

from __future__ import annotations

import os

__version__ = "0.1.0"

# A wheel contains `backbones` and `recipes` inside this package. In a checkout they are in the repository root, so the
# package searches there too. Packages of these names elsewhere on sys.path are never used.
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(_PACKAGE)
if not os.path.isdir(os.path.join(_PACKAGE, "backbones")) and os.path.isfile(
    os.path.join(_ROOT, "backbones", "contract.py")
):
    __path__.append(_ROOT)

TYPE_CHECKING = False  # importing typing would make an early Ctrl-C more likely to end in a traceback
if TYPE_CHECKING:
    from typing import Any

    from racnn_cli.api import predict, train
    from racnn_cli.core.model import RACNN
    from racnn_cli.errors import RacnnError
    from racnn_cli.export.loading import load
    from racnn_cli.export.prediction import Model, Prediction

__all__ = ["RACNN", "Model", "Prediction", "RacnnError", "load", "predict", "train"]

_MODULES = {
    "RACNN": "racnn_cli.core.model",
    "Model": "racnn_cli.export.prediction",
    "Prediction": "racnn_cli.export.prediction",
    "RacnnError": "racnn_cli.errors",
    "load": "racnn_cli.export.loading",
    "predict": "racnn_cli.api",
    "train": "racnn_cli.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""racnn: fine-grained image recognition from image labels alone.

The Python API, loaded when it is first used, so that `racnn --help` need not wait for torch:

    import racnn_cli
    model = racnn_cli.load("runs/latest")
    for prediction in model.predict(["bird.jpg"]):
        print(prediction.label, prediction.probability, prediction.boxes)
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A wheel holds `backbones` and `recipes` inside this package. In a checkout they stay in the repository root, so
# the root is searched too; nothing of these names elsewhere on sys.path is ever looked at.
_ROOT = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "backbones").is_dir() and (_ROOT / "backbones" / "contract.py").is_file():
    __path__.append(str(_ROOT))

if TYPE_CHECKING:
    from racnn_cli.api import predict, train
    from racnn_cli.core.model import RACNN
    from racnn_cli.errors import RacnnError
    from racnn_cli.export.loading import load
    from racnn_cli.export.prediction import Model, Prediction

__all__ = ["RACNN", "Model", "Prediction", "RacnnError", "load", "predict", "train"]

_HOMES = {
    "RACNN": "racnn_cli.core.model",
    "Model": "racnn_cli.export.prediction",
    "Prediction": "racnn_cli.export.prediction",
    "RacnnError": "racnn_cli.errors",
    "load": "racnn_cli.export.loading",
    "predict": "racnn_cli.api",
    "train": "racnn_cli.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

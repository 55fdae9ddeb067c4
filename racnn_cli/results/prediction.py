"""The former place of `Model` and `Prediction`, for code that imports them from here."""

from racnn_cli.export.prediction import Model, Prediction

__all__ = ["Model", "Prediction"]

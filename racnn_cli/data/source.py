"""Open the images that a recipe names: files on disk, or a data set that draws its own images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racnn_cli import recipe
from racnn_cli.data import checks
from racnn_cli.data.datasets import find_builtin
from racnn_cli.data.images import DataSource, ImageDataset
from racnn_cli.data.index import ShareWork, build_index, check_alone
from racnn_cli.data.types import SPLITS, Index


@dataclass(frozen=True)
class FileSource:
    """Image files, as listed by `build_index`."""

    index: Index
    data: recipe.Data
    seed: int

    def dataset(self, split: str, side: int, *, augment: bool) -> ImageDataset:
        return ImageDataset(self.index.splits[split], self.data, side, seed=self.seed, augment=augment)


def open_source(
    data: recipe.Data,
    *,
    seed: int,
    classes: list[str] | None = None,
    verify: Sequence[str] = SPLITS,
    share: ShareWork = check_alone,
) -> DataSource:
    """Open the images that a recipe's `data` names; the arguments are those of `build_index`.

    Raises:
        DataError: lists every error of the data set, as `build_index` does.
    """
    builtin = find_builtin(data)
    if builtin is None or (open_builtin := builtin[0].open) is None:
        index = build_index(data, seed=seed, classes=classes, verify=verify, share=share)
        return FileSource(index, data.model_copy(update={"range": index.value_range or data.range}), seed)
    source = open_builtin(builtin[1], seed)
    names = source.index.classes  # reading the index reports missing files at once
    if classes is not None and classes != names:
        problems = checks.run_class_problems(names, classes)
        problems = problems or [f"the order of the classes {checks.quote_names(names)} differs from the run's"]
        raise checks.error_report(data.path, problems, [])
    return source

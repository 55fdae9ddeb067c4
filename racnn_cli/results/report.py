"""`racnn report`: one self-contained HTML page about a run."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

import racnn_cli
from racnn_cli.core.model import sizes_of
from racnn_cli.data.color import ValueRange, as_range
from racnn_cli.data.decode import read_image, show
from racnn_cli.data.index import build_index, labelled
from racnn_cli.data.types import Item
from racnn_cli.errors import RacnnError
from racnn_cli.events import EpochEvent, EvalResult
from racnn_cli.export.loading import load
from racnn_cli.export.prediction import Prediction
from racnn_cli.results import chart, draw, tables
from racnn_cli.run import Run, write_text

CANDIDATES = 48  # images of the split that the gallery is chosen from
GALLERY_IMAGES = 12
MATRIX_CLASSES = 300  # with more classes, the most confused pairs are listed instead of a matrix
CONFUSED_PAIRS = 30

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["percent"] = "{:.1%}".format


@dataclass(frozen=True)
class Card:
    """An image of the gallery; `label` is its true class, `jpeg` its drawing in base64."""

    name: str
    jpeg: str
    label: str
    answer: Prediction

    @property
    def correct(self) -> bool:
        return self.answer.label == self.label


def write_report(run: Run) -> Path:
    """Write report.html from eval.json, log.jsonl and, if the data can be read, some of its images.

    Returns:
        The path of the page.

    Raises:
        RunError: eval.json is missing or damaged, or the page cannot be written.
    """
    recipe, result, epochs = run.recipe(), run.read_eval(), run.epochs()
    names = list(result.per_class)
    matrix, confused = None, []
    if len(names) > MATRIX_CLASSES:
        errors = sorted((cell for cell in result.confusion if cell[0] != cell[1]), key=lambda cell: -cell[2])
        confused = [(names[label], names[answer], n) for label, answer, n in errors[:CONFUSED_PAIRS]]
    else:
        matrix = chart.confusion(result.confusion, names)
    try:
        cards, gallery_note = _gallery(run, result)
    except RacnnError as error:  # whatever is wrong with the data or the weights, the figures are still shown
        cards, gallery_note = [], f"No images: {error.message}."
    duration = _duration(sum(event.seconds for event in epochs))
    text = _TEMPLATES.get_template("report.html.jinja").render(
        version=racnn_cli.__version__,
        recipe=recipe,
        result=result,
        facts={
            "data": f"{recipe.data.path}, {result.classes} classes",
            "network": f"{recipe.model.backbone}, {recipe.model.scales} scale{'s' * (recipe.model.scales > 1)}",
            "input sizes": " → ".join(f"{size} px" for size in sizes_of(recipe.model)),
            "initial weights": recipe.model.weights,
            "seed": recipe.seed,
            "evaluation speed": f"{result.images_per_second:.0f} images/s",
        },
        accuracy=tables.accuracy(result),
        boxes=tables.boxes(result),
        remarks=tables.remarks(result),
        cards=cards,
        gallery_note=gallery_note,
        training_note=f"{len(epochs)} epochs, {duration} of training." if epochs else "log.jsonl has no epochs.",
        charts=_charts(epochs),
        matrix=matrix,
        confused=confused,
        toml=run.recipe_file.read_text(encoding="utf-8"),
    )
    write_text(run.report, text)
    return run.report


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _phase(event: EpochEvent) -> tuple[str, str, int]:
    return event.stage, event.phase, event.round


def _charts(epochs: Sequence[EpochEvent]) -> list[str]:
    """Line charts of the validation figures and the training losses over all epochs."""
    if not epochs:
        return []
    numbered = list(enumerate(epochs, start=1))
    bands = []
    for (stage, phase, _), group in itertools.groupby(numbered, key=lambda pair: _phase(pair[1])):
        numbers = [number for number, _ in group]
        name = (phase or stage).removesuffix(" phase").removesuffix(" head")
        bands.append(chart.Band(name, numbers[0], numbers[-1]))

    def line(name: str, color: str, values: Sequence[float | None], *, per_phase: bool = False) -> chart.Line:
        """The line of a figure that some epochs lack; `per_phase` starts a new piece at every phase."""
        keys = [(value is None, per_phase and _phase(event)) for event, value in zip(epochs, values, strict=True)]
        groups = itertools.groupby(zip(keys, enumerate(values, start=1), strict=True), key=lambda entry: entry[0])
        pieces = [[(number, value) for _, (number, value) in group if value is not None] for _, group in groups]
        return chart.Line(name, color, pieces)

    def scale_lines(name: str, part: str, key: str, first: int = 1) -> list[chart.Line]:
        """The lines of a figure in the list `part` of each epoch, whose first entry is of scale `first`."""
        records = [getattr(event.val, part) for event in epochs]
        return [
            line(f"{name} {n}", f"s{n}", [getattr(r[n - first], key) if n - first < len(r) else None for r in records])
            for n in range(first, count + 1)
        ]

    count = max(len(event.val.scales) for event in epochs)
    accuracy = scale_lines("scale", "scales", "top1")
    for name in ("average", "fused") if count > 1 else ():
        answers = [getattr(event.val, name) for event in epochs]
        accuracy.append(line(name, name, [answer and answer.top1 for answer in answers]))
    losses = [
        line(name, _loss_color(name), [event.train_loss.get(name) for event in epochs], per_phase=True)
        for name in dict.fromkeys(name for event in epochs for name in event.train_loss)
    ]
    sides = scale_lines("to scale", "boxes", "side_mean", first=2)
    return [
        chart.lines("Validation top-1", accuracy, bands, top=1.0),
        chart.lines("Validation NLL", scale_lines("scale", "scales", "nll"), bands),
        chart.lines("Training losses", losses, bands),
        chart.lines("Mean side of the boxes, relative to the previous scale", sides, bands, top=1.0),
    ]


def _loss_color(name: str) -> str:
    """The color of the finest scale in the name of a loss."""
    digits = [character for character in name if character.isdigit()]
    return f"s{digits[-1]}" if digits else "fused"


def _gallery(run: Run, result: EvalResult) -> tuple[list[Card], str]:
    """Images of the split with what each scale sees, wrong answers first, and a note about the choice."""
    recipe, classes = run.recipe(), run.classes()
    if result.split == "all":
        data = recipe.data.model_copy(update={"path": result.data, "skip_bad": True})  # eval has reported them
        items = labelled(data, seed=recipe.seed, classes=classes).items
    else:
        items = build_index(recipe.data, seed=recipe.seed, classes=classes, verify=()).splits[result.split]
    items = items[:: max(1, len(items) // CANDIDATES)][:CANDIDATES]
    answers = load(run).predict([item.path for item in items])
    pairs = [(item, answer) for item, answer in zip(items, answers, strict=True) if not answer.error]
    wrong = [pair for pair in pairs if pair[1].label != classes[pair[0].label]]
    correct = [pair for pair in pairs if pair[1].label == classes[pair[0].label]]
    wrong = wrong[: max(GALLERY_IMAGES // 2, GALLERY_IMAGES - len(correct))]
    room = GALLERY_IMAGES - len(wrong)
    correct = correct[:: max(1, len(correct) // max(1, room))][:room]
    value_range = as_range(recipe.data.range)
    cards = [_card(item, answer, classes[item.label], value_range) for item, answer in wrong + correct]
    return cards, f"Chosen from {len(pairs)} {result.split} images: wrong answers first, then correct ones."


def _card(item: Item, answer: Prediction, label: str, value_range: ValueRange | None) -> Card:
    image = read_image(item.path, min_side=480, value_range=value_range)
    factor = image.pixels.shape[1] / image.stored_size[image.orientation >= 5]  # JPEGs are read reduced
    boxes = [[value * factor for value in box] for box in draw.upright_boxes(image, answer.boxes)]
    file = io.BytesIO()
    draw.panel(image.pixels, boxes, height=240, width=320).save(file, "JPEG", quality=82)
    jpeg = base64.b64encode(file.getvalue()).decode("ascii")
    return Card(name=show(item.path.name), jpeg=jpeg, label=label, answer=answer)

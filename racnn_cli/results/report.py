"""`racnn report`: one page about a run that needs nothing else, neither a network nor another file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import racnn_cli
from racnn_cli.core.model import sizes_of
from racnn_cli.data.decode import read_image, show
from racnn_cli.data.index import Item, build_index, labelled
from racnn_cli.errors import RacnnError
from racnn_cli.events import EvalResult
from racnn_cli.export.loading import load
from racnn_cli.export.prediction import Prediction
from racnn_cli.recipe import Recipe
from racnn_cli.results import chart, draw, tables
from racnn_cli.run import Run, write_text

LOOKED_AT = 48  # images of the split that the gallery is chosen from
SHOWN = 12
DRAWN = 300  # classes of a heat map at most
STYLE = Path(__file__).with_name("report.css")


def write_report(run: Run) -> Path:
    """Write report.html from eval.json, log.jsonl and, where the data is still there, some of its images.

    Raises:
        RacnnError: eval.json or the weights are missing or damaged.
    """
    recipe, found, log = run.recipe(), run.read_eval(), [event.to_json() for event in run.epochs()]
    result = found.to_json()
    names = list(result["per_class"])
    per_class = [(name, entry["top1"], entry["n"]) for name, entry in result["per_class"].items()]
    sections = [
        _section("How often it is right", _answers(found), f"<p>{escape(tables.caption(found))}.</p>"),
        _section("Where it looks", _boxes(found)) if result["boxes"] else "",
        _section("Images", _gallery(run, recipe, result)),
        _section("Training", _curves(log)),
        _section("Each class", chart.bars(per_class)),
        _section("What is taken for what", _confusion(result["confusion"], names)),
        _section("Recipe", _recipe(run)),
    ]
    title = (
        f"{recipe.name}: {result['fused']['top1']:.1%} right on {result['images']} {result['split']} images"
    )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<header><h1>{escape(recipe.name)}</h1>{_summary(recipe, result)}</header>"
        f"<main>{''.join(sections)}</main>"
        f"<footer>racnn {racnn_cli.__version__}</footer></body></html>\n"
    )
    write_text(run.report, page)
    return run.report


def _section(title: str, *content: str) -> str:
    body = "".join(content)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _summary(recipe: Recipe, result: dict[str, Any]) -> str:
    low, high = result["interval"]
    sizes = " → ".join(f"{size} px" for size in sizes_of(recipe.model))
    facts = {
        "data": f"{recipe.data.path}, {result['classes']} classes",
        "network": f"{recipe.model.backbone}, {recipe.model.scales} scale{'s' * (recipe.model.scales > 1)}",
        "views": sizes,
        "weights at the start": recipe.model.weights,
        "seed": str(recipe.seed),
        "speed": f"{result['images_per_second']:.0f} images/s in this evaluation",
    }
    about = f"<p>{escape(recipe.about)}</p>" if recipe.about else ""
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items()
    )
    interval = f"95 % interval {low:.1%} to {high:.1%}"
    return (
        f'{about}<p class="headline"><b>{result["fused"]["top1"]:.1%}</b> right on {result["images"]} '
        f"{escape(result['split'])} images <small>({interval})</small></p><dl>{listed}</dl>"
    )


def _table(head: Iterable[str], rows: Iterable[tuple[str, list[str]]], last: str = "") -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr{" class=last" if name == last else ""}><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for name, values in rows
    )
    table = f'<table class="figures"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _answers(result: EvalResult) -> str:
    return _table(["", *tables.answer_columns(result)], tables.answer_rows(result), last="fused")


def _boxes(result: EvalResult) -> str:
    note = "<p>Sides are shares of the side of the scale before."
    if result.boxes[0].iou_mean is not None:
        note += " IoU, hit (its centre is inside) and coverage compare with the data's own boxes."
    return _table(["zoom", *tables.box_columns(result)], tables.box_rows(result)) + note + "</p>"


def _curves(log: list[dict[str, Any]]) -> str:
    epochs = [event for event in log if event.get("event") == "epoch"]
    if not epochs:
        return "<p>log.jsonl holds no epochs.</p>"
    bands: list[chart.Band] = []
    keys: list[tuple[Any, ...]] = []
    for number, event in enumerate(epochs, start=1):
        key = (event["stage"], event.get("phase"), event.get("round"))
        if keys and keys[-1] == key:
            bands[-1] = chart.Band(bands[-1].name, bands[-1].first, number, bands[-1].shaded)
        else:
            phase = (event.get("phase") or event["stage"]).removesuffix(" phase").removesuffix(" head")
            bands.append(chart.Band(phase, number, number, len(bands) % 2 == 1))
        keys.append(key)
    last = len(epochs)

    def series(name: str, colour: str, pick: Any, broken: bool = False) -> chart.Line:
        pieces: list[list[tuple[float, float]]] = []
        before = None
        for number, event in enumerate(epochs, start=1):
            try:
                value = pick(event)
            except (KeyError, IndexError):
                before = None
                continue
            if before is None or (broken and keys[number - 1] != before):
                pieces.append([])
            pieces[-1].append((number, float(value)))
            before = keys[number - 1]
        return chart.Line(name, colour, pieces)

    def scale(number: int, key: str) -> chart.Line:
        return series(
            f"scale {number + 1}", f"s{number + 1}", lambda event: event["val"]["scales"][number][key]
        )

    count = max(len(event["val"]["scales"]) for event in epochs)
    together = [
        series("average", "average", lambda event: event["val"]["average"]["top1"]),
        series("fused", "fused", lambda event: event["val"]["fused"]["top1"]),
    ]
    accuracy = [scale(number, "top1") for number in range(count)] + (together if count > 1 else [])
    loss = list(dict.fromkeys(name for event in epochs for name in event["train_loss"]))
    losses = [
        series(name, _loss_colour(name), lambda event, name=name: event["train_loss"][name], broken=True)
        for name in loss
    ]
    sides = [
        series(
            f"to scale {number + 2}",
            f"s{number + 2}",
            lambda event, n=number: event["val"]["boxes"][n]["side_mean"],
        )
        for number in range(count - 1)
    ]
    seconds = sum(event.get("seconds", 0.0) for event in epochs)
    charts = [
        chart.lines("Validation top-1", accuracy, bands, top=1.0),
        chart.lines("Validation NLL", [scale(number, "nll") for number in range(count)], bands),
        chart.lines("Training losses", losses, bands),
        chart.lines("Mean side of the boxes, share of the scale before", sides, bands, top=1.0),
    ]
    return f"<p>{last} epochs, {_duration(seconds)} of training.</p><div class=charts>{''.join(charts)}</div>"


def _loss_colour(name: str) -> str:
    """A loss has the colour of the scale that it is about: the last number of its name."""
    digits = [sign for sign in name if sign.isdigit()]
    return f"s{digits[-1]}" if digits else "fused"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _gallery(run: Run, recipe: Recipe, result: dict[str, Any]) -> str:
    """Some images of the split, wrong answers first, with what each scale saw."""
    classes = run.classes()
    try:
        if result["split"] == "all":
            data = recipe.data.model_copy(update={"path": result["data"]})
            items = labelled(data, seed=recipe.seed, classes=classes)
        else:
            items = build_index(recipe.data, seed=recipe.seed, classes=classes, verify=()).splits[
                result["split"]
            ]
        some = items[:: max(1, len(items) // LOOKED_AT)][:LOOKED_AT]
        answers = load(run).predict([item.path for item in some])
    except RacnnError as error:
        return f"<p>No images: {escape(error.message)}.</p>"
    pairs = [(item, answer) for item, answer in zip(some, answers, strict=True) if not answer.error]
    wrong = [pair for pair in pairs if pair[1].label != classes[pair[0].label]]
    right = [pair for pair in pairs if pair[1].label == classes[pair[0].label]]
    wrong = wrong[: max(SHOWN // 2, SHOWN - len(right))]
    step = max(1, len(right) // (SHOWN - len(wrong)))
    chosen = wrong + right[::step][: SHOWN - len(wrong)]
    cards = "".join(_card(item, answer, classes[item.label]) for item, answer in chosen)
    note = f"Chosen from {len(pairs)} {escape(result['split'])} images: wrong answers first, then right ones."
    return f"<p>{note}</p><div class=gallery>{cards}</div>"


def _card(item: Item, answer: Prediction, truth: str) -> str:
    image = read_image(item.path, least=480)
    shrunk = image.pixels.shape[1] / (image.stored_size[image.orientation >= 5])
    boxes = draw.upright_boxes(image, answer.boxes)
    boxes = [(x0 * shrunk, y0 * shrunk, x1 * shrunk, y1 * shrunk) for x0, y0, x1, y1 in boxes]
    file = io.BytesIO()
    draw.panel(image.pixels, boxes, height=240, width=320).save(file, "JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    good = answer.label == truth
    verdict = "right" if good else f"wrong: it is {escape(truth)}"
    steps = "".join(
        f'<li><i class="s{number}"></i>{escape(label)} {probability:.2f}</li>'
        for number, (label, probability) in enumerate(answer.scales, start=1)
    )
    return (
        f'<figure class="card {"good" if good else "bad"}">'
        f'<img src="data:image/jpeg;base64,{data}" alt="{escape(show(item.path.name))}" loading="lazy">'
        f"<figcaption><b>{escape(answer.label)}</b> {answer.probability:.1%} <em>{verdict}</em>"
        f"<ul>{steps}</ul></figcaption></figure>"
    )


def _confusion(cells: list[list[int]], names: list[str]) -> str:
    if len(names) > DRAWN:
        return f"<p>Most often, of {len(names)} classes.</p>{chart.confused(cells, names)}"
    told = "<p>Rows are the truth, columns the answers, shades the share of a row.</p>"
    return f'{told}<div class="scroll">{chart.confusion(cells, names)}</div>'


def _recipe(run: Run) -> str:
    text = run.recipe_file.read_text(encoding="utf-8")
    return f"<details><summary>recipe.toml, every value as used</summary><pre>{escape(text)}</pre></details>"

"""The commands that print the figures which README quotes: `racnn bench NAME`."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from racnn_cli.errors import RacnnError, did_you_mean
from racnn_cli.run import write_json, write_text

NAMES = ("seeds", "attention", "ablation", "gradient", "backbones", "export", "crop", "growth")
"""Each is a module of this package with `run(Options) -> Figures`."""

MOST_SEEDS = 1000
SEEDED = ("seeds", "attention", "ablation", "gradient")
TRAINING = ("seeds", "attention", "ablation")
RECIPES = {"seeds": "demo", "attention": "clutter", "ablation": "clutter", "growth": "own"}
"""Those that are about a recipe, and the one that each takes unless told."""


@dataclass(frozen=True)
class Options:
    """What a bench is asked for; `recipe` is for those of `RECIPES`, `quick` for those that train, `data` for two
    of these, `arms` for the ablation."""

    seeds: tuple[int, ...] = (0,)
    recipe: str = "demo"
    quick: bool = False
    data: str | None = None
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figures:
    """What a bench found: tables for a person, the same as plain values, and, of some, as an HTML page."""

    tables: list[Table]
    values: dict[str, Any] = field(default_factory=dict)
    page: str = ""


def run_bench(
    name: str,
    json_path: Path | None,
    seeds: str | None,
    recipe: str | None = None,
    quick: bool = False,
    data: str | None = None,
    arms: Sequence[str] = (),
) -> None:
    """Measure, print, and write the same figures as JSON if asked (and a page beside it, where there is one).

    Args:
        name: one of `NAMES`.
        json_path: file for the figures.
        seeds: such as `0-4` or `0,3,7`; None: 0-4. Only those of `SEEDED` take it.
        recipe: what it is about; None: as `RECIPES` says. Only these benches take it.
        quick: train on a small share of the data with few epochs.
        data: for attention and ablation: the data instead of the recipe's; of `clutter`, the folder of
            the Fashion-MNIST files.
        arms: for the ablation: only these, and the default.

    Raises:
        RacnnError: no such bench, an option that it does not take, or what the measured thing itself raises.
    """
    if name not in NAMES:
        raise RacnnError(
            f"there is no bench {name!r}{did_you_mean(name, NAMES, cutoff=0.55)}",
            f"one of {', '.join(NAMES)}",
        )
    takes = {
        "--seeds": (seeds is not None, SEEDED),
        "--recipe": (recipe is not None, RECIPES),
        "--quick": (quick, TRAINING),
        "--data": (data is not None, ("attention", "ablation")),
        "--arm": (bool(arms), ("ablation",)),
    }
    extra = [flag for flag, (given, benches) in takes.items() if given and name not in benches]
    if extra:
        raise RacnnError(f"the bench {name} takes no {' and no '.join(extra)}", f"`racnn bench {name}`")
    if json_path is not None and json_path.suffix != ".json":
        raise RacnnError(f"--json {json_path} does not end in .json", "--json NAME.json")
    chosen = parse_seeds(seeds or "0-4") if name in SEEDED else (0,)
    options = Options(chosen, recipe or RECIPES.get(name, ""), quick, data, tuple(arms))
    figures = importlib.import_module(f"{__name__}.{name}").run(options)
    on, console = machine(), Console(highlight=False)
    for table in figures.tables:
        # As wide as its content where the output is no terminal: a table that is cut says nothing.
        Console(highlight=False, width=None if console.is_terminal else 160).print(table)
    used = ", ".join(map(str, options.seeds))
    many = "seeds" if len(options.seeds) > 1 else "seed"
    console.print(escape(f"{describe(on)}; {many} {used}"), soft_wrap=True)
    if json_path is not None:
        write_json(json_path, {"bench": name, "machine": on, "seeds": list(options.seeds), **figures.values})
        if figures.page:
            write_text(json_path.with_suffix(".html"), figures.page)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-4`, `0,3,7` or `0-2,9` to numbers, in the order given and each once.

    Raises:
        RacnnError: it is something else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = (piece.strip() for piece in part.partition("-"))
        if not low.isdecimal() or (dash and not high.isdecimal()) or int(high or low) < int(low):
            raise RacnnError(
                f"--seeds {text}: {part.strip()!r} is no seed and no range", "--seeds 0-4, or 0,3,7"
            )
        if int(high or low) - int(low) >= MOST_SEEDS:
            raise RacnnError(f"--seeds {text}: more than {MOST_SEEDS} seeds", "--seeds 0-4, or 0,3,7")
        seeds += range(int(low), int(high or low) + 1)
    return tuple(dict.fromkeys(seeds))


def machine() -> dict[str, Any]:
    """What the figures were taken on: the processor, its cores, threads in use, torch and its device."""
    import torch

    from racnn_cli.core.device import select_device

    where = select_device()
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if where.type == "cuda" else where.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe(on: Mapping[str, Any]) -> str:
    """The machine in one line."""
    counts = f"{on['cores']} cores, {on['threads']} thread(s)"
    return f"{on['cpu']}, {counts}, device {on['device']}, torch {on['torch']}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()

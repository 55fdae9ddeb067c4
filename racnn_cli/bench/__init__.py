"""The benchmarks behind docs/benchmarks.md: `racnn bench NAME`."""

from __future__ import annotations

import importlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from racnn_cli.errors import RecipeError, did_you_mean
from racnn_cli.run import write_json

NAMES = ("seeds", "attention", "ablation", "fusion", "folds", "gradient", "export")
"""Each is a module of this package with `run(Options) -> BenchResult`."""

RECIPES = {"seeds": "demo", "attention": "clutter", "ablation": "clutter", "fusion": "clutter", "folds": "own"}
"""Default recipe of the benches that train."""
SEEDED = (*RECIPES, "gradient")
MAX_SEEDS = 1000


@dataclass(frozen=True)
class Options:
    """Options of a bench.

    Attributes:
        seeds: to report.
        recipe: name or file.
        quick: a small test.
        data: instead of the recipe's.
        arms: of the ablation; empty: all.
        choose: seeds on which each arm's learning rate is chosen first; empty: the recipe's learning rates.
    """

    seeds: tuple[int, ...] = (0,)
    recipe: str = "demo"
    quick: bool = False
    data: str | None = None
    arms: tuple[str, ...] = ()
    choose: tuple[int, ...] = ()


@dataclass(frozen=True)
class BenchResult:
    """Tables to print, and the same results as plain values for JSON."""

    tables: list[Table]
    values: dict[str, Any] = field(default_factory=dict)


def run_bench(
    name: str,
    *,
    json_path: Path | None = None,
    seeds: str | None = None,
    recipe: str | None = None,
    quick: bool = False,
    data: str | None = None,
    arms: Sequence[str] = (),
    choose: str | None = None,
) -> None:
    """Run a bench, print its tables and optionally write the results as JSON.

    Args:
        name: one of `NAMES`.
        json_path: file to write the results to.
        seeds: such as `0-4` or `0,3,7`; None: 0-4.
        recipe, quick, data, arms: see `Options`; a recipe of None means the default in `RECIPES`.
        choose: as `seeds`, and none of them; None: nothing is chosen.

    Raises:
        RecipeError: an unknown bench, or an option that the bench does not take.
    """
    if name not in NAMES:
        suggestion = did_you_mean(name, NAMES, cutoff=0.55)
        raise RecipeError(f"there is no bench {name!r}{suggestion}", f"one of {', '.join(NAMES)}")
    allowed = {
        "--seeds": (seeds is not None, SEEDED),
        "--recipe": (recipe is not None, RECIPES),
        "--quick": (quick, RECIPES),
        "--data": (data is not None, ("attention", "ablation", "fusion", "folds")),
        "--arm": (bool(arms), ("ablation", "folds")),
        "--choose": (choose is not None, ("attention",)),
    }
    extra = [flag for flag, (is_set, benches) in allowed.items() if is_set and name not in benches]
    if extra:
        raise RecipeError(f"the bench {name} takes no {' and no '.join(extra)}", f"`racnn bench {name}`")
    if json_path is not None and json_path.suffix != ".json":
        raise RecipeError(f"--json {json_path} does not end in .json", "--json NAME.json")
    numbers = parse_seeds(seeds or ("0" if name == "folds" else "0-4")) if name in SEEDED else (0,)
    recipe = recipe or RECIPES.get(name, "")
    choosing = parse_seeds(choose) if choose is not None else ()
    if both := sorted(set(choosing) & set(numbers)):
        raise RecipeError(f"seed {both[0]} is in --choose and in --seeds", "choose on other seeds than those reported")
    options = Options(seeds=numbers, recipe=recipe, quick=quick, data=data, arms=tuple(arms), choose=choosing)
    result = importlib.import_module(f"{__name__}.{name}").run(options)
    machine, console = describe_machine(), Console(highlight=False, emoji=False)
    for table in result.tables:
        # Without a terminal, the default width of 80 would truncate cells.
        Console(highlight=False, emoji=False, width=None if console.is_terminal else 160).print(table)
    summary = "{cpu}, {cores} cores, {threads} thread(s), device {device}, torch {torch}".format(**machine)
    label = "seeds" if len(numbers) > 1 else "seed"
    console.print(escape(f"{summary}; {label} {', '.join(map(str, numbers))}"), soft_wrap=True)
    if json_path is not None:
        write_json(json_path, {"bench": name, "machine": machine, "seeds": list(numbers), **result.values})


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse `0-4`, `0,3,7` or `0-2,9` into unique numbers, in the order given.

    Raises:
        RecipeError: the text is anything else.
    """
    hint = "--seeds 0-4, or 0,3,7"
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = (piece.strip() for piece in part.partition("-"))
        if not low.isdecimal() or (dash and not high.isdecimal()) or int(high or low) < int(low):
            raise RecipeError(f"--seeds {text}: {part.strip()!r} is neither a seed nor a range", hint)
        if int(high or low) - int(low) >= MAX_SEEDS:
            raise RecipeError(f"--seeds {text}: more than {MAX_SEEDS} seeds", hint)
        seeds += range(int(low), int(high or low) + 1)
    return tuple(dict.fromkeys(seeds))


def describe_machine() -> Mapping[str, Any]:
    """Return the processor, its cores, the number of threads, the device, and the versions of torch and Python."""
    import torch

    from racnn_cli.core.device import select_device

    device = select_device()
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        if name := re.search(r"^model name\s*: *(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE):
            cpu = name[1].strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

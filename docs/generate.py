"""Write docs/recipes.md from the recipe schema and the shipped recipes.

    python docs/generate.py

`tests/test_docs.py` fails when the page is out of date.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

from racnn_cli import recipe as recipes
from racnn_cli.recipe import Recipe

PAGE = Path(__file__).resolve().parent / "recipes.md"
INTRO = """\
# Recipes

This page lists the shipped recipes and every recipe key.

`python docs/generate.py` generates it from the schema in `racnn_cli/recipe.py`.

A recipe is a TOML file that sets everything about a run. It needs only the values that differ from
the defaults. Unknown keys and values out of range are errors. [Training](training.md) shows how to
select a recipe and override single values.

```sh
racnn recipes ls
racnn recipes show demo
racnn recipes keys 'alternate.*'
racnn train own --data my-images --set train.batch=32 --set pretrain_cnn.epochs=20
```

## Shipped recipes

| Recipe | Purpose |
|---|---|
"""


def page() -> str:
    """The text of docs/recipes.md."""
    rows = [f"| `{name}` | {recipes.load(name).about} |" for name in recipes.names()]
    lines = [INTRO + "\n".join(rows)]
    section = None
    for info in recipes.describe_keys():
        prefix = info.key.rpartition(".")[0]
        if prefix != section:
            section = prefix
            lines += ["", f"## Section `{section}`" if section else "## Top-level keys", ""]
            lines += _purpose(section)
            lines += ["| Key | Default | Allowed | Description |", "|---|---|---|---|"]
        default = f"`{info.default}`" if info.default else "required"
        cells = [f"`{info.key}`", default, info.allowed, info.description]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _purpose(section: str) -> list[str]:
    """The docstring of a section's class, as a paragraph."""
    model: Any = Recipe
    for name in filter(None, section.split(".")):
        model = model.model_fields[name].annotation
    return [*textwrap.wrap(inspect.getdoc(model) or "", 100), ""] if model is not Recipe else []


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")

"""HTML pages from the templates in this folder; every value is escaped unless it is Markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

import racnn_cli

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["percent"] = "{:.1%}".format


def render(template: str, **values: Any) -> str:
    """Render a template that extends `page.html.jinja`."""
    return _ENVIRONMENT.get_template(template).render(values, version=racnn_cli.__version__)

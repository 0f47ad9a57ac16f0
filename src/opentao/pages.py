"""Templates of pages that are written once and read offline: all is escaped, a name that is missing is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from opentao.progress import duration
from opentao.show import visible
from opentao.summary import interval, measured, number, percent, percent_interval, share, signed


def load_template(name: str, filters: Mapping[str, Callable[..., Any]] | None = None) -> Template:
    """A template of the package's data folder; `filters` are its own, beside those for numbers."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        loader=FunctionLoader(lambda wanted: (files("opentao") / "data" / wanted).read_text(encoding="utf-8")),
    )
    environment.filters |= {
        "number": number,
        "measured": measured,
        "signed": signed,
        "interval": interval,
        "percent": percent,
        "percent_interval": percent_interval,
        "share": share,
        "duration": duration,
    } | dict(filters or {})
    return environment.get_template(name)


def _harmless(value: Any) -> Any:
    """Control characters in text from outside are spelled out; our own markup passes."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

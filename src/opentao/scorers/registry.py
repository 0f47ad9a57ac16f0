"""From a `ScorerConfig` to a scorer. `type` is looked up in this order:

1. a built-in name (`BUILT_IN`);
2. an entry point of the group `opentao.scorers`, so that an installed package can offer scorers by name;
3. `module:object`, importable from the current directory.

What is found is called as ``object(name=<label>, **args)`` and must return an object with that `name` and a method
`score(group)`. A class with such a constructor will do, and so will a function that builds one. A plain function that
judges one answer is not a scorer; wrap it with ``type: python``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from opentao.config import ScorerConfig
from opentao.errors import ConfigError
from opentao.scorers.calibration import calibrated
from opentao.scorers.plugin import import_object
from opentao.types import Scorer

ENTRY_POINTS = "opentao.scorers"
RESERVED = "reward"  # what a scores table calls the combined number
_CALL = "object(name=..., **args) that returns an object with `name` and `score(group)`"

BUILT_IN = {
    "citation": "opentao.scorers.verifiers.citation:Citation",
    "contains": "opentao.scorers.verifiers.contains:Contains",
    "exact": "opentao.scorers.verifiers.exact:Exact",
    "json_field": "opentao.scorers.verifiers.json_field:JsonField",
    "json_schema": "opentao.scorers.verifiers.json_schema:JsonSchema",
    "judge": "opentao.scorers.judge.scorer:Judge",
    "language": "opentao.scorers.verifiers.language:Language",
    "length": "opentao.scorers.verifiers.length:Length",
    "majority": "opentao.scorers.verifiers.majority:Majority",
    "python": "opentao.scorers.verifiers.python:Python",
    "python_tests": "opentao.scorers.verifiers.python_tests:PythonTests",
    "regex": "opentao.scorers.verifiers.regex:Regex",
    "repetition": "opentao.scorers.verifiers.repetition:Repetition",
    "reward_model": "opentao.scorers.reward_model:RewardModelScorer",
    "sql": "opentao.scorers.verifiers.sql:Sql",
}


def known_types() -> list[str]:
    """Built-in names and installed entry points, sorted."""
    return sorted({*BUILT_IN, *entry_points(group=ENTRY_POINTS).names})


def build_scorer(config: ScorerConfig) -> Scorer:
    """Find the scorer's factory and call it with ``name=config.label`` and ``**config.args``.

    Raises:
        ConfigError: reserved name, unknown type, wrong args, an object that is not a scorer, a bad calibration file.
    """
    if config.label == RESERVED:
        raise _error(config, f"{RESERVED!r} is the name of the combined number; give the scorer another `name`")
    factory = _find(config)
    try:
        scorer = factory(name=config.label, **config.args)
    except (TypeError, ValueError) as error:
        raise _error(config, f"{_reason(error)}; expected args: {_parameters(factory)}") from error
    checked = _checked(scorer, config)
    return checked if config.calibration is None else calibrated(checked, Path(config.calibration))


def module_path(config: ScorerConfig) -> str:
    """``module:object`` of a scorer that is installed or one's own; a built-in's type as it is."""
    return config.type if config.type in BUILT_IN else _entry_point(config) or config.type


def _error(config: ScorerConfig, message: str) -> ConfigError:
    named = "" if config.label == config.type else f" (type {config.type})"
    return ConfigError(f"{config.place}scorer {config.label}{named}: {message}")


def _find(config: ScorerConfig) -> Callable[..., Any]:
    path = BUILT_IN.get(config.type) or _entry_point(config) or config.type
    if ":" not in path:
        raise _error(config, f"unknown type; expected one of: {', '.join(known_types())}; or module:object")
    try:
        factory = import_object(path)
    except ValueError as error:
        raise _error(config, f"{error}; known types: {', '.join(known_types())}") from error
    if not callable(factory):
        raise _error(config, f"{path} is {type(factory).__name__}, expected a class or function called as {_CALL}")
    return cast(Callable[..., Any], factory)


def _entry_point(config: ScorerConfig) -> str | None:
    """Where the entry point leads, as ``module:object``; two packages that claim one name are an error."""
    paths = sorted({f"{point.module}:{point.attr}" for point in entry_points(group=ENTRY_POINTS, name=config.type)})
    if len(paths) > 1:
        raise _error(config, f"several installed packages offer it: {', '.join(paths)}; use one of these as the type")
    return paths[0] if paths else None


def _reason(error: TypeError | ValueError) -> str:
    """The first complaint of a validation, or the error's own text, on one line."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors(include_url=False)[0]
    where = "".join(f"{part}: " for part in first["loc"][:1])
    return where + first["msg"].removeprefix("Value error, ")


def _parameters(factory: Callable[..., Any]) -> str:
    """What a factory takes besides `name`."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some C callables have no signature
        return "unknown"
    return ", ".join(name for name in parameters if name != "name") or "none"


def _checked(scorer: Any, config: ScorerConfig) -> Scorer:
    if not callable(getattr(scorer, "score", None)) or not hasattr(scorer, "name"):
        raise _error(config, f"gave {type(scorer).__name__} without `name` and `score`; expected {_CALL}")
    if scorer.name != config.label:
        raise _error(config, f"its `name` is {scorer.name!r}, expected the name it was given, {config.label!r}")
    return cast(Scorer, scorer)

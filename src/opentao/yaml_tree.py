"""A YAML file as a tree that knows its lines, `--set` on it, and what is wrong with it; `config.py` makes settings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from opentao.errors import ConfigError


def read_yaml(path: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    """The file's keys and values, and its nodes, which know their lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, byte {error.start + 1} is not") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {_problem(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}:1: expected keys and values, got {'nothing' if tree is None else type(tree).__name__}"
        )
    try:
        _refuse_repeated(path, root)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, or an alias that holds itself") from None
    return tree, root


def _refuse_repeated(path: Path, node: yaml.Node | None) -> None:
    """YAML itself keeps the last of equal keys, and whatever stood under the first would be gone without a word."""
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in first:
                raise ConfigError(f"{path}:{line}: {name}: given twice, first on line {first[name]}")
            first[name] = line
            _refuse_repeated(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated(path, item)


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put ``a.b=value`` (the value is YAML) into the tree; sections that are not there are made."""
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, e.g. train.epochs=2")
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}  # not there, or null: a section that is off by default
        node = node[_item(node, part, override)] if isinstance(node, list) else node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {part} is not a section")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {_problem(error)}") from error
    node[_item(node, last, override) if isinstance(node, list) else last] = parsed


def _item(items: list[Any], part: str, override: str) -> int:
    if not (part.isdigit() and int(part) < len(items)):
        raise ConfigError(f"--set {override}: {part}: expected an item of the list, 0 to {len(items) - 1}")
    return int(part)


def line_of(node: yaml.Node | None, loc: Sequence[str]) -> int:
    """1-based line of the key at `loc`, or of its nearest parent that is in the file."""
    line = 1 if node is None else node.start_mark.line + 1
    for part in loc:
        children: list[tuple[str, int, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            children = [(k.value, k.start_mark.line, v) for k, v in node.value]
        elif isinstance(node, yaml.SequenceNode):
            children = [(str(i), v.start_mark.line, v) for i, v in enumerate(node.value)]
        found = next(((at, child) for name, at, child in children if name == part), None)
        if found is None:
            break
        line, node = found[0] + 1, found[1]
    return line


def mistake(error: ValidationError, model: type[BaseModel]) -> tuple[list[str], str]:
    """Where the first mistake is, and what it is, with the number of the others."""
    first, *rest = error.errors(include_url=False)
    loc = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if not loc and ": " in message:  # a check over several keys: its message starts with one of them
        key, _, message = message.partition(": ")
        loc = key.split(".")
    if first["type"] == "extra_forbidden":
        message = f"unknown key; expected one of: {', '.join(_known_keys(model, loc[:-1]))}"
    elif first["type"] == "missing":
        message = "is required"
    elif first["type"] in ("model_type", "model_attributes_type"):
        got = "nothing" if first["input"] is None else repr(first["input"])
        message = f"expected a section of keys and values, got {got}"
    elif "input" in first and not isinstance(first["input"], dict | list):
        message += f", got {first['input']!r}"
    return loc, message + (f" (and {len(rest)} more)" if rest else "")


def blamed(model: type[BaseModel], path: Path, overrides: Sequence[str], loc: list[str]) -> str | None:
    """The override that gave the key at `loc`, or the one after which the tree was not valid any more; else None."""
    given = [override for override in overrides if loc[: len(key := override.partition("=")[0].split("."))] == key]
    if given or not overrides:
        return given[-1] if given else None
    found = None
    tree, _ = read_yaml(path)
    for override in overrides:
        with suppress(ValidationError):
            model.model_validate(tree)
            found = override
        apply_override(tree, override)
    return found


def _known_keys(root: type[BaseModel], loc: Sequence[str]) -> list[str]:
    model: Any = root
    for part in loc:
        if part.isdigit():
            continue
        field = model.model_fields.get(part)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), root)
    return list(model.model_fields)

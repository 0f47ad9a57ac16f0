"""JSON as strictly as a program downstream would read it, and JSON Schema that hostile answers cannot hang.

Refused, though Python's parser takes them: NaN and Infinity (not JSON), a repeated key (readers disagree on which one
counts), numbers beyond a double, nesting deeper than `MAX_DEPTH`. The depth limit is a fixed rule and not the
interpreter's recursion limit, which would make a score depend on the caller's stack.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import regex
from jsonschema import Draft202012Validator, SchemaError, ValidationError, validators
from referencing import Registry

from opentao.scorers.verifiers.base import Unscored
from opentao.scorers.verifiers.text import search

MAX_DEPTH = 64
CLOSE, NOTHING = 1e-9, 1e-15  # numbers with a fraction are equal that differ by less: of the larger, or at all
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{\]}]', re.DOTALL)
_FENCE = re.compile(r"[ \t\r\n]*```(?:json)?[ \t]*\r?\n(.*)```[ \t\r\n]*", re.DOTALL)

JsonSchemaSource = dict[str, Any] | str
"""A schema, or the path of the JSON file that holds it."""


def parse_json(text: str, *, fences: bool = False) -> Any:
    """The value that is the whole text; with `fences`, a Markdown code fence around all of it is taken off.

    Raises:
        ValueError: not JSON, or refused (see above).
    """
    if fences and (fenced := _FENCE.fullmatch(text)):
        text = fenced[1]
    if _too_deep(text):
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return json.loads(
        text, parse_float=_number(float), parse_int=_number(int), parse_constant=_refuse, object_pairs_hook=_unique
    )


def _too_deep(text: str) -> bool:
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(text):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth > MAX_DEPTH:
            return True
    return False


def _number(convert: Callable[[str], float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        if math.isinf(float(text)):
            raise ValueError("a number beyond a double")
        return convert(text)

    return number


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a repeated key")
    return unique


def json_equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 equals 1.0, but not true."""
    return bool(Draft202012Validator({"const": right}).is_valid(left))


def json_close(left: Any, right: Any) -> bool:
    """`json_equal`, but for the last digits of numbers of which one has a fraction: 0.1 + 0.2 is 0.3."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(json_close(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(json_close(left[key], right[key]) for key in left)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (left, right))
    if numbers and float in (type(left), type(right)):
        try:
            return math.isclose(left, right, rel_tol=CLOSE, abs_tol=NOTHING)
        except OverflowError:  # a whole number beyond a double
            return False
    return json_equal(left, right)


def build_validator(source: JsonSchemaSource) -> Any:
    """A validator of the dialect that the schema names (2020-12 if none), which never opens the network for a `$ref`.

    Raises:
        ValueError: no such file, not JSON, or not a JSON Schema.
    """
    schema = _read(source) if isinstance(source, str) else source
    base = validators.validator_for(schema, default=Draft202012Validator)
    try:
        base.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a JSON Schema, at {error.json_path}: {error.message}") from error
    # A root that still names its dialect would make jsonschema go back to its own keywords at a `$ref` to it.
    schema = {key: value for key, value in schema.items() if key != "$schema"}
    return validators.extend(base, _SAFE_KEYWORDS)(schema, registry=Registry())


def _read(path: str) -> dict[str, Any]:
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{path}: expected an object, got {type(schema).__name__}")
    return schema


def is_valid(validator: Any, value: Any) -> bool:
    """True if the value meets the schema.

    Raises:
        Unscored: a pattern ran out of time, or the schema refers to itself without end.
    """
    try:
        return bool(validator.is_valid(value))
    except RecursionError as error:
        raise Unscored("too_deep", "the schema's references do not end within the recursion limit") from error


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "string") and not search(regex.compile(pattern), instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, subschema in patterns.items():
        compiled = regex.compile(pattern)
        for key, value in instance.items():
            if search(compiled, key):
                yield from validator.descend(value, subschema, path=key, schema_path=pattern)


def _additional_properties(validator: Any, extra: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    named = schema.get("properties", {})
    patterns = [regex.compile(pattern) for pattern in schema.get("patternProperties", {})]
    for key, value in instance.items():
        if key not in named and not any(search(pattern, key) for pattern in patterns):
            yield from validator.descend(value, extra, path=key)


def _multiple_of(validator: Any, step: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """In decimals, as both are written: 19.99 is a multiple of 0.01, which in binary it is not."""
    if validator.is_type(instance, "number") and Fraction(repr(instance)) % Fraction(repr(step)):
        yield ValidationError(f"{instance!r} is not a multiple of {step!r}")


# jsonschema's own versions search with `re`, which a schema's bad pattern and a model's answer can keep busy for ever.
_SAFE_KEYWORDS = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "multipleOf": _multiple_of,
}

"""Built-in verifiers: numbers worked out by hand, and the answers that a policy in search of reward would send."""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opentao.config import ScorerConfig
from opentao.errors import ConfigError
from opentao.scorers.registry import build_scorer
from opentao.scorers.run import run_scorer
from opentao.scorers.verifiers import text
from opentao.scorers.verifiers.length import Length
from opentao.scorers.verifiers.strict_json import MAX_DEPTH, json_close, json_equal, parse_json
from opentao.types import Group, Prompt, Response, Score

TICKET = {
    "type": "object",
    "properties": {
        "queue": {"enum": ["billing", "delivery"]},
        "urgent": {"type": "boolean"},
        "summary": {"type": "string", "maxLength": 10},
    },
    "required": ["queue", "urgent", "summary"],
    "additionalProperties": False,
}
VALID = '{"queue": "billing", "urgent": true, "summary": "late"}'


def group_of(*texts: str, tokens: int = 3, **meta: Any) -> Group:
    responses = tuple(
        Response(id=str(i), text=t, tokens_R=(7,) * tokens, sampler_logprobs_R=(-1.0,) * tokens, finish="stop")
        for i, t in enumerate(texts)
    )
    return Group(prompt=Prompt.from_text("Sort this.", **meta), responses=responses)


def scores(type_: str, args: dict[str, Any], group: Group) -> tuple[Score, ...]:
    return run_scorer(build_scorer(ScorerConfig(type=type_, args=args)), group)


def one(type_: str, args: dict[str, Any], text: str, **meta: Any) -> Score:
    return scores(type_, args, group_of(text, **meta))[0]


def value(type_: str, args: dict[str, Any], text: str, **meta: Any) -> float:
    score = one(type_, args, text, **meta)
    assert score.error is None
    return score.value


def bad_config(type_: str, args: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        build_scorer(ScorerConfig(type=type_, args=args))
    assert "\n" not in str(caught.value)


# --- strict JSON


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\ufeff{}",  # byte order mark
        "\u00a0{}",  # no-break space is not JSON white space
        "{} trailing",
        "{}{}",
        "{'a': 1}",
        '{"a": 1,}',
        '{"a": 01}',
        '{"a": 1} // why not',
        "NaN",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 400 + "}",
        '{"a": ' + "9" * 100_000 + "}",
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "\\u0062": 2}}',  # the same key, one of them escaped
        '{"a": "\n"}',
        '{"a": \uff11}',  # full-width digit
        "\u201c{}\u201d",
        "{\u200b}",
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000,
        '"' + '\\"' * 100_000,
        '{"a": "' + "\\" * 99_999,
        "```json\n{}\n```",
    ],
)
def test_what_is_not_json(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError):
        parse_json(text)
    assert value("json_schema", {"schema": {}}, text) == 0.0
    assert value("json_field", {"field": "a", "key": "a"}, text, a=1) == 0.0
    assert time.monotonic() - start < 2


def test_depth_is_counted_outside_strings_up_to_the_limit() -> None:
    parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(ValueError, match="nested"):
        parse_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    assert parse_json(json.dumps("[" * 500)) == "[" * 500
    assert parse_json('["\\"[[", []]') == ['"[[', []]
    assert parse_json("[" + "[]," * 500 + "[]]") == [[]] * 501


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=20,
    )
)
@settings(max_examples=100, deadline=None)
def test_whatever_json_writes_is_read_back(tree: Any) -> None:
    assert json_equal(parse_json(json.dumps(tree)), tree)


@given(st.text(alphabet='{}[]",:\\ 01eE-+.truefalsnNI`\n\ud800é', max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        parse_json(text, fences=True)


def test_numbers_with_a_fraction_are_equal_but_for_their_last_digits() -> None:
    assert json_close({"a": [0.1 + 0.2, 1]}, {"a": [0.3, 1.0]})
    assert json_close(1e300, 1e300 * (1 + 1e-12)) and json_close(0.0, 1e-16)
    for other in (0.3001, "0.3", True, [0.3], {"a": 0.3}, None):
        assert not json_close(0.3, other)
    assert not json_close(10**20, 10**20 + 1)
    assert not json_close(10**400, 0.5) and not json_close(0.0, 1e-12)
    assert not json_close([1.0], [1.0, 2.0])
    assert not json_close(1.0, True)


def test_json_equality_knows_booleans_from_numbers() -> None:
    assert json_equal(1, 1.0) and json_equal([{"a": True}], [{"a": True}])
    assert not json_equal(True, 1) and not json_equal([0], [False]) and not json_equal("1", 1)


# --- json_schema


@pytest.mark.parametrize(
    ("price", "expected"),
    [("19.99", 1.0), ("0.07", 1.0), ("4.35", 1.0), ("20", 1.0), ("1e3", 1.0), ("19.995", 0.0), ('"20"', 0.0)],
)
def test_multiples_are_of_decimals(price: str, expected: float) -> None:
    schema = {"properties": {"price": {"type": "number", "multipleOf": 0.01}}}
    assert value("json_schema", {"schema": schema}, f'{{"price": {price}}}') == expected


def test_json_schema_is_all_or_nothing() -> None:
    group = group_of(VALID, f" \n{VALID}\n", "{}", "not json", VALID + " Hope this helps!", f"Here: {VALID}")
    assert [s.value for s in scores("json_schema", {"schema": TICKET}, group)] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("queue: billing", 0.0),
        ('{"queue": "billing"', 0.1),
        ("[1, 2", 0.1),
        (VALID + " Hope this helps!", 0.1),
        ("7", 0.0),  # JSON, but no object or array
        ("[]", 0.4),
        ("{}", 0.4),
        ('{"queue": "billing"}', 0.4 + 0.5 / 3),
        ('{"queue": "nowhere", "urgent": 1, "summary": "late"}', 0.4 + 0.5 / 3),  # only the summary is right
        ('{"queue": "billing", "urgent": true, "summary": "far too long"}', 0.4 + 1.0 / 3),
        ('{"queue": "billing", "urgent": true, "summary": "late", "x": 1}', 0.9),  # all there, and one too many
        (VALID, 1.0),
    ],
)
def test_json_schema_partial(text: str, expected: float) -> None:
    assert value("json_schema", {"schema": TICKET, "partial": True}, text) == pytest.approx(expected, abs=1e-12)


def test_partial_follows_references_and_takes_a_missing_property_schema_as_anything() -> None:
    schema = {
        "$defs": {"id": {"type": "integer"}},
        "properties": {"id": {"$ref": "#/$defs/id"}},
        "required": ["id", "x"],
    }
    args = {"schema": schema, "partial": True}
    assert value("json_schema", args, '{"id": 1}') == pytest.approx(0.65)
    assert value("json_schema", args, '{"id": "1"}') == pytest.approx(0.4)
    assert value("json_schema", args, '{"id": "1", "x": null}') == pytest.approx(0.65)
    assert value("json_schema", args, '{"id": 1, "x": null}') == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"```json\n{VALID}\n```", 1.0),
        (f"\n```\n{VALID}```\n", 1.0),
        (VALID, 1.0),
        (f"```json\n{VALID}\n``` done", 0.0),
        (f"Sure:\n```json\n{VALID}\n```", 0.0),
        (f"```json\n{VALID}\n```\n```json\n{VALID}\n```", 0.0),
        ("```json\n```", 0.0),
        ("```" * 20_000, 0.0),
    ],
)
def test_json_schema_fences(text: str, expected: float) -> None:
    assert value("json_schema", {"schema": TICKET, "fences": True}, text) == expected
    assert value("json_schema", {"schema": TICKET}, text) == float(text == VALID)


def test_json_schema_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "ticket.json"
    path.write_text(json.dumps(TICKET))
    assert value("json_schema", {"schema": str(path)}, VALID) == 1.0
    path.write_text("[1]")
    bad_config("json_schema", {"schema": str(path)}, "expected an object, got list")
    path.write_text("{")
    bad_config("json_schema", {"schema": str(path)}, "ticket.json: Expecting")
    bad_config("json_schema", {"schema": str(tmp_path / "none.json")}, "No such file")


def test_json_schema_bad_args() -> None:
    bad_config("json_schema", {}, "schema: .*expected args: schema, partial, fences")
    bad_config("json_schema", {"schema": {"type": "objekt"}}, r"not a JSON Schema, at \$.type: 'objekt'")
    bad_config("json_schema", {"schema": {"pattern": "("}}, "not a JSON Schema")
    bad_config("json_schema", {"schema": {}, "partial": "perhaps"}, "partial: .*boolean")
    bad_config("json_schema", {"schema": {}, "strict": True}, "strict: Unexpected keyword")


def test_a_recursive_schema_at_full_depth() -> None:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "array", "items": {"$ref": "#"}}
    assert value("json_schema", {"schema": schema}, "[" * MAX_DEPTH + "]" * MAX_DEPTH) == 1.0
    assert value("json_schema", {"schema": schema}, "[[[1]]]") == 0.0


def test_a_schema_that_refers_to_itself_without_end_is_unscored() -> None:
    assert one("json_schema", {"schema": {"$ref": "#"}}, "{}").error.startswith("too_deep: ")


def test_a_remote_reference_is_not_fetched() -> None:
    score = one("json_schema", {"schema": {"$ref": "http://127.0.0.1:9/schema.json"}}, "{}")
    assert not score.scored and "Unresolvable" in score.error


@pytest.mark.parametrize(
    ("schema", "hostile"),
    [
        ({"items": {"pattern": "^(a|aa)+$"}}, json.dumps(["a" * 5000 + "b"])),
        ({"patternProperties": {"^(a|aa)+$": False}}, json.dumps({"a" * 5000 + "b": 1})),
        ({"patternProperties": {"^(a|aa)+$": True}, "additionalProperties": False}, json.dumps({"a" * 5000 + "b": 1})),
        # The same behind a reference to a root that names its dialect.
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "pattern": "^(a|aa)+$",
                "properties": {"x": {"$ref": "#"}},
            },
            json.dumps({"x": "a" * 5000 + "b"}),
        ),
    ],
)
def test_a_catastrophic_pattern_in_a_schema_is_stopped(
    schema: dict[str, Any], hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "TIMEOUT", 0.1)
    harmless, timed_out = scores("json_schema", {"schema": schema}, group_of("{}", hostile))
    assert harmless.value == 1.0
    assert timed_out.error.startswith("timeout: ")


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"items": {"pattern": "^a"}}, '["ab", 3]', '["ba"]'),
        ({"patternProperties": {"^n_": {"type": "integer"}}}, '{"n_a": 1, "x": "y"}', '{"n_a": "1"}'),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "null"}}, '{"a": 1, "b": null}', '{"b": 1}'),
        ({"patternProperties": {"^n_": {}}, "additionalProperties": False}, '{"n_a": 1}', '{"m": 1}'),
        ({"additionalProperties": False}, "[1]", '{"m": 1}'),
        ({"multipleOf": 0.5}, "4.5", "4.25"),
        ({"uniqueItems": True}, "[1, true, [0], [false]]", "[1, 1.0]"),
    ],
)
def test_schema_keywords(schema: dict[str, Any], good: str, bad: str) -> None:
    assert [s.value for s in scores("json_schema", {"schema": schema}, group_of(good, bad))] == [1.0, 0.0]


def test_a_huge_number_does_not_harm_its_neighbours() -> None:
    group = group_of("3", "9" * 308, "9" * 5000, "1e-9999", "-0")
    assert [s.error for s in scores("json_schema", {"schema": {"multipleOf": 0.5}}, group)] == [None] * 5


# --- json_field

FIELD = {"field": "queue", "key": "label"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (VALID, 1.0),
        ('{"queue": "delivery"}', 0.0),
        ('{"queue": "Billing"}', 0.0),
        ('{"queue": ["billing"]}', 0.0),
        ('{"queue": null}', 0.0),
        ('{"queue": "billing", "queue": "delivery"}', 0.0),
        ('{"queue": "b\\u0069lling"}', 1.0),
        ('{"queue": "bi\\u200blling"}', 0.0),
        ('{"other": "billing"}', 0.0),
        ('["queue", "billing"]', 0.0),
        ('"billing"', 0.0),
        ("billing", 0.0),
        ("{", 0.0),
    ],
)
def test_json_field(text: str, expected: float) -> None:
    assert value("json_field", FIELD, text, label="billing") == expected


def test_json_field_with_schema_and_fences() -> None:
    args = {**FIELD, "schema": TICKET}
    assert value("json_field", args, VALID, label="billing") == 1.0
    assert value("json_field", args, '{"queue": "billing"}', label="billing") == 0.0
    fenced = f"```json\n{VALID}\n```"
    assert value("json_field", args, fenced, label="billing") == 0.0
    assert value("json_field", {**args, "fences": True}, fenced, label="billing") == 1.0


def test_json_field_compares_json_values() -> None:
    for label, answer, expected in [(1, "1.0", 1.0), (1, "true", 0.0), (1, '"1"', 0.0), (False, "false", 1.0)]:
        assert value("json_field", FIELD, f'{{"queue": {answer}}}', label=label) == expected


def test_json_field_with_labels_from_a_table_of_texts() -> None:
    """All cells of CSV are text; an answer with the number is right, and so is one with the text."""
    cases = {
        "12.5": {"12.5": 1.0, '"12.5"': 1.0, "12.50": 1.0, "12": 0.0, '"12.50"': 0.0},
        "True": {"true": 1.0, "false": 0.0, "1": 0.0},
    }
    for label, answers in cases.items():
        for answer, expected in answers.items():
            assert value("json_field", FIELD, f'{{"queue": {answer}}}', label=label) == expected
    assert value("json_field", FIELD, '{"queue": 7}', label="seven") == 0.0


def test_json_field_without_a_label_is_unscored_even_for_invalid_json() -> None:
    for group in (group_of(VALID, "{"), group_of(VALID, "{", label=None)):
        errors = {s.error.partition(":")[0] for s in scores("json_field", FIELD, group)}
        assert errors == {"missing_key"}


# --- regex


def test_regex() -> None:
    group = group_of("order 12 sent", "12", "", "twelve", "\uff11\uff12")
    assert [s.value for s in scores("regex", {"pattern": "[0-9]+"}, group)] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [s.value for s in scores("regex", {"pattern": "[0-9]+", "full": True}, group)] == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert value("regex", {"pattern": r"\d+"}, "\uff11") == 1.0  # any script's digits...
    assert value("regex", {"pattern": r"(?a)\d+"}, "\uff11") == 0.0  # ...unless told otherwise
    assert value("regex", {"pattern": "a.b", "full": True}, "a\nb") == 0.0
    assert value("regex", {"pattern": "[0-9]+", "full": True}, "12\n") == 0.0


@pytest.mark.parametrize("pattern", ["^(a|aa)+$", "^(a|a)*$", "^((a*)*)*$", "(a+)+b\\1c"])
def test_a_catastrophic_pattern_is_stopped(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "TIMEOUT", 0.1)
    start = time.monotonic()
    found = scores("regex", {"pattern": pattern}, group_of("a" * 5000 + "!", "aa"))
    assert time.monotonic() - start < 3
    assert found[1].scored  # the neighbour is not harmed
    assert found[0].value == 0.0 or found[0].error.startswith("timeout: ")


def test_the_timeout_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "TIMEOUT", 0.1)
    score = one("regex", {"pattern": "^(a|aa)+$"}, "a" * 5000 + "!")
    assert math.isnan(score.value) and score.error == "timeout: pattern '^(a|aa)+$' took over 0.1 s"


def test_regex_bad_args() -> None:
    bad_config("regex", {"pattern": "("}, r"pattern '\('")
    bad_config("regex", {"pattern": 5}, "pattern: .*string")
    bad_config("regex", {}, "expected args: pattern, full")


# --- exact


@pytest.mark.parametrize(
    ("args", "text", "expected"),
    [
        ({}, " Paris\n", 1.0),
        ({"strip": False}, " Paris\n", 0.0),
        ({}, "paris", 0.0),
        ({"casefold": True}, "PARIS", 1.0),
        ({}, "Paris.", 0.0),
        ({}, "", 0.0),
        ({}, "P\u0430ris", 0.0),  # Cyrillic a
        ({}, "Pa\u200bris", 0.0),  # zero-width space
        ({"casefold": True}, "\uff30aris", 0.0),  # full-width P
    ],
)
def test_exact(args: dict[str, Any], text: str, expected: float) -> None:
    assert value("exact", {"target": "Paris", **args}, text) == expected
    assert value("exact", {"key": "city", **args}, text, city="Paris") == expected


def test_an_empty_label_is_none() -> None:
    assert [s.error for s in scores("exact", {"key": "city"}, group_of("", "Paris", city=" "))] == [
        "bad_key: meta['city'] is empty"
    ] * 2


def test_exact_normalises_unicode() -> None:
    assert value("exact", {"target": "caf\u00e9"}, "cafe\u0301") == 1.0
    assert value("exact", {"target": "STRASSE", "casefold": True}, "stra\u00dfe") == 1.0


def test_exact_labels() -> None:
    assert value("exact", {"key": "n"}, "42", n=42) == 1.0
    for label in (True, 1.5, ["42"]):
        assert one("exact", {"key": "n"}, "42", n=label).error.startswith("bad_key: meta['n'] is ")
    assert one("exact", {"key": "n"}, "42", m=1).error == "missing_key: the prompt's meta has no 'n'; it has ['m']"


def test_exact_bad_args() -> None:
    bad_config("exact", {}, "give either target or key")
    bad_config("exact", {"target": "a", "key": "b"}, "give either target or key")


# --- contains


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"strings": ["refund", "sorry"]}, 1.0),
        ({"strings": ["refund", "Sorry"]}, 0.0),
        ({"strings": ["refund", "Sorry"], "casefold": True}, 1.0),
        ({"strings": ["refund", "Sorry"], "mode": "any"}, 1.0),
        ({"strings": ["credit", "voucher"], "mode": "any"}, 0.0),
        ({"strings": "refund"}, 1.0),
        ({"strings": "cafe\u0301"}, 1.0),
    ],
)
def test_contains(args: dict[str, Any], expected: float) -> None:
    assert value("contains", args, "We are sorry; your refund for the caf\u00e9 is on its way.") == expected


def test_contains_labels() -> None:
    args = {"key": "facts"}
    assert value("contains", args, "a and b", facts=["a", "b"]) == 1.0
    assert value("contains", args, "a and b", facts="c") == 0.0
    assert value("contains", args, "in 1984", facts=1984) == 1.0
    assert value("contains", {**args, "mode": "any"}, "a", facts=["a", "b"]) == 1.0
    for label in ([], "", ["a", ""], [None], {"a": 1}):
        assert one("contains", args, "a", facts=label).error.startswith("bad_key: ")
    assert one("contains", args, "a").error.startswith("missing_key: ")


def test_contains_bad_args() -> None:
    for args in ({"strings": []}, {"strings": ""}, {"strings": ["a", ""]}):
        bad_config("contains", args, "every answer contains an empty string")
    bad_config("contains", {}, "give either strings or key")
    bad_config("contains", {"strings": "a", "mode": "some"}, "mode: .*'all' or 'any'")


# --- length


@pytest.mark.parametrize(
    ("num_words", "expected"),
    [(0, 0.0), (1, 0.0), (3, 0.5), (4, 0.75), (5, 1.0), (8, 1.0), (9, 0.75), (12, 0.0), (99, 0.0)],
)
def test_length_in_words(num_words: int, expected: float) -> None:
    args = {"min": 5, "max": 8, "slack": 4}
    assert value("length", args, " ".join(["w"] * num_words)) == expected


def test_length_units() -> None:
    assert value("length", {"max": 3, "unit": "characters"}, "abc") == 1.0
    assert value("length", {"max": 3, "unit": "characters"}, "abc ") == 0.0  # slack 0: a hard limit
    assert scores("length", {"min": 10, "unit": "tokens", "slack": 5}, group_of("a", tokens=8))[0].value == 0.6
    assert value("length", {"min": 2}, "\u3000one\u00a0two\n") == 1.0
    assert value("length", {"min": 2}, "one\u200btwo") == 0.0  # a zero-width space is no white space


def test_length_in_tokens_of_an_answer_from_elsewhere() -> None:
    group = Group.of_texts(Prompt.from_text("x"), ["some words", ""])
    found = scores("length", {"max": 3, "unit": "tokens"}, group)
    assert (found[0].error or "").startswith("no_tokens: ") and found[1].value == 1.0
    found = scores("repetition", {"unit": "tokens"}, group)
    assert (found[0].error or "").startswith("no_tokens: ") and found[1].value == 1.0


def test_length_bad_args() -> None:
    bad_config("length", {}, "give min, max or both")
    bad_config("length", {"min": 3, "max": 2}, "min 3 is above max 2")
    bad_config("length", {"min": -1}, "min: .*greater than or equal to 0")
    bad_config("length", {"min": 1, "unit": "lines"}, "unit: ")


# --- python

JUDGE = """
import sys

def judge(prompt, text):
    answers = {"half": 0.5, "yes": True, "none": None, "nan": float("nan"), "inf": float("inf"), "text": "1.0"}
    if text == "label":
        return prompt.meta["label"]
    if text == "stop":
        raise KeyboardInterrupt
    if text == "deep":
        return judge(prompt, text)
    return answers[text]

VALUE = 3
"""


def test_python(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judge_test_python.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    args = {"function": "judge_test_python:judge"}
    group = group_of("half", "yes", "none", "nan", "inf", "text", "other", "deep", "label", label=2)
    found = scores("python", args, group)
    assert [s.value for s in found if s.scored] == [0.5, 1.0, 2.0]
    assert [s.error.partition(":")[0] for s in found if not s.scored] == [
        "no_score",
        "no_score",
        "not_finite",
        "not_a_number",
        "KeyError",
        "RecursionError",
    ]
    assert found[6].error == "KeyError: 'other'"
    with pytest.raises(KeyboardInterrupt):
        scores("python", args, group_of("stop"))
    bad_config("python", {"function": "judge_test_python:VALUE"}, "is int, expected a function")
    bad_config("python", {"function": "judge_test_python:nothing"}, "cannot be imported")
    bad_config("python", {"function": "judge_test_python"}, "not of the form module:name")


# --- majority


def test_majority_counts_votes() -> None:
    texts = ("The answer is 4.", "so: answer is  4 .", "the ANSWER IS 5.", "no idea")
    args = {"pattern": r"(?i)answer is\s+(\S+?)\s*\."}
    assert [s.value for s in scores("majority", args, group_of(*texts))] == [1.0, 1.0, 0.0, 0.0]
    shares = scores("majority", args | {"as_share": True}, group_of(*texts))
    assert [s.value for s in shares] == [0.5, 0.5, 0.0, 0.0]  # of all four; one vote is not `least`
    alone = scores("majority", args | {"as_share": True, "least": 1}, group_of(texts[2], *["no idea"] * 3))
    assert [s.value for s in alone] == [0.25, 0.0, 0.0, 0.0]


def test_majority_takes_the_last_match_and_all_winners_of_a_tie() -> None:
    args = {"pattern": r"\d+"}
    assert [s.value for s in scores("majority", args, group_of("1 then 2", "2", "3", "3", "x"))] == [1, 1, 1, 1, 0]


def test_majority_of_a_json_field() -> None:
    texts = ('{"queue": "Billing"}', '```json\n{"queue": "billing "}\n```', '{"queue": ["billing"]}', "billing")
    assert [s.value for s in scores("majority", {"field": "queue"}, group_of(*texts))] == [1.0, 1.0, 0.0, 0.0]


def test_majority_of_numbers() -> None:
    texts = ['{"queue": 12}', '{"queue": 12.0}', '{"queue": 13}']
    assert [s.value for s in scores("majority", {"field": "queue"}, group_of(*texts))] == [1.0, 1.0, 0.0]


def test_majority_where_nobody_agrees() -> None:
    """Nobody wins, and nobody is unscored: all are equal, so such a group teaches nothing."""
    for texts in (("1", "2", "3"), ("x", "y", "1"), ("", "", "")):
        assert [s.value for s in scores("majority", {"pattern": r"\d+"}, group_of(*texts))] == [0.0, 0.0, 0.0]
    assert [s.value for s in scores("majority", {"least": 1}, group_of("a", " A", "b"))] == [1.0, 1.0, 0.0]


def test_majority_in_time_and_bad_args() -> None:
    found = scores("majority", {"pattern": r"(a|aa)+$"}, group_of("a" * 60 + "!", "aa", "aa"))
    assert [s.value for s in found[1:]] == [1.0, 1.0]
    assert found[0].value == 0.0 or (found[0].error or "").startswith("timeout")
    bad_config("majority", {"pattern": "("}, "pattern .*: ")
    bad_config("majority", {"pattern": "a", "field": "b"}, "pattern or field, not both")
    bad_config("majority", {"least": 0}, "greater than 0")


# --- citation

FILING = (
    "Revenue rose by 12 % to 40 million. The board’s view — unchanged — is that costs will fall.\nNo dividend is paid."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('It says "revenue rose by 12 % to 40 million".', 1.0),
        ("“The board's view - unchanged - is that  costs will fall”", 1.0),
        ('"Revenue rose by 12 %" but "costs will rise a lot"', 0.5),
        ('"revenue fell by 12 %"', 0.0),
        ("Revenue rose.", 0.0),
        ('"Revenue rose"', 0.0),  # too short to be a passage
        ("«No dividend is paid.» „costs will fall.“", 1.0),
        ('"" "" ""', 0.0),
    ],
)
def test_citation(text: str, expected: float) -> None:
    assert value("citation", {"key": "filing"}, text, filing=FILING) == expected


def test_citation_of_several_documents_of_the_prompt_and_of_none() -> None:
    docs = ["one two three", "four five six"]
    assert value("citation", {"key": "docs"}, '"one two three" "four five six"', docs=docs) == 1.0
    assert value("citation", {"min_words": 2}, '"sort this"') == 1.0  # the prompt's own words
    assert value("citation", {"key": "filing", "required": False}, "Nothing quoted.", filing=FILING) == 1.0
    assert (one("citation", {"key": "filing"}, "x").error or "").startswith("missing_key: ")
    assert (one("citation", {"key": "filing"}, "x", filing=[""]).error or "").startswith("bad_key: ")
    assert (one("citation", {"key": "filing"}, "x", filing=[["x"]]).error or "").startswith("bad_key: ")


# --- repetition


def test_repetition_by_hand() -> None:
    """abc abc: 3-grams of characters abc, bc_, c_a, _ab, abc: 4 of 5 differ."""
    assert value("repetition", {"n": 3, "unit": "characters"}, "abc ABC") == pytest.approx(4 / 5)
    assert value("repetition", {"n": 2}, "a b a b a b") == pytest.approx(2 / 5)
    assert value("repetition", {}, "too short") == 1.0
    assert value("repetition", {"n": 1, "unit": "tokens"}, "x") == pytest.approx(1 / 3)  # three times token 7
    assert value("repetition", {}, "the same again and " * 200) < 0.01
    bad_config("repetition", {"n": 0}, "greater than 0")


# --- language

ENGLISH = "Your parcel is late because of the storm, and we are sorry for that."
GERMAN = "Ihr Paket kommt wegen des Sturms zu spät, und das tut uns leid."


def test_language() -> None:
    found = scores("language", {"languages": ["en"]}, group_of(ENGLISH, GERMAN, "Ok.", ENGLISH.upper()))
    assert [s.value for s in found if s.scored] == [1.0, 0.0, 1.0]
    assert (found[2].error or "").startswith("too_short: 2 letters")
    assert value("language", {"key": "lang"}, GERMAN, lang="de") == 1.0
    for wrong in ("DE", "de-AT", "German"):
        assert (one("language", {"key": "lang"}, GERMAN, lang=wrong).error or "").startswith("bad_key: ")
    assert value("language", {"languages": ["de", "en"]}, GERMAN) == 1.0
    bad_config("language", {"languages": ["english"]}, "english: expected codes such as en, de, ja")
    bad_config("language", {}, "give either languages or key")


def test_one_answer_that_breaks_a_verifier_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Length._count
    monkeypatch.setattr(Length, "_count", lambda self, r: counted(self, r) if r.text != "b" else 1 // 0)
    found = scores("length", {"max": 3}, group_of("a", "b", "c"))
    assert [s.scored for s in found] == [True, False, True]
    assert (found[1].error or "").startswith("ZeroDivisionError: ")


# --- what stands in a fence


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("SELECT 1", "SELECT 1"),
        ("So:\n```sql\nSELECT 1\n```\nThat is it.", "SELECT 1"),
        ("```\nfirst\n```\nno:\n```sql\nlast\nline\n```", "last\nline"),
        ("```sql\nSELECT 1", "SELECT 1"),  # cut off
        ("```", ""),
        ("```sql\nSELECT 1;```", "SELECT 1;"),  # closed at the end of the last line
        ("It is ```SELECT 1```", "It is ```SELECT 1```"),
        ("```SELECT 1```", "SELECT 1"),
        ("1. So:\n   ```python\n   def f():\n       return 1\n   ```\n", "def f():\n    return 1"),
        ("```python\nx = '```' + y\nz\n```", "x = '```' + y\nz"),
    ],
)
def test_last_fence(answer: str, expected: str) -> None:
    assert text.last_fence(answer) == expected

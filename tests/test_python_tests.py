"""The verifier `python_tests` on honest and half-right answers; hostile ones are in `test_hostile`."""

from __future__ import annotations

from typing import Any

import pytest
from test_verifiers import bad_config, group_of, scores

from opentao.isolation.run import missing_layers

pytestmark = pytest.mark.skipif(bool(missing_layers()), reason=f"this machine lacks {', '.join(missing_layers())}")
CALLS = [
    {"function": "add", "args": [1, 2], "expect": 3},
    {"function": "add", "args": ["a"], "kwargs": {"b": "b"}, "expect": "ab"},
    {"function": "add", "args": [[1], [2]], "expect": [1, 2]},
    {"function": "nothing", "expect": None},
]
GOOD = "Here you are:\n```python\ndef add(a, b):\n    return a + b\n\ndef nothing():\n    pass\n```"


def values(args: dict[str, Any], *texts: str, **meta: Any) -> list[float]:
    found = scores("python_tests", {"key": "tests"} | args, group_of(*texts, **meta))
    assert all(s.error is None for s in found), found
    return [s.value for s in found]


def test_calls() -> None:
    numbers_only = "def add(a, b): return int(a) + int(b)\ndef nothing(): pass"
    assert values({}, GOOD, numbers_only, "def add(a, b)", "no code", tests=CALLS) == [1.0, 0.0, 0.0, 0.0]
    assert values({"partial": True}, GOOD, numbers_only, "", tests=CALLS) == [1.0, 0.5, 0.0]


def test_answers_with_dataclasses_and_annotations() -> None:
    plain = "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef add(a, b): return P(a + b).x\n"
    later = "from __future__ import annotations\n" + plain.replace("x: int", "x: int\n    next: P | None = None")
    kinds = "import typing\ndef add(a: int, b: int): return a + b if typing.get_type_hints(add)['a'] is int else 0"
    assert values({}, plain, later, kinds, tests=CALLS[:1]) == [1.0, 1.0, 1.0]
    assert values({"kind": "code"}, plain, later, kinds, tests="assert add(1, 2) == 3") == [1.0, 1.0, 1.0]


def test_the_last_digit_is_no_mistake() -> None:
    calls = [{"function": "mean", "args": [[0.1, 0.2, 0.3]], "expect": 0.2}]
    assert values({}, "def mean(x): return sum(x) / len(x)", "def mean(x): return 0.21", tests=calls) == [1.0, 0.0]


def test_results_are_compared_as_json_values() -> None:
    calls = [{"function": "f", "expect": [1, 2.0, {"a": None}]}]
    right, wrong = "def f(): return (1.0, 2, {'a': None})", "def f(): return [True, 2, {'a': None}]"
    assert values({}, right, wrong, "def f(): return {1, 2}", tests=calls) == [1.0, 0.0, 0.0]


def test_code() -> None:
    tests = "assert add(1, 2) == 3\nassert nothing() is None"
    assert values({"kind": "code"}, GOOD, "def add(a, b): return 3", "import sys; sys.exit(0)", tests=tests) == [
        1,
        0,
        0,
    ]


def test_plain_tricks_do_not_pass_test_code() -> None:
    tricks = [
        "print('passed')",
        "raise SystemExit(0)",
        "import atexit\natexit.register(lambda: 0)\ndef add(a, b): return 4",
        "def add(a, b): raise SystemExit",
        "try:\n    add\nexcept NameError:\n    pass",
    ]
    assert values({"kind": "code"}, *tricks, tests="assert add(1, 2) == 3") == [0.0] * len(tricks)


def test_over_a_limit() -> None:
    texts = ["while True: pass", "x = 'a' * 10**10", "def add(a, b): return a + b"]
    args = {"seconds": 0.4, "memory_mb": 256}
    found = scores("python_tests", {"key": "tests"} | args, group_of(*texts, tests=CALLS[:1]))
    assert [(s.error or "").partition(":")[0] for s in found] == ["timeout", "memory", ""]
    inside = ["def add(a, b):\n    while True: pass", "def add(a, b): return 'a' * 10**10"]
    found = scores("python_tests", {"key": "tests"} | args, group_of(*inside, tests=CALLS[:1]))
    assert [(s.error or "").partition(":")[0] for s in found] == ["timeout", "memory"]
    assert values(args | {"over_limit": 0.0}, *texts, tests=CALLS[:1]) == [0.0, 0.0, 1.0]


def test_what_cannot_be_judged_is_unscored() -> None:
    for meta in (
        {},
        {"tests": []},
        {"tests": "x"},
        {"tests": [1]},
        {"tests": [{"args": []}]},
        {"tests": [{"function": "add", "args": [1, 2], "expected": 3}]},  # it is `expect`
        {"tests": [{"function": "add", "args": 3, "expect": 3}]},
        {"tests": [{"function": "add", "kwargs": [1], "expect": 3}]},
    ):
        (found,) = scores("python_tests", {"key": "tests"}, group_of(GOOD, **meta))
        assert (found.error or "").startswith(("missing_key: ", "bad_key: "))


def test_a_table_has_nulls_where_nothing_is_given() -> None:
    calls = [{"function": "add", "args": [1, 2], "kwargs": None, "expect": 3, "note": None}]
    calls += [{"function": "nothing", "args": None, "kwargs": {}, "expect": None}]
    assert values({}, GOOD, tests=calls) == [1.0]


def test_folders_in_folders_cost_nobody_else_anything() -> None:
    """Python below 3.13 removes them by calls, one a level."""
    deep = "import os\nfor _ in range(1500):\n    os.mkdir('a')\n    os.chdir('a')\ndef add(a, b): return a + b"
    found = scores("python_tests", {"key": "tests"}, group_of(deep, GOOD, tests=CALLS[:1]))
    assert [s.value for s in found] == [1.0, 1.0]


def test_bad_arguments() -> None:
    bad_config("python_tests", {}, "key: ")
    bad_config("python_tests", {"key": "t", "kind": "code", "partial": True}, "partial: only for")

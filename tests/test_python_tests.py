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
    for meta in ({}, {"tests": []}, {"tests": "x"}, {"tests": [1]}, {"tests": [{"args": []}]}):
        (found,) = scores("python_tests", {"key": "tests"}, group_of(GOOD, **meta))
        assert (found.error or "").startswith(("missing_key: ", "bad_key: "))


def test_bad_arguments() -> None:
    bad_config("python_tests", {}, "key: ")
    bad_config("python_tests", {"key": "t", "kind": "code", "partial": True}, "partial: only for")

"""Child of the verifier `python_tests`: run an answer's code, then calls of its functions or a piece of test code.

One child an answer. What it says of `calls` is what the functions returned, which the parent compares with results that
never come here. What it says of test code is a word that the answer is not told; the verifier says what that is worth.
"""

from __future__ import annotations

import json
import sys
import types
from typing import Any

from opentao.isolation.child import Answer, serve

MAX_MESSAGE = 200


def prepare(setup: dict[str, Any]) -> Answer:
    return answer


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """``{"returned": [[true, 3], [false, "ValueError: …"]]}``, or ``{"passed": <the word>}``, or ``{"error": "…"}``."""
    calls, tests, word = job.get("calls"), job.get("tests"), job.get("word")
    module = sys.modules["answer"] = types.ModuleType("answer")  # where dataclasses look their annotations up
    space = module.__dict__
    dumps, kind = json.dumps, BaseException
    try:
        exec(compile(job["code"], "<answer>", "exec", dont_inherit=True), space)
        if calls is not None:
            return {"returned": [_call(space, call) for call in calls]}
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), space)
    except kind as error:
        return {"error": _words(error)}
    return {"passed": dumps(word)}


def _call(space: dict[str, Any], call: dict[str, Any]) -> list[Any]:
    try:
        value = space[call["function"]](*call.get("args", []), **call.get("kwargs", {}))
        return [True, json.loads(json.dumps(value))]
    except MemoryError:  # the limit, not the answer: said of the whole answer
        raise
    except BaseException as error:
        return [False, _words(error)]


def _words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
    except BaseException:
        return "an exception that cannot be written out"


def main(path: str) -> None:
    serve(path, prepare)

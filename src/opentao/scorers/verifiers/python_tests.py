"""`python_tests`: does the answer's code do what it should?

Threat model. The code runs in a process of its own, one an answer: no network, no new processes, no signals to others,
no rights on files but reading the interpreter's and writing in a temporary folder, no environment variables, limits of
time, memory and file size. The results that `calls` should give never enter that process: the code cannot know them and
cannot decide the comparison. Test *code* shares the process with what it tests: exits, prints and caught exceptions do
not help an answer, but code that rewrites its own interpreter can make such tests pass. Use `calls` where you can.
"""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from opentao.isolation.run import Broken, Isolation, Limits, require, run_jobs
from opentao.scorers.plugin import Rating, unscored
from opentao.scorers.verifiers.base import ARGS, Unscored, Verifier, meta_text, meta_value
from opentao.scorers.verifiers.strict_json import json_close
from opentao.scorers.verifiers.text import last_fence
from opentao.types import Prompt, Response


@dataclass(kw_only=True, config=ARGS)
class PythonTests(Verifier):
    """Runs the answer's code (its last Markdown fence, or all of it) against the tests in ``meta[key]``.

    * `kind: calls`: a list such as ``[{"function": "add", "args": [1, 2], "expect": 3}]``; what a function returns is
      brought to JSON (a tuple is a list) and compared by value. Score: 1.0 if all are right, else 0.0; with `partial`
      the share that is.
    * `kind: code`: Python text, ``assert add(1, 2) == 3``, run after the answer in the same names. 1.0 if it ends
      without an exception, else 0.0.

    An answer over a limit is unscored (timeout, memory, crashed, too_much_output), or has the score `over_limit`.
    """

    key: str
    kind: Literal["calls", "code"] = "calls"
    partial: bool = False
    seconds: PositiveFloat = 5.0
    memory_mb: PositiveInt = 512
    over_limit: float | None = None
    isolation: Isolation = "full"
    _limits: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.isolation)
        if self.partial and self.kind == "code":
            raise ValueError("partial: only for `kind: calls`")
        self._limits = Limits(seconds=self.seconds, memory_mb=self.memory_mb)

    def rate(self, prompt: Prompt, response: Response) -> Rating:
        code = last_fence(response.text)
        if self.kind == "code":
            word = secrets.token_hex(16)
            answer = self._run({"code": code, "tests": meta_text(prompt, self.key), "word": word})
            return answer if not isinstance(answer, dict) else float(answer.get("passed") == f'"{word}"')
        calls = _calls(meta_value(prompt, self.key), self.key)
        asked = [{name: call[name] for name in ("function", "args", "kwargs") if name in call} for call in calls]
        answer = self._run({"code": code, "calls": asked})
        return self._share(answer, calls) if isinstance(answer, dict) else answer

    def _run(self, job: dict[str, Any]) -> dict[str, Any] | Rating:
        """What the child says, or the rating of an answer that broke a limit."""
        (answer,) = run_jobs("opentao.isolation.python_child", {}, [job], self._limits, isolation=self.isolation)
        if not isinstance(answer, dict | Broken):
            return 0.0  # the answer wrote this line, not the child
        if isinstance(answer, dict):
            if not str(answer.get("error", "")).startswith("MemoryError"):
                return answer
            answer = Broken(kind="memory", message=f"over {self.memory_mb} MB")
        return self.over_limit if self.over_limit is not None else unscored(answer.kind, answer.message)

    def _share(self, answer: dict[str, Any], calls: list[dict[str, Any]]) -> float:
        returned = answer.get("returned")
        if not isinstance(returned, list) or len(returned) != len(calls):
            return 0.0
        right = [
            isinstance(got, list) and len(got) == 2 and got[0] is True and json_close(got[1], call["expect"])
            for got, call in zip(returned, calls, strict=True)
        ]
        return sum(right) / len(right) if self.partial else float(all(right))


def _calls(value: Any, key: str) -> list[dict[str, Any]]:
    """The calls of a prompt; a table file stores an expected null and a missing one alike, hence `expect` may be absent
    only where it is null."""
    if not (isinstance(value, list) and value and all(isinstance(c, dict) and c.get("function") for c in value)):
        raise Unscored("bad_key", f"meta[{key!r}]: expected a list of {{function, args, kwargs, expect}}")
    calls = [{name: given for name, given in call.items() if given is not None} for call in value]
    for number, call in enumerate(calls):
        if unknown := sorted(set(call) - {"function", "args", "kwargs", "expect"}):
            raise Unscored("bad_key", f"meta[{key!r}]: call {number}: unknown key {unknown[0]!r}")
        if not isinstance(call.get("args", []), list) or not isinstance(call.get("kwargs", {}), dict):
            raise Unscored("bad_key", f"meta[{key!r}]: call {number}: expected a list of args, an object of kwargs")
    return [{"expect": None} | call for call in calls]

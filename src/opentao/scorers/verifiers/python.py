"""`python`: a function of yours judges each answer.

Threat model: yours. The function runs inside the run itself: never let it execute the answer (see `python_tests`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic.dataclasses import dataclass

from opentao.scorers.plugin import Rating, call_plugin, import_object
from opentao.scorers.run import to_score
from opentao.scorers.verifiers.base import ARGS, Verifier
from opentao.types import Prompt, Response


@dataclass(kw_only=True, config=ARGS)
class Python(Verifier):
    """Calls `function`, "module:function", as ``f(prompt: Prompt, text: str) -> float | bool | None`` on each answer.

    The module may lie in the current directory. None, NaN and infinity are unscored; an exception makes that response,
    and no other, unscored with the exception's type and message.
    """

    function: str
    _call: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._call = import_object(self.function)
        if not callable(self._call):
            raise ValueError(f"{self.function} is {type(self._call).__name__}, expected a function")

    def rate(self, prompt: Prompt, response: Response) -> Rating:
        return to_score(call_plugin(self._call, prompt, response.text))

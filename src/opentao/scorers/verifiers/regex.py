"""`regex`: does the answer match a pattern?

Threat model: the answer is only read, for at most a second a search.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import regex
from pydantic.dataclasses import dataclass

from opentao.scorers.verifiers.base import ARGS, Verifier
from opentao.scorers.verifiers.text import search
from opentao.types import Prompt, Response


@dataclass(kw_only=True, config=ARGS)
class Regex(Verifier):
    r"""1.0 if `pattern` is found anywhere in the answer, else 0.0; with `full` it must match the whole answer.

    The syntax is that of the `regex` package, a superset of `re`. ``.`` stops at a line break and ``\d`` takes any
    script's digits unless the pattern says ``(?s)``, ``(?a)``. A search that takes over a second is unscored: timeout.
    """

    pattern: str
    full: bool = False
    _compiled: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            self._compiled = regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"pattern {self.pattern!r}: {error}") from error

    def rate(self, prompt: Prompt, response: Response) -> float:
        return float(search(self._compiled, response.text, full=self.full))

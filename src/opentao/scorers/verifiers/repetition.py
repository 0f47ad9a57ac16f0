"""`repetition`: does the answer go round in circles?

Threat model: the answer is only read, in time linear in its length. A very short answer has full marks, and so has
nonsense that never repeats: a guard beside other scorers, not a goal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from opentao.scorers.verifiers.base import ARGS, Verifier, known_tokens
from opentao.types import Prompt, Response


@dataclass(kw_only=True, config=ARGS)
class Repetition(Verifier):
    """The share of runs of `n` units that have not stood before in the answer: 1.0 without repetition, near 0 in loops.

    Units: words (between white space, without case), characters, or tokens as sampled. A shorter answer gets 1.0.
    """

    n: PositiveInt = 4
    unit: Literal["words", "characters", "tokens"] = "words"

    def rate(self, prompt: Prompt, response: Response) -> float:
        return distinct_share(self._units(response), self.n)

    def _units(self, response: Response) -> list[str] | list[int]:
        if self.unit == "tokens":
            return known_tokens(response)
        text = response.text.casefold()
        return text.split() if self.unit == "words" else list(text)


def distinct_share(units: Sequence[str] | Sequence[int], n: int) -> float:
    """Different runs of `n` units over all runs; 1.0 if there are none.

    >>> distinct_share("a b a b a".split(), 2)
    0.5
    """
    runs = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0

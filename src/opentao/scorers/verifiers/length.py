"""`length`: is the answer as long as it should be?

Threat model: the answer is only counted. Filler of the right length passes: a guard beside other scorers, not a goal.
"""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from opentao.scorers.verifiers.base import ARGS, Verifier, known_tokens
from opentao.types import Prompt, Response


@dataclass(kw_only=True, config=ARGS)
class Length(Verifier):
    """1.0 from `min` to `max` (both included), falling in a straight line to 0.0 at `slack` outside.

    Score = 1 - d/slack, at least 0, where d is how many units are missing or too many; ``slack: 0`` is a hard limit.
    Units: words (between white space), characters (Unicode code points) or tokens (as sampled, stop token included).
    """

    min: NonNegativeInt | None = None
    max: NonNegativeInt | None = None
    unit: Literal["words", "characters", "tokens"] = "words"
    slack: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")

    def rate(self, prompt: Prompt, response: Response) -> float:
        outside = self._outside(self._count(response))
        if outside == 0:
            return 1.0
        return 1.0 - outside / self.slack if outside < self.slack else 0.0

    def _count(self, response: Response) -> int:
        if self.unit == "tokens":
            return len(known_tokens(response))
        return len(response.text.split() if self.unit == "words" else response.text)

    def _outside(self, count: int) -> int:
        if self.min is not None and count < self.min:
            return self.min - count
        if self.max is not None and count > self.max:
            return count - self.max
        return 0

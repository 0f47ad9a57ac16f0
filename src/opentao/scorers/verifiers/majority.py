"""`majority`: does the answer agree with what most responses of its group say?

Threat model: the answer is only read. A policy can win the vote by agreeing with itself on something wrong, the same
short word for every prompt in the worst case: look at the audit, and give a scorer beside this one that knows the task.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import regex
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from opentao.scorers.plugin import Rating, unscored
from opentao.scorers.verifiers.base import ARGS, Unscored, Verifier
from opentao.scorers.verifiers.strict_json import parse_json
from opentao.scorers.verifiers.text import find_last, normalise
from opentao.types import Group, Response, Score


@dataclass(kw_only=True, config=ARGS)
class Majority(Verifier):
    """Vote over extracted answers (self-consistency, arXiv 2203.11171): 1.0 for the most frequent, else 0.0.

    The answer is the last match of `pattern` (its first group, if it has one), or the value of `field` in a JSON
    answer; without either the whole text. Compared in NFC, without white space around it and without case. With
    ``as_share`` a response gets the share of responses that gave its answer. A response without an answer gets 0.0. An
    answer with fewer than `least` votes gets 0.0, though no other has more; answers with equally many votes all win.
    """

    pattern: str | None = None
    field: str | None = None
    as_share: bool = False
    least: PositiveInt = 2
    _compiled: Any = dataclasses.field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.pattern is not None and self.field is not None:
            raise ValueError("give pattern or field, not both")
        if self.pattern is not None:
            try:
                self._compiled = regex.compile(self.pattern)
            except regex.error as error:
                raise ValueError(f"pattern {self.pattern!r}: {error}") from error

    @property
    def relative(self) -> bool:
        return True

    def score(self, group: Group) -> list[Rating]:
        answers = [self._safe_answer(response) for response in group.responses]
        votes = Counter(a for a in answers if isinstance(a, str))
        most, voters = max(votes.values(), default=0), sum(not isinstance(a, Score) for a in answers)
        return [self._rating(answer, votes, most, voters) for answer in answers]

    def _rating(self, answer: str | Score | None, votes: Counter[str], most: int, voters: int) -> Rating:
        if answer is None or isinstance(answer, Score):
            return 0.0 if answer is None else answer
        if votes[answer] < self.least:
            return 0.0
        return votes[answer] / voters if self.as_share else float(votes[answer] == most)

    def _safe_answer(self, response: Response) -> str | Score | None:
        try:
            text = self._answer(response.text)
        except Unscored as reason:
            return unscored(reason.kind, str(reason))
        plain = normalise(text, casefold=True).strip() if text is not None else ""
        return plain or None

    def _answer(self, text: str) -> str | None:
        if self.field is not None:
            return _json_answer(text, self.field)
        return text if self._compiled is None else find_last(self._compiled, text)


def _json_answer(text: str, field: str) -> str | None:
    try:
        value = parse_json(text, fences=True)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get(field), str | int | float | bool):
        return None
    found = value[field]
    return str(int(found) if isinstance(found, float) and found.is_integer() else found)  # 12.0 votes with 12

"""What the built-in verifiers share: their arguments are checked by pydantic, and each response is judged alone.

A verifier gives 0 to a wrong answer. What stops it from judging (no label on the prompt, out of time) is `Unscored`.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from opentao.scorers.plugin import Rating, call_plugin, unscored
from opentao.types import Group, Prompt, Response

ARGS = ConfigDict(extra="forbid")


class Unscored(Exception):
    """One response cannot be judged: `kind` and message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(kw_only=True, config=ARGS)
class Verifier:
    """Base of the built-in verifiers; a subclass has its arguments as fields and `rate`."""

    name: str

    def score(self, group: Group) -> list[Rating]:
        return [self._rate_safely(group.prompt, response) for response in group.responses]

    def _rate_safely(self, prompt: Prompt, response: Response) -> Rating:
        """Whatever goes wrong with one response is its own: the others of the group keep their scores."""
        rating: Rating = call_plugin(self._rate_or_reason, prompt, response)
        return rating

    def _rate_or_reason(self, prompt: Prompt, response: Response) -> Rating:
        try:
            return self.rate(prompt, response)
        except Unscored as reason:
            return unscored(reason.kind, str(reason))

    def rate(self, prompt: Prompt, response: Response) -> Rating:
        """The score of one response.

        Raises:
            Unscored: it cannot be judged.
        """
        raise NotImplementedError


def known_tokens(response: Response) -> list[int]:
    if response.text and not response.tokens_R:
        raise Unscored("no_tokens", "this answer was not sampled here: its tokens are not known")
    return list(response.tokens_R)


def meta_value(prompt: Prompt, key: str) -> Any:
    """``prompt.meta[key]``, the label that an answer is compared with."""
    if prompt.meta.get(key) is None:
        raise Unscored("missing_key", f"the prompt's meta has no {key!r}; it has {list(prompt.meta)}")
    return prompt.meta[key]


def meta_text(prompt: Prompt, key: str) -> str:
    """The label as text. Whole numbers are written out; how to write others is anyone's guess, so they are refused."""
    return as_text(meta_value(prompt, key), key)


def as_text(value: Any, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Unscored("bad_key", f"meta[{key!r}] is {type(value).__name__}, expected text or a whole number")
    if not str(value).strip():
        raise Unscored("bad_key", f"meta[{key!r}] is empty")
    return str(value)

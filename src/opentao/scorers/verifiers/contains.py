"""`contains`: does the answer contain some text?

Threat model: the answer is only read. One that holds all strings and much else passes: add `length`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic.dataclasses import dataclass

from opentao.scorers.verifiers.base import ARGS, Unscored, Verifier, as_text, meta_value
from opentao.scorers.verifiers.text import normalise
from opentao.types import Prompt, Response


@dataclass(kw_only=True, config=ARGS)
class Contains(Verifier):
    """1.0 if the answer contains `all` (or, with ``mode: any``, at least one) of the strings, else 0.0.

    The strings are `strings`, or the text or list of texts at ``prompt.meta[key]``. Give one of the two. Both sides are
    brought to Unicode NFC; `casefold` ignores case. Word boundaries do not matter: "art" is in "party". A prompt
    without the label, or with an empty one (which any answer contains), is unscored.
    """

    strings: list[str] | str | None = None
    key: str | None = None
    mode: Literal["all", "any"] = "all"
    casefold: bool = False

    def __post_init__(self) -> None:
        if (self.strings is None) == (self.key is None):
            raise ValueError("give either strings or key")
        if self.strings is not None and not all(_listed(self.strings) or [""]):
            raise ValueError("strings: every answer contains an empty string")

    def rate(self, prompt: Prompt, response: Response) -> float:
        text = normalise(response.text, casefold=self.casefold)
        found = [normalise(string, casefold=self.casefold) in text for string in self._wanted(prompt)]
        return float(all(found) if self.mode == "all" else any(found))

    def _wanted(self, prompt: Prompt) -> list[str]:
        if self.key is None:
            return _listed(self.strings)
        wanted = [as_text(value, self.key) for value in _listed(meta_value(prompt, self.key))]
        if not all(wanted or [""]):
            raise Unscored("bad_key", f"meta[{self.key!r}] is empty or has an empty string")
        return wanted


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

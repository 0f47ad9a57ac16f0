"""`language`: is the answer written in the language that was asked for?

Threat model: the answer is only read. A detector goes by letters and short runs of them, so a few words decide nothing
(hence `least`), and text in two languages counts as the one that prevails. An answer shorter than `least` letters is
unscored: give `length` beside this scorer, or short answers escape it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from opentao.scorers.verifiers.base import ARGS, Unscored, Verifier, meta_text
from opentao.types import Prompt, Response

MAX_CHARACTERS = 5000  # more say nothing new


@dataclass(kw_only=True, config=ARGS)
class Language(Verifier):
    """1.0 if the answer is in one of `languages` (ISO 639-1 codes), or in the one at ``meta[key]``, else 0.0.

    `least`: with fewer letters an answer is unscored, too_short. Detector: py3langid.
    """

    languages: list[str] | None = None
    key: str | None = None
    least: PositiveInt = 20
    _detector: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        if (self.languages is None) == (self.key is None):
            raise ValueError("give either languages or key")
        self._detector = LanguageIdentifier.from_model_file(MODEL_FILE)
        if unknown := sorted(set(self.languages or []) - set(self._detector.labels)):
            raise ValueError(f"languages: {', '.join(unknown)}: expected codes such as en, de, ja")

    def rate(self, prompt: Prompt, response: Response) -> float:
        wanted = self.languages or [meta_text(prompt, str(self.key))]
        if not set(wanted) <= set(self._detector.labels):
            raise Unscored("bad_key", f"meta[{self.key!r}] is {wanted[0]!r}, expected a code such as en, de, ja")
        letters = sum(character.isalpha() for character in response.text)
        if letters < self.least:
            raise Unscored("too_short", f"{letters} letters, {self.least} are needed to tell a language")
        text = response.text[:MAX_CHARACTERS].encode("utf-8", "ignore").decode()
        return float(self._detector.classify(text)[0] in wanted)

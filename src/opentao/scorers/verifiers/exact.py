"""`exact`: is the answer the expected text?

Threat model: the answer is only read.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from opentao.scorers.verifiers.base import ARGS, Verifier, meta_text
from opentao.scorers.verifiers.text import normalise
from opentao.types import Prompt, Response


@dataclass(kw_only=True, config=ARGS)
class Exact(Verifier):
    """1.0 if the answer equals `target`, or the text at ``prompt.meta[key]``, else 0.0. Give one of the two.

    Both sides are brought to Unicode NFC; `strip` takes white space off both ends, `casefold` ignores case. A prompt
    without the label is unscored.
    """

    target: str | None = None
    key: str | None = None
    strip: bool = True
    casefold: bool = False

    def __post_init__(self) -> None:
        if (self.target is None) == (self.key is None):
            raise ValueError("give either target or key")

    def rate(self, prompt: Prompt, response: Response) -> float:
        target = self.target if self.key is None else meta_text(prompt, self.key)
        return float(self._plain(response.text) == self._plain(target or ""))

    def _plain(self, text: str) -> str:
        text = normalise(text, casefold=self.casefold)
        return text.strip() if self.strip else text

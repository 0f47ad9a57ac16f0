"""`citation`: do the passages that the answer quotes stand in the document?

Threat model: the answer is only read. It can quote something true and beside the point, or quote much and say nothing:
the score is about the quotes alone. Quoting the question counts if no `key` names the document.
"""

from __future__ import annotations

from typing import Any

import regex
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from opentao.scorers.verifiers.base import ARGS, Unscored, Verifier, as_text, meta_value
from opentao.scorers.verifiers.text import normalise
from opentao.types import Prompt, Response

QUOTES = regex.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»')
MARKS = str.maketrans({"’": "'", "‘": "'", "…": "...", "–": "-", "—": "-"})


@dataclass(kw_only=True, config=ARGS)
class Citation(Verifier):
    """The share of quoted passages that stand in the document word for word.

    The document is the text, or list of texts, at ``prompt.meta[key]``; without `key` it is what the prompt's messages
    say. Quotes of fewer than `min_words` words are not passages. White space, case and the kind of apostrophe, dash or
    dots do not matter. An answer that quotes nothing gets 0.0, or 1.0 with ``required: false``.
    """

    key: str | None = None
    min_words: PositiveInt = 3
    required: bool = True

    def rate(self, prompt: Prompt, response: Response) -> float:
        documents = [_plain(text) for text in self._documents(prompt)]
        passages = [p for p in map(_plain, _quoted(response.text)) if len(p.split()) >= self.min_words]
        if not passages:
            return float(not self.required)
        return sum(any(p in d for d in documents) for p in passages) / len(passages)

    def _documents(self, prompt: Prompt) -> list[str]:
        if self.key is None:
            return [m["content"] for m in prompt.messages if isinstance(m.get("content"), str)]
        value: Any = meta_value(prompt, self.key)
        texts = [as_text(v, self.key) for v in (value if isinstance(value, list) else [value])]
        if not any(texts):
            raise Unscored("bad_key", f"meta[{self.key!r}] is empty")
        return texts


def _quoted(text: str) -> list[str]:
    return [next(part for part in match if part) for match in QUOTES.findall(text)]


def _plain(text: str) -> str:
    return " ".join(normalise(text, casefold=True).translate(MARKS).split())

"""Scores of short answers for the recipe: the audit compares with known answers, which training never sees.

An answer is the text before its first quotation, or its first line. F1 is over words as in SQuAD (lower case, without
articles and punctuation), the best of the accepted answers; source: Rajpurkar et al., arXiv 1606.05250, section 6.1.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from opentao.types import Prompt

QUOTE = re.compile(r'["“„«]')
MOST_WORDS = 10
OFTEN = (
    "of in to and is was are were be been it its that this these those which who for on as by with from at or not have"
    " has had their they he she his her but also there"
)
COMMON = frozenset(OFTEN.split())  # in nearly every passage, so that having them says nothing


def answer_of(text: str) -> str:
    """
    >>> answer_of('Answer: In 1994.\\nQuote: "It opened in 1994."')
    'In 1994.'
    """
    first = text.strip().split("\n", 1)[0]
    first = re.sub(r"^\s*answer\s*:\s*", "", first, flags=re.IGNORECASE)
    before = QUOTE.split(first, 1)[0]
    return re.sub(r"\s*quote\s*:\s*$", "", before or first, flags=re.IGNORECASE).strip()


def plain_words(text: str) -> list[str]:
    """
    >>> plain_words("The Rhine, a river.")
    ['rhine', 'river']
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [w for w in text.split() if w not in ("a", "an", "the")]


def f1_of(answer: str, accepted: str) -> float:
    """
    >>> f1_of("the river Rhine", "Rhine")
    0.6666666666666666
    """
    own, wanted = plain_words(answer), plain_words(accepted)
    common = sum((Counter(own) & Counter(wanted)).values())
    return 2 * common / (len(own) + len(wanted)) if common else 0.0


def f1(prompt: Prompt, text: str) -> float | None:
    accepted = prompt.meta.get("answers")
    return max(f1_of(answer_of(text), a) for a in accepted) if accepted else None


def exact(prompt: Prompt, text: str) -> float | None:
    accepted = prompt.meta.get("answers")
    own = plain_words(answer_of(text))
    return float(any(own == plain_words(a) for a in accepted)) if accepted else None


def grounded(prompt: Prompt, text: str) -> float:
    """A rule, not a judgement: share of the answer's words that the passage, ``meta["passage"]``, has.

    Words of the question and COMMON ones do not count. 0 where nothing is left, and for an answer of more than
    MOST_WORDS words: "a few words" are asked for.
    """
    question = str(prompt.messages[-1]["content"]).rpartition("Question:")[2]
    own, asked = plain_words(answer_of(text)), set(plain_words(question))
    new = [word for word in own if word not in asked and word not in COMMON]
    if not new or len(own) > MOST_WORDS:
        return 0.0
    there = set(plain_words(prompt.meta["passage"]))
    return sum(word in there for word in new) / len(new)

"""How near a query is to a known one, for the recipe's preferences: people who compare two queries read them, too."""

from __future__ import annotations

import re
from collections import Counter

from opentao.scorers.verifiers.sql import query_of
from opentao.types import Prompt

PIECE = re.compile(r"\w+|[^\w\s]")


def alike(prompt: Prompt, text: str) -> float:
    """F1 over the words and signs of the answer's query and of ``meta["gold"]``, whatever their case."""
    own, known = (Counter(PIECE.findall(query.lower())) for query in (query_of(text), str(prompt.meta["gold"])))
    common = sum((own & known).values())
    return 2 * common / (own.total() + known.total()) if common else 0.0

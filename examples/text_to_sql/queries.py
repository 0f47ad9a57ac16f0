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


COLUMN = re.compile(r"^\s+\"?(\w+)\"? ", re.MULTILINE)  # of CREATE TABLE, one column a line
LITERAL = re.compile(r"'([^']*)'|(?<![\w.])(\d+(?:\.\d+)?)(?![\w.])")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
LIMIT = re.compile(r"\blimit\s+\d+", re.IGNORECASE)


def linked(prompt: Prompt, text: str) -> float:
    """A rule that knows no answer: does the query ask for what the question names, and for nothing that it does not?

    Half of it: the share of the query's literals that the question has (the number of LIMIT does not count). The other
    half: F1 between the columns that the query uses and those whose words the question has. 0 for what is no SELECT.
    """
    query = query_of(text)
    if not query.lower().startswith("select"):
        return 0.0
    schema, _, question = str(prompt.messages[-1]["content"]).rpartition("SQL query for:")
    asked = set(stems(question.splitlines()[0]))
    literals = [a or b for a, b in LITERAL.findall(LIMIT.sub("", query))]
    grounded = sum(set(stems(value)) <= asked for value in literals) / len(literals) if literals else 1.0
    columns = {name.lower() for name in COLUMN.findall(schema)}
    named = {name for name in columns if set(stems(name)) <= asked}
    used = columns & {name.lower() for name in IDENTIFIER.findall(LITERAL.sub("", query))}
    common = 2 * len(named & used) / (len(named) + len(used)) if named or used else 1.0
    return (grounded + common) / 2


def stems(text: str) -> list[str]:
    """Words in lower case, cut where names join them, without a plural's ending.

    >>> stems("openingYear of Room_Names")
    ['opening', 'year', 'of', 'room', 'name']
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+(?:\.\d+)?", text)
    return [re.sub(r"(?<=..)(?<!s)s$", "", re.sub(r"ies$", "y", word.lower())) for word in words]
